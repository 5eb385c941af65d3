"""Another network as the reference sees it: brought to its depth, matched node by node, its channels mapped to ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as oir
from onnx_ir.passes import common

from onnxmerge.errors import ModelError
from onnxmerge.ir.compose import value_names
from onnxmerge.ir.correspond import correspond
from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.shapes import infer_shapes
from onnxmerge.ir.spaces import Slots, Space, find_spaces
from onnxmerge.ir.stages import Step, find_steps
from onnxmerge.methods.align import Pair
from onnxmerge.methods.fuse.balance import balance
from onnxmerge.methods.fuse.choices import Balance, Matching, Rule, Targets
from onnxmerge.methods.pairs import pair_statistics
from onnxmerge.methods.task import Task
from onnxmerge.passes.channel_map import ChannelMap, MappedPartner, matching_spaces, target_channels
from onnxmerge.passes.match_channels import (
    correlation_cost,
    distance_cost,
    match_by_activations,
    match_by_weights,
    transport,
)
from onnxmerge.runtime.statistics import PairStatistics

RIDGE = 1e-3
"""Default lambda: on one task a network's own activations are close to its teachers', and less of a pull is needed."""


@dataclass(frozen=True)
class FuseOptions:
    """How networks are fused.

    Attributes:
        rule: least squares, the average (assignment where widths agree, else exact transport), OTFusion's transport as
            published (Euclidean distances of pre-activations), MTZ's Hessian rule, or the average repaired.
        balance: what becomes of layers without a counterpart. Of the reference: `add` gives the other network an
            identity there, `keep` leaves them the reference's own. Of the other: where the rule mixes weights they are
            collapsed, or left out when they are residual blocks; least squares looks only at what they lead to.
        match: compare channels by activations or by weights, or leave them in their order.
        entropy: regularisation of optimal transport, relative to the median cost; 0 is exact.
        targets: what least squares fits a channel to: the mean of matched channels, or, space by space, those channels
            of all networks that say most about what all of them read.
        ridge: lambda of least squares.
        samples: unlabelled samples of each network's data.
        seed: of samples and positions.
        threads: for onnxruntime.
    """

    rule: Rule = Rule.LEAST_SQUARES
    balance: Balance = Balance.ADD
    match: Matching = Matching.ACTIVATIONS
    entropy: float = 0.0
    targets: Targets = Targets.SELECTED
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
        spaces: by our spaces those of the teacher that do their job.
    """

    task: Task
    teacher: oir.Model
    values: Mapping[str, str]
    orders: Mapping[str, np.ndarray]
    maps: Mapping[str, np.ndarray]
    partner: MappedPartner | None
    spaces: Mapping[str, Space]


def reference_itself(reference: Task, spaces: Sequence[Space]) -> Counterpart:
    """The reference as its own counterpart."""
    model = reference.model
    values = {name: name for name in value_names(model)}
    same = {space.name: space for space in spaces}
    constants = {name: name for name in model.graph.initializers}
    maps = {space.name: ChannelMap.from_permutation(np.arange(space.size)) for space in spaces}
    return Counterpart(reference, model, values, {}, {}, MappedPartner(model, values, constants, same, maps), same)


def mapped_spaces(model: oir.Model) -> list[Space]:
    """The spaces whose channels are mapped; whole blocks (heads, groups) stay in their place."""
    return [space for space in find_spaces(model).permutable() if not space.blocks]


