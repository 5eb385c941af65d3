"""Fuse networks of one task on models in memory: layer maps, balance, channel maps, and the fuse rule.

The result has the graph of one of them, the *reference*. Every other network is brought to its depth, matched with it
node by node, and its channels are mapped to the reference's, space by space; then a rule makes one set of weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as oir
from onnx_ir.passes import common

from onnxmerge.errors import ModelError
from onnxmerge.ir.correspond import correspond
from onnxmerge.ir.layers import Layer, find_layers
from onnxmerge.ir.shapes import infer_shapes
from onnxmerge.ir.spaces import Space, find_spaces
from onnxmerge.ir.stages import Step, find_steps
from onnxmerge.methods.align import Pair
from onnxmerge.methods.balance import balance
from onnxmerge.methods.choices import Balance, Matching, Rule
from onnxmerge.methods.pairs import pair_statistics
from onnxmerge.methods.progress import Progress
from onnxmerge.methods.task import Feeds, Task
from onnxmerge.passes.channel_map import MappedPartner, matching_spaces, target_channels
from onnxmerge.passes.least_squares import solve_least_squares, solve_repair
from onnxmerge.passes.match_channels import (
    correlation_cost,
    distance_cost,
    match_by_activations,
    match_by_weights,
    transport,
)
from onnxmerge.passes.mtz import HessianAverage
from onnxmerge.passes.refit import Refit, Teacher
from onnxmerge.passes.transport import TransportAverage
from onnxmerge.runtime.statistics import PairStatistics, Regression

RIDGE = 1e-3
"""Default lambda: on one task a network's own activations are close to its teachers', and less of a pull is needed."""


@dataclass(frozen=True)
class FuseOptions:
    """How networks are fused.

    Attributes:
        rule: least squares, the average (assignment where widths agree, else exact transport), OTFusion's transport
            (squared distances of activations), MTZ's Hessian rule, or the average repaired.
        balance: what becomes of layers without a counterpart where the rule mixes weights: `add` identities to the
            shallower network, or `collapse` those of a network deeper than the reference.
        match: compare channels by activations or by weights.
        entropy: regularisation of optimal transport, relative to the median cost; 0 is exact.
        ridge: lambda of least squares.
        samples: unlabelled samples of each network's data.
        seed: of samples and positions.
        threads: for onnxruntime.
    """

    rule: Rule = Rule.LEAST_SQUARES
    balance: Balance = Balance.ADD
    match: Matching = Matching.ACTIVATIONS
    entropy: float = 0.0
    ridge: float = RIDGE
    samples: int = 10_000
    seed: int = 0
    threads: int | None = None


@dataclass(frozen=True)
class Counterpart:
    """Another network as the reference sees it.

    Attributes:
        task: the network and its data.
        teacher: a network of the same function as the original, in which `values` are computed.
        values: names of our values -> the teacher's that stand for them.
        orders, maps: by our values, as in `Teacher`.
        partner: its weights in the reference's depth; None where only what it computes is looked at.
    """

    task: Task
    teacher: oir.Model
    values: Mapping[str, str]
    orders: Mapping[str, np.ndarray]
    maps: Mapping[str, np.ndarray]
    partner: MappedPartner | None


def fuse_networks(
    reference: Task,
    others: Sequence[Task],
    layer_maps: Sequence[Sequence[Pair]],
    weights: Sequence[float],
    options: FuseOptions,
    progress: Progress,
) -> oir.Model:
    """One network with the reference's graph that stands for all.

    Args:
        reference: whose architecture the result has.
        others: at least one network of the same task.
        layer_maps: for each of the others its steps' partners (first: the reference's).
        weights: a_t, the reference's first.
        options: see `FuseOptions`.
        progress: told of each layer that is fitted.

    Raises:
        ModelError: a network cannot be brought to the reference's depth, or its structure differs in more than that.
    """
    spaces = [space for space in find_spaces(reference.model).permutable() if not space.blocks]
    counterparts = [
        _counterpart(reference, task, pairs, spaces, weight, options)
        for task, pairs, weight in zip(others, layer_maps, weights[1:], strict=True)
    ]
    fused = reference.model.clone()
    partners = [counterpart.partner for counterpart in counterparts if counterpart.partner is not None]
    if options.rule == Rule.MTZ:
        feeds = [_feeds(task, task, options) for task in (reference, *others)]
        count = len(reference.data.calibration.take(options.samples, options.seed))
        HessianAverage(partners, spaces, feeds, count, weights[0], seed=options.seed, threads=options.threads)(fused)
    else:
        TransportAverage(partners, spaces, weights[0])(fused)
    if options.rule in (Rule.LEAST_SQUARES, Rule.REPAIR):
        _refit(fused, reference, counterparts, weights, options, progress)
    return fused


def _counterpart(
    reference: Task, task: Task, pairs: Sequence[Pair], spaces: Sequence[Space], weight: float, options: FuseOptions
) -> Counterpart:
    surplus = [s for s in find_steps(task.model) if all(s.cut != pair.second.cut for pair in pairs)]
    if surplus and options.rule == Rule.LEAST_SQUARES:
        return _deeper_teacher(reference, task, pairs, spaces, options)
    structure, added = _to_depth(reference, task, pairs, surplus, options)
    found = correspond(reference.model, structure, same_sizes=False)
    if found.stopped:
        raise ModelError(f"{task.path} and {reference.path} differ in more than depth and width: {found.stopped[0]}")
    theirs = matching_spaces(spaces, find_spaces(structure).spaces, found.constants)
    partner = MappedPartner(structure, found.values, found.constants, theirs, weight=weight)
    solve = partial(transport, regularisation=options.entropy)
    if options.match == Matching.WEIGHTS:
        maps = match_by_weights(reference.model, spaces, partner, solve)
    else:
        places = _places(reference, spaces, found.values)
        statistics = _statistics(reference, task, structure, found.values, places, options)
        measure = distance_cost if options.rule == Rule.TRANSPORT else correlation_cost
        maps = match_by_activations(spaces, partner, statistics, measure, solve)
    partner = replace(partner, maps=maps)
    teacher = task.model if surplus else structure
    known = {v.name for v in (*teacher.graph.inputs, *(o for node in teacher.graph for o in node.outputs))}
    values = {ours: name for ours, name in found.values.items() if name in known and name not in added}
    orders, forward = target_channels(reference.model, partner, spaces)
    return Counterpart(task, teacher, values, orders, forward, partner)


def _deeper_teacher(
    reference: Task, task: Task, pairs: Sequence[Pair], spaces: Sequence[Space], options: FuseOptions
) -> Counterpart:
    """A deeper network teaches what it computes at the steps that have a counterpart, and its outputs."""
    values = dict(zip(reference.inputs, task.inputs, strict=True)) | dict(
        zip(reference.outputs, task.outputs, strict=True)
    )
    values |= {pair.first.cut: pair.second.cut for pair in pairs}
    places = _places(reference, spaces, {pair.first.cut: pair.second.cut for pair in pairs})
    statistics = _statistics(reference, task, task.model, values, places, options)
    orders, maps = {}, {}
    for space in spaces:
        cuts = [slots.name for slots in space.values if slots.name in statistics]
        if not cuts:
            continue
        found = transport(np.sum([correlation_cost(statistics[cut]) for cut in cuts], axis=0), options.entropy)
        for cut in cuts:  # one map for the whole space
            if found.order is None:
                maps[cut] = found.forward
            else:
                orders[cut] = found.order
    return Counterpart(task, task.model, values, orders, maps, None)


def _to_depth(
    reference: Task, task: Task, pairs: Sequence[Pair], surplus: Sequence[Step], options: FuseOptions
) -> tuple[oir.Model, set[str]]:
    """The network in the reference's depth, and the names of values that were only added."""
    ours = {pair.first.cut for pair in pairs}
    missing = [step for step in find_steps(reference.model) if step.cut not in ours]
    if missing and surplus:
        raise ModelError(
            f"{task.path} is deeper than {reference.path} in some stages and shallower in others "
            f"({surplus[0].name!r}, {missing[0].name!r}), so neither can be brought to the other's depth"
        )
    if missing:
        balanced = balance(reference.model, task.model, [(p.first, p.second) for p in pairs], "add").shallow
        before = {o.name for node in task.model.graph for o in node.outputs}
        return balanced, {o.name or "" for node in balanced.graph for o in node.outputs} - before
    if not surplus:
        return task.model, set()
    if any(step.block for step in surplus):
        return _bypass(task, surplus), set()
    flipped = [(p.second, p.first) for p in pairs]
    samples = _feeds(task, task, options)
    collapsed = balance(task.model, reference.model, flipped, "collapse", samples=samples, threads=options.threads)
    return collapsed.deep, set()


