"""Fuse networks of one task on models in memory: the rule that makes one set of weights, or one network kept.

The result has the graph of one of them, the *reference*. Every other network has a counterpart in it (see
`counterparts`); then a rule makes one set of weights. Or the hidden layers of one network are kept as they are, and
only what makes the outputs is fitted towards all.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.layers import Layer, find_layers
from onnxmerge.ir.stages import find_steps
from onnxmerge.ir.weights import set_array
from onnxmerge.methods.align import Pair
from onnxmerge.methods.fuse.choices import Rule, Targets
from onnxmerge.methods.fuse.counterparts import (
    Counterpart,
    FuseOptions,
    find_counterpart,
    mapped_spaces,
    matched_partner,
    reference_itself,
    with_added_steps,
)
from onnxmerge.methods.fuse.selecting import Chooser, greedily, select
from onnxmerge.methods.progress import Progress
from onnxmerge.methods.task import Feeds, Task
from onnxmerge.passes.channel_map import ChannelMap, transported_arrays
from onnxmerge.passes.least_squares import solve_by_channel, solve_repair
from onnxmerge.passes.mtz import HessianAverage
from onnxmerge.passes.refit import Refit, Teacher
from onnxmerge.passes.take_channels import TakeChannels
from onnxmerge.passes.transport import TransportAverage
from onnxmerge.runtime.statistics import Regression


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
    return fuse_counterparts(
        reference, find_counterparts(reference, others, layer_maps, options), weights, options, progress
    )


def find_counterparts(
    reference: Task, others: Sequence[Task], layer_maps: Sequence[Sequence[Pair]], options: FuseOptions
) -> list[Counterpart]:
    """The others as the reference sees them."""
    spaces = mapped_spaces(reference.model)
    return [
        find_counterpart(reference, task, pairs, spaces, options)
        for task, pairs in zip(others, layer_maps, strict=True)
    ]


def fuse_counterparts(
    reference: Task,
    counterparts: Sequence[Counterpart],
    weights: Sequence[float],
    options: FuseOptions,
    progress: Progress,
    choose: Chooser = greedily,
) -> oir.Model:
    """`fuse_networks` for networks that are aligned; they may be fused several times, by several weights.

    `choose` says which channels are selected, where the rule selects some.
    """
    spaces = mapped_spaces(reference.model)
    members = [reference_itself(reference, spaces), *counterparts]
    selected = options.rule == Rule.LEAST_SQUARES and options.targets == Targets.SELECTED
    if selected:
        members = select(members, spaces, weights, options, choose)
    partners = [
        replace(member.partner, weight=weight)
        for member, weight in zip(members, weights, strict=True)
        if member.partner is not None and weight
    ]
    fused = reference.model.clone()
    if selected:
        TakeChannels(partners, spaces)(fused)
    elif options.rule == Rule.MTZ:
        feeds = [_feeds(member.task, member.task, options) for member in members]
        others = partners[1:] if weights[0] else partners
        HessianAverage(others, spaces, feeds, len(feeds[0]), weights[0], seed=options.seed, threads=options.threads)(
            fused
        )
    else:
        TransportAverage(partners[1:] if weights[0] else partners, spaces, weights[0])(fused)
    if options.rule in (Rule.LEAST_SQUARES, Rule.REPAIR):
        _refit(fused, members, weights, options, progress)
    return fused


def kept_network(reference: Task, task: Task, pairs: Sequence[Pair]) -> oir.Model:
    """The network of `task` as it is, in the reference's graph: identities in place of the layers that it lacks, and
    channels that are zero in place of those. Exact where zero channels do nothing, as before a ReLU.

    Args:
        reference: whose graph the result has.
        task: the network; it may be the reference.
        pairs: its layer map (first: the reference's).

    Raises:
        ModelError: it does not fit into the reference.
    """
    if task is reference:
        return reference.model.clone()
    spaces = mapped_spaces(reference.model)
    partner = matched_partner(reference, task, with_added_steps(reference, task, pairs), spaces)
    maps = {}
    for space in spaces:
        theirs = partner.spaces[space.name].size
        if theirs > space.size:
            raise ModelError(f"{task.path} is wider than {reference.path} in the channel space {space.name!r}")
        maps[space.name] = ChannelMap(np.eye(space.size, theirs), np.eye(theirs, space.size))
    kept = reference.model.clone()
    for name, array in transported_arrays(reference.model, replace(partner, maps=maps), spaces).items():
        set_array(kept.graph.initializers[name], array)
    return kept


def refit_heads(
    model: oir.Model,
    reference: Task,
    counterparts: Sequence[Counterpart],
    weights: Sequence[float],
    options: FuseOptions,
    progress: Progress,
) -> None:
    """Fit the layers of `model`, which has the reference's graph, that no layer follows towards all, in place."""
    heads = [layer.linear.name or "" for layer in _last_layers(model)]
    members = [reference_itself(reference, []), *counterparts]
    inputs = [value.name or "" for value in model.graph.inputs]
    limited = [replace(own, values={n: own.values[n] for n in (*inputs, *heads) if n in own.values}) for own in members]
    _refit(model, limited, weights, options, progress)


def _last_layers(model: oir.Model) -> list[Layer]:
    layers = {layer.node: layer for layer in find_layers(model)}
    followed: set[oir.Value | None] = set()
    for node in reversed(model.graph):
        if node in layers or any(output in followed for output in node.outputs):
            followed |= set(node.inputs)
    return [layer for layer in layers.values() if layer.linear not in followed]


def _refit(
    fused: oir.Model,
    members: Sequence[Counterpart],
    weights: Sequence[float],
    options: FuseOptions,
    progress: Progress,
) -> None:
    """Refit the fused network layer by layer towards all networks, in place."""
    heard = [(member, weight) for member, weight in zip(members, weights, strict=True) if weight]
    reader = members[0].task
    shared: dict[int, Feeds] = {}
    for member, _ in heard:  # what the fused network makes of the same samples is worked out once
        shared.setdefault(id(member.task.data), _feeds(member.task, reader, options))
    teachers = {
        member.task.name: Teacher(
            member.teacher,
            _feeds(member.task, member.task, options),
            shared[id(member.task.data)],
            len(shared[id(member.task.data)]),
            member.values,
            orders=member.orders,
            maps=member.maps,
        )
        for member, _ in heard
    }

    def solve(layer: Layer, statistics: Sequence[Regression], current: np.ndarray) -> np.ndarray:
        if options.rule == Rule.REPAIR:
            return solve_repair(statistics, current)
        taken = [_taken(member, layer) for member, _ in heard]
        return solve_by_channel(statistics, current, [weight for _, weight in heard], taken, options.ridge)

    Refit(
        teachers,
        [step.cut for step in find_steps(fused)],
        solve,
        compensate=options.rule == Rule.LEAST_SQUARES,
        seed=options.seed,
        threads=options.threads,
        progress=progress.advance,
    )(fused)


def _taken(member: Counterpart, layer: Layer) -> np.ndarray:
    """[channels] whether a layer's channel has a target in this network."""
    name = layer.linear.name or ""
    if name not in member.maps:
        return np.ones(layer.out_channels, bool)
    return np.asarray(member.maps[name].any(axis=1))


def _feeds(task: Task, reader: Task, options: FuseOptions) -> Feeds:
    return task.feeds(task.data.calibration.take(options.samples, options.seed), reader)