def find_counterpart(
    reference: Task, task: Task, pairs: Sequence[Pair], spaces: Sequence[Space], options: FuseOptions
) -> Counterpart:
    """Bring `task` to the reference's depth and map its channels.

    Args:
        reference: whose architecture the result has.
        task: another network of the same task.
        pairs: its layer map (first: the reference's).
        spaces: the reference's `mapped_spaces`.
        options: how.

    Raises:
        ModelError: it cannot be brought to the reference's depth, or its structure differs in more than that.
    """
    surplus = surplus_steps(task, pairs)
    if surplus and options.rule == Rule.LEAST_SQUARES:
        return _deeper_teacher(reference, task, pairs, spaces, options)
    structure, added = _to_depth(reference, task, pairs, surplus, options)
    partner = matched_partner(reference, task, structure, spaces)
    if options.match == Matching.NONE:
        maps = _in_order(spaces, partner)
    elif options.match == Matching.WEIGHTS:
        maps = match_by_weights(reference.model, spaces, partner, _solver(options))
    else:
        places = _places(reference, spaces, partner.values)
        measure = distance_cost if options.rule == Rule.TRANSPORT else correlation_cost
        statistics = _statistics(reference, task, structure, partner.values, places, options)
        maps = match_by_activations(spaces, partner, statistics, measure, _solver(options))
    partner = replace(partner, maps=maps)
    teacher = task.model if surplus else structure
    if options.balance == Balance.KEEP:
        own = task.model.graph.initializers
        partner = replace(partner, constants={a: b for a, b in partner.constants.items() if b in own})
    unknown = added if options.balance == Balance.KEEP else set()
    known = {v.name for v in (*teacher.graph.inputs, *(o for node in teacher.graph for o in node.outputs))} - unknown
    values = {ours: name for ours, name in partner.values.items() if name in known}
    orders, forward = target_channels(reference.model, partner, spaces)
    return Counterpart(task, teacher, values, orders, forward, partner, {} if surplus else partner.spaces)


def matched_partner(reference: Task, task: Task, structure: oir.Model, spaces: Sequence[Space]) -> MappedPartner:
    """`structure`, the task's network in the reference's depth, matched with it node by node; without maps.

    Raises:
        ModelError: they do not match, or a channel space has no counterpart.
    """
    found = correspond(reference.model, structure, same_sizes=False)
    if found.stopped:
        raise ModelError(f"{task.path} and {reference.path} differ in more than depth and width: {found.stopped[0]}")
    theirs = matching_spaces(spaces, find_spaces(structure).spaces, found.constants)
    return MappedPartner(structure, found.values, found.constants, theirs)


def surplus_steps(task: Task, pairs: Sequence[Pair]) -> list[Step]:
    """The steps of `task` that have no counterpart in the reference."""
    matched = {pair.second.cut for pair in pairs}
    return [step for step in find_steps(task.model) if step.cut not in matched]


def with_added_steps(reference: Task, task: Task, pairs: Sequence[Pair]) -> oir.Model:
    """The task's network with identities added for the reference's steps that it lacks; the same function.

    Raises:
        ModelError: it has surplus steps itself, or no identity can be added where one is missing.
    """
    surplus, missing = surplus_steps(task, pairs), _missing_steps(reference, pairs)
    if surplus and missing:
        raise ModelError(
            f"{task.path} is deeper than {reference.path} in some stages and shallower in others "
            f"({surplus[0].name!r}, {missing[0].name!r}), so neither can be brought to the other's depth"
        )
    if surplus:
        raise ModelError(f"{task.path} is deeper than {reference.path}: {surplus[0].name!r} has no counterpart")
    if not missing:
        return task.model
    return balance(reference.model, task.model, [(p.first, p.second) for p in pairs], "add").shallow


def _missing_steps(reference: Task, pairs: Sequence[Pair]) -> list[Step]:
    ours = {pair.first.cut for pair in pairs}
    return [step for step in find_steps(reference.model) if step.cut not in ours]


def _solver(options: FuseOptions) -> partial[ChannelMap]:
    return partial(transport, regularisation=options.entropy, published=options.rule == Rule.TRANSPORT)


def _in_order(spaces: Sequence[Space], partner: MappedPartner) -> dict[str, ChannelMap]:
    for space in spaces:
        if partner.spaces[space.name].size != space.size:
            raise ModelError(
                f"channel space {space.name!r} has {space.size} channels in one network and "
                f"{partner.spaces[space.name].size} in the other: they cannot stay in their order"
            )
    return {space.name: ChannelMap.from_permutation(np.arange(space.size)) for space in spaces}