def _bypass(task: Task, surplus: Sequence[Step]) -> oir.Model:
    """The network without the `surplus` blocks: what read one reads the step before it. Names stay."""
    model = task.model.clone()
    values = {o.name: o for node in model.graph for o in node.outputs}
    leave = {step.cut for step in surplus}
    before: str | None = None
    for step in find_steps(task.model):
        if step.cut not in leave:
            before = step.cut
        elif before is None:
            raise ModelError(f"{task.path}: its first step {step.name!r} has no counterpart, so it cannot be left out")
        else:
            values[step.cut].replace_all_uses_with(values[before])
    common.RemoveUnusedNodesPass()(model)
    infer_shapes(model)
    return model


def _feeds(task: Task, reader: Task, options: FuseOptions) -> Feeds:
    return task.feeds(task.data.calibration.take(options.samples, options.seed), reader)


def _statistics(
    reference: Task,
    task: Task,
    model: oir.Model,
    values: Mapping[str, str],
    places: Mapping[str, int],
    options: FuseOptions,
) -> dict[str, PairStatistics]:
    owners = (reference, task)
    sizes = {"samples": options.samples, "seed": options.seed}
    return pair_statistics(reference, task, model, owners, values, places, **sizes, threads=options.threads)


def _places(reference: Task, spaces: Sequence[Space], values: Mapping[str, str]) -> dict[str, int]:
    """The channel axis of each pre-activation and step's end of ours, among `values`, that one space fills in order."""
    wanted = {layer.pre_activation.name for layer in find_layers(reference.model)}
    wanted |= {step.cut for step in find_steps(reference.model)}
    return {
        slots.name: slots.axes[0]
        for space in spaces
        for slots in space.values
        if slots.name in wanted
        and slots.name in values
        and len(slots.axes) == 1
        and slots.index.shape == (space.size, 1)
    }


