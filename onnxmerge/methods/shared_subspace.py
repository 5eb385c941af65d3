"""A stem in the shared subspace of its networks: each of its spaces a linear map of all their channels."""

from collections.abc import Mapping, Sequence

import numpy as np

from onnxmerge.ir.spaces import Space, find_spaces
from onnxmerge.methods.alignment import Aligned, Cut, Sharable
from onnxmerge.methods.fitting import Fitting, least_squares
from onnxmerge.methods.structure import stem_of
from onnxmerge.methods.subspaces import find_subspaces
from onnxmerge.methods.tails import Stem
from onnxmerge.methods.task import Task
from onnxmerge.methods.union import Union, join_networks
from onnxmerge.passes.channel_map import ChannelMap, MappedPartner
from onnxmerge.passes.map_channels import MapChannels
from onnxmerge.passes.refit import Refit, Teacher
from onnxmerge.passes.subspace import Subspace

_RIDGE = 1e-3

Shared = Mapping[str, tuple[Subspace, np.ndarray]]
"""By space: what is shared, and [n, shared] how the channels of all networks are predicted from it."""


def fuse_subspace(
    sharable: Sharable,
    aligned: Mapping[str, Aligned],
    tasks: Sequence[Task],
    cut: Cut,
    channels: Mapping[str, int],
    fitting: Fitting,
) -> Stem:
    """Put the shared channels' weights together from the networks' own, then refit every layer towards Q u + c.

    Args:
        sharable: what the networks have in common.
        aligned: the other networks' channel alignment.
        tasks: the networks with their samples.
        cut: where the stem ends.
        channels: by space, how many are shared where not as many as the reference has.
        fitting: samples, seed, weights of the tasks.

    Raises:
        ModelError: a space cannot get another width.
    """
    union = join_networks(sharable, tasks, cut)
    widths = {space.name: channels.get(space.name, space.size) for space in union.spaces}
    weights = {task.name: fitting.weight(number) for number, task in enumerate(tasks)}
    shared = find_subspaces(
        union, tasks, aligned, widths, weights, samples=fitting.samples, seed=fitting.seed, threads=fitting.threads
    )
    stem = stem_of(sharable, cut, channels)
    spaces = [space for space in find_spaces(stem, frozenset([cut.unit.cut])).permutable() if not space.blocks]
    MapChannels(_partners(sharable, union, shared), spaces)(stem)
    Refit(
        _teachers(union, tasks, shared, spaces, fitting),
        [other.unit.cut for other in sharable.cuts[: sharable.cuts.index(cut)]],
        least_squares(len({id(task.data) for task in tasks}), _RIDGE),
        seed=fitting.seed,
        threads=fitting.threads,
        progress=fitting.progress.advance,
    )(stem)
    return Stem(stem, _adapters(union, cut, shared))


def _partners(sharable: Sharable, union: Union, shared: Shared) -> list[MappedPartner]:
    partners = []
    for name in union.names:
        maps = {}
        for space in union.spaces:
            subspace, back = shared[space.name]
            columns = _columns(union, name, space)
            maps[space.name] = ChannelMap(subspace.mix[:, columns], back[columns])
        model = union.stems[name]
        found = sharable.partners.get(name)
        values = {} if found is None else found.values
        constants = {c: c for c in model.graph.initializers} if found is None else found.constants
        partners.append(MappedPartner(model, values, constants, union.theirs[name], maps))
    return partners


def _columns(union: Union, network: str, space: Space) -> slice:
    sizes = [union.theirs[name][space.name].size for name in union.names]
    place = union.names.index(network)
    return slice(sum(sizes[:place]), sum(sizes[: place + 1]))


def _teachers(
    union: Union, tasks: Sequence[Task], shared: Shared, spaces: Sequence[Space], fitting: Fitting
) -> dict[str, Teacher]:
    """One for each set of data: the joined networks, whose channels are mapped to the shared ones."""
    maps, shifts = {}, {}
    for name in union.joined:
        maps[name], shifts[name] = _value_map(union, name, shared, spaces)
    names = {name: name for name in union.joined} | {v.name or "": v.name or "" for v in union.model.graph.inputs}
    teachers: dict[str, Teacher] = {}
    for task in {id(task.data): task for task in reversed(tasks)}.values():
        split = task.data.calibration.take(fitting.samples, fitting.seed)
        samples = task.feeds(split, tasks[0])
        teacher = Teacher(union.model, samples, samples, len(split), names, maps=maps, shifts=shifts)
        teachers[task.name] = teacher
    return teachers


def _value_map(union: Union, name: str, shared: Shared, spaces: Sequence[Space]) -> tuple[np.ndarray, np.ndarray]:
    """[shared, n] and [shared]: what of the joined value the stem's value `name` is to be.

    Channels of no space are the mean over the networks.
    """
    sizes = [union.size(network, name) for network in union.names]
    inside = [(space, slots) for space in spaces if (slots := space.value(name)) is not None]
    width = sizes[0] + sum(shared[s.name][0].mix.shape[0] - s.size for s, _ in inside)
    if len(set(sizes)) == 1:
        matrix = np.concatenate([np.eye(width, sizes[0])] * len(sizes), axis=1) / len(sizes)
    else:
        matrix = np.zeros((width, sum(sizes)))
    shift = np.zeros(width)
    for space, slots in inside:
        subspace = shared[space.name][0]
        columns = union.columns(name, space)
        for own, theirs in zip(slots.index.T, columns.T, strict=True):
            matrix[own] = 0
            matrix[np.ix_(own, theirs)] = subspace.mix
            shift[own] = subspace.shift
    return matrix.astype(np.float32), shift.astype(np.float32)


def _adapters(union: Union, cut: Cut, shared: Shared) -> dict[str, np.ndarray]:
    (space,) = (space for space in union.spaces if space.value(cut.unit.cut) is not None)
    back = shared[space.name][1]
    return {name: back[_columns(union, name, space)] for name in union.names}