def _deeper_teacher(
    reference: Task, task: Task, pairs: Sequence[Pair], spaces: Sequence[Space], options: FuseOptions
) -> Counterpart:
    """A deeper network teaches what it computes at the steps that have a counterpart, and its head."""
    values = dict(zip(reference.inputs, task.inputs, strict=True)) | _heads(reference.model, task.model)
    values |= _followed(reference.model, task.model, {pair.first.cut: pair.second.cut for pair in pairs})
    places = _places(reference, spaces, {pair.first.cut: pair.second.cut for pair in pairs})
    statistics = _statistics(reference, task, task.model, values, places, options)
    theirs = _spaces_of_cuts(spaces, find_spaces(task.model).spaces, {name: values[name] for name in places})
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
    return Counterpart(task, task.model, values, orders, maps, None, theirs)


def _followed(ours: oir.Model, theirs: oir.Model, cuts: Mapping[str, str]) -> dict[str, str]:
    """The cuts, and what the same operators without weights make of them in both networks."""
    found = dict(cuts)
    after = {o.name: o for node in theirs.graph for o in node.outputs}
    for node in ours.graph:
        source = _only_source(node, alone=False)
        if source is None or source.name not in found or len(node.outputs) != 1:
            continue
        for other, _ in after[found[source.name]].uses():
            if other.op_type == node.op_type and _only_source(other, alone=False) is not None:
                found.setdefault(node.outputs[0].name or "", other.outputs[0].name or "")
    return found


def _spaces_of_cuts(ours: Sequence[Space], theirs: Sequence[Space], cuts: Mapping[str, str]) -> dict[str, Space]:
    """For each of our spaces the one of theirs that fills all of its cuts alone, channel by channel."""
    found: dict[str, Space] = {}
    for space in ours:
        names = [cuts[slots.name] for slots in space.values if slots.name in cuts]
        holders = [own for own in theirs if not own.blocks and any(own.value(name) is not None for name in names)]
        if len(holders) == 1 and all(_fills(holders[0].value(name)) for name in names):
            found[space.name] = holders[0]
    return found


def _fills(slots: Slots | None) -> bool:
    return slots is not None and len(slots.axes) == 1 and np.array_equal(slots.index.ravel(), range(len(slots.index)))


def _heads(ours: oir.Model, theirs: oir.Model) -> dict[str, str]:
    """The outputs of both networks, and what leads to them by the same operators in a row, such as logits."""
    found: dict[str, str] = {}
    for first, second in zip(ours.graph.outputs, theirs.graph.outputs, strict=True):
        a: oir.Value | None = first
        b: oir.Value | None = second
        while a is not None and b is not None:
            found[a.name or ""] = b.name or ""
            nodes = a.producer(), b.producer()
            if nodes[0] is None or nodes[1] is None or nodes[0].op_type != nodes[1].op_type:
                break
            a, b = _only_source(nodes[0]), _only_source(nodes[1])
    return found


def _only_source(node: oir.Node, *, alone: bool = True) -> oir.Value | None:
    """What the node reads, when that is one value, which (`alone`) nothing else reads."""
    sources = [v for v in node.inputs if v is not None]
    return sources[0] if len(sources) == 1 and (not alone or len(sources[0].uses()) == 1) else None


def _to_depth(
    reference: Task, task: Task, pairs: Sequence[Pair], surplus: Sequence[Step], options: FuseOptions
) -> tuple[oir.Model, set[str]]:
    """The network in the reference's depth, and the names of values that were only added."""
    if _missing_steps(reference, pairs):
        balanced = with_added_steps(reference, task, pairs)
        before = {o.name for node in task.model.graph for o in node.outputs}
        return balanced, {o.name or "" for node in balanced.graph for o in node.outputs} - before
    if not surplus:
        return task.model, set()
    if any(step.block for step in surplus):
        return _bypass(task, surplus), set()
    flipped = [(p.second, p.first) for p in pairs]
    samples = task.feeds(task.data.calibration.take(options.samples, options.seed), task)
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
    return pair_statistics(
        reference, task, model, owners, values, places, **sizes, threads=options.threads, within=False
    )


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