def _refit(
    fused: oir.Model,
    reference: Task,
    counterparts: Sequence[Counterpart],
    weights: Sequence[float],
    options: FuseOptions,
    progress: Progress,
) -> None:
    """Refit the fused network layer by layer towards all networks, in place."""
    names = [v.name or "" for v in fused.graph.inputs] + [o.name or "" for node in fused.graph for o in node.outputs]
    teachers = {reference.name: _teacher(reference, reference, reference.model, {n: n for n in names}, options)}
    for own in counterparts:
        teacher = _teacher(own.task, reference, own.teacher, own.values, options)
        teachers[own.task.name] = replace(teacher, orders=own.orders, maps=own.maps)

    def solve(layer: Layer, statistics: Sequence[Regression], current: np.ndarray) -> np.ndarray:
        if options.rule == Rule.REPAIR:
            return solve_repair(statistics, current)
        return solve_least_squares(statistics, current, weights, options.ridge)

    cuts = [step.cut for step in find_steps(fused)]
    compensate = options.rule == Rule.LEAST_SQUARES
    Refit(
        teachers,
        cuts,
        solve,
        compensate=compensate,
        seed=options.seed,
        threads=options.threads,
        progress=progress.advance,
    )(fused)


def _teacher(task: Task, reader: Task, model: oir.Model, values: Mapping[str, str], options: FuseOptions) -> Teacher:
    split = task.data.calibration.take(options.samples, options.seed)
    return Teacher(model, task.feeds(split, task), task.feeds(split, reader), len(split), values)
