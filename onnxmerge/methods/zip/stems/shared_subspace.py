"""A stem in the shared subspace of its networks: each of its spaces a linear map of all their channels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.space import Space
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.ir.weights import get_array, set_array
from onnxmerge.methods.task import Task
from onnxmerge.methods.zip.alignment import Aligned, Cut, Sharable
from onnxmerge.methods.zip.fitting import Fitting, least_squares
from onnxmerge.methods.zip.stems.subspaces import Choice, SharedSpace, View, find_subspaces
from onnxmerge.methods.zip.stems.tails import Stem
from onnxmerge.methods.zip.stems.union import Union, join_networks
from onnxmerge.methods.zip.structure import Widths, stem_of
from onnxmerge.passes.attach_tails import SHARED
from onnxmerge.passes.channel_map import ChannelMap, MappedPartner
from onnxmerge.passes.map_channels import MapChannels
from onnxmerge.passes.refit import Refit, Teacher
from onnxmerge.passes.split_off import SplitOff

_RIDGE = 1e-3

Views = Mapping[str, View]
"""By space, channels of a network in terms of all networks' channels."""


def fuse_subspace(
    sharable: Sharable,
    aligned: Mapping[str, Aligned],
    tasks: Sequence[Task],
    cut: Cut,
    widths: Widths,
    known: dict[Choice, SharedSpace],
    fitting: Fitting,
) -> Stem:
    """Put the shared channels' weights together from the networks' own, then refit every layer towards Q u + c.

    Args:
        sharable: what the networks have in common.
        aligned: the other networks' channel alignment.
        tasks: the networks with their samples.
        cut: where the stem ends.
        widths: how many channels are shared in each space, and how many more each task has.
        known: see `find_subspaces`.
        fitting: samples, seed, weights of the tasks.

    Raises:
        ModelError: a space cannot get another width, or none of its channels can be private.
    """
    union = join_networks(sharable, tasks, cut)
    spaces = find_subspaces(
        union,
        tasks,
        aligned,
        {space.name: widths.shared.get(space.name, space.size) for space in union.spaces},
        widths.private,
        {task.name: fitting.weight(number) for number, task in enumerate(tasks)},
        known,
        samples=fitting.samples,
        seed=fitting.seed,
        threads=fitting.threads,
    )
    stem = _mapped(sharable, union, cut, {name: own.shared for name, own in spaces.items()})
    wholes = {
        name: _mapped(sharable, union, cut, {space: own.tasks[name] for space, own in spaces.items()})
        for name in (union.names if widths.private else ())
    }
    counts = {name: len(own.shared.subspace.mix) for name, own in spaces.items()}
    sides = {name: SplitOff(counts, stem.model)(whole.model).model for name, whole in wholes.items()}
    (last,) = (space for space in union.spaces if space.value(cut.value) is not None)
    adapters = {name: spaces[last.name].tasks[name].back[union.own(name, last)] for name in union.names}
    found = Stem(stem.model, adapters, sides)
    parts = {"": stem} if not sides else {SHARED: stem} | {f"{name}/": whole for name, whole in wholes.items()}
    _refit(found, _teachers(union, tasks, parts, counts, fitting), sharable, cut, fitting)
    return found


@dataclass(frozen=True)
class _Part:
    """A network that computes channels of the union: the stem, or a stem with one task's private channels."""

    model: oir.Model
    views: Views
    spaces: Sequence[Space]


def _mapped(sharable: Sharable, union: Union, cut: Cut, views: Views) -> _Part:
    """The reference's stem with the channels of `views`, its weights put together from those of all networks."""
    model = stem_of(sharable, cut, {name: len(view.subspace.mix) for name, view in views.items()})
    own = [space for space in find_spaces(model, frozenset([cut.value])).spaces if space.name in views]
    partners = []
    for name in union.names:
        columns = {space.name: union.own(name, space) for space in union.spaces}
        maps = {s: ChannelMap(v.subspace.mix[:, columns[s]], v.back[columns[s]]) for s, v in views.items()}
        theirs, found = union.stems[name], sharable.partners.get(name)
        values = {} if found is None else found.values
        constants = {c: c for c in theirs.graph.initializers} if found is None else found.constants
        partners.append(MappedPartner(theirs, values, constants, union.theirs[name], maps))
    MapChannels(partners, own)(model)
    return _Part(model, views, own)


def _teachers(
    union: Union, tasks: Sequence[Task], parts: Mapping[str, _Part], counts: Mapping[str, int], fitting: Fitting
) -> dict[str, Teacher]:
    """One for each set of data: the joined networks, whose channels are mapped to those of the parts.

    Private channels are those of the tasks that the data are of.
    """
    names, maps, shifts = {}, {}, {}
    for prefix, part in parts.items():
        for value in union.joined:
            made = _value_map(union, value, part)
            if prefix not in ("", SHARED):
                kept = _private_rows(value, part, counts, len(made[0]))
                made = made[0][kept], made[1][kept]
            if len(made[0]):
                names[prefix + value] = value
                maps[prefix + value], shifts[prefix + value] = made
    names |= {v.name or "": v.name or "" for v in union.model.graph.inputs}
    teachers: dict[str, Teacher] = {}
    for task in {id(task.data): task for task in reversed(tasks)}.values():
        others = tuple(f"{other.name}/" for other in tasks if other.data is not task.data and f"{other.name}/" in parts)
        split = task.data.calibration.take(fitting.samples, fitting.seed)
        samples = task.feeds(split, tasks[0])
        own = {ours: theirs for ours, theirs in names.items() if not ours.startswith(others)}
        teachers[task.name] = Teacher(union.model, samples, samples, len(split), own, maps=maps, shifts=shifts)
    return teachers


def _value_map(union: Union, name: str, part: _Part) -> tuple[np.ndarray, np.ndarray]:
    """[ours, n] and [ours]: what of the joined value a part's value `name` is to be.

    Channels of no space are the mean over the networks.
    """
    sizes = [union.size(network, name) for network in union.names]
    inside = [(space, slots) for space in part.spaces if (slots := space.value(name)) is not None]
    originals = {space.name: space.size for space in union.spaces}
    width = sizes[0] + sum(slots.index.size - originals[s.name] * slots.index.shape[1] for s, slots in inside)
    matrix = np.zeros((width, sum(sizes)), np.float32)
    if len(set(sizes)) == 1:
        matrix = np.concatenate([np.eye(width, sizes[0], dtype=np.float32)] * len(sizes), axis=1) / len(sizes)
    shift = np.zeros(width, np.float32)
    for space, slots in inside:
        subspace = part.views[space.name].subspace
        columns = union.columns(name, next(own for own in union.spaces if own.name == space.name))
        for own, theirs in zip(slots.index.T, columns.T, strict=True):
            matrix[own] = 0
            matrix[np.ix_(own, theirs)] = subspace.mix
            shift[own] = subspace.shift
    return matrix, shift


def _private_rows(name: str, whole: _Part, counts: Mapping[str, int], size: int) -> np.ndarray:
    """Which channels of a value of the whole network are private: in spaces that have some, those behind the shared."""
    kept = np.zeros(size, bool)
    for space in whole.spaces:
        slots = space.value(name)
        if slots is not None and counts[space.name] < space.size:
            kept[slots.index[counts[space.name] :]] = True
    return kept


def _refit(stem: Stem, teachers: Mapping[str, Teacher], sharable: Sharable, cut: Cut, fitting: Fitting) -> None:
    """Refit the stem and the sides together, in place."""
    student = stem.beside(list(stem.sides))
    cuts = [other.unit.cut for other in sharable.before(cut)]
    beside: dict[str, list[str]] = {}
    if stem.sides:
        computed = {output.name for node in student.graph for output in node.outputs}
        beside = {f"{SHARED}{own}": [n for t in stem.sides if (n := f"{t}/{own}") in computed] for own in cuts}
        cuts = list(beside)
    Refit(
        teachers,
        cuts,
        least_squares(len(teachers), _RIDGE),
        beside=beside,
        seed=fitting.seed,
        threads=fitting.threads,
        progress=fitting.progress.advance,
    )(student)
    if not stem.sides:
        return  # the student was the stem itself
    for prefix, model in {SHARED: stem.model, **{f"{name}/": side for name, side in stem.sides.items()}}.items():
        for name, value in model.graph.initializers.items():
            if prefix + name in student.graph.initializers:
                set_array(value, get_array(student.graph.initializers[prefix + name]))
