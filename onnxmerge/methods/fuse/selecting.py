"""Which channels of which network a fused network gets: chosen space by space from all networks' activations."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as oir
from scipy.linalg import block_diag

from onnxmerge.ir.layers import Layer, find_layers
from onnxmerge.ir.spaces import Slots, Space
from onnxmerge.ir.weights import get_array
from onnxmerge.methods.fuse.counterparts import Counterpart, FuseOptions
from onnxmerge.methods.pairs import walk
from onnxmerge.passes.channel_map import ChannelMap, target_channels
from onnxmerge.passes.select_channels import Reading, predictions, select_channels
from onnxmerge.runtime.activations import Arrays
from onnxmerge.runtime.heap import return_memory
from onnxmerge.runtime.patches import Positions, grid_of, output_rows
from onnxmerge.runtime.statistics import Moments

Chooser = Callable[[Space, Reading], Sequence[int]]
"""Says which of the channels of all networks side by side become those of a space: as many as the space has."""


def greedily(space: Space, reading: Reading) -> Sequence[int]:
    """See `select_channels`."""
    return select_channels([reading], space.size)


def select(
    members: Sequence[Counterpart],
    spaces: Sequence[Space],
    weights: Sequence[float],
    options: FuseOptions,
    choose: Chooser = greedily,
) -> list[Counterpart]:
    """The members with orders, maps and partners that give each of our channels to one of them.

    A space that is read nowhere where the others can be looked at keeps the reference's channels.

    Args:
        members: the networks as the reference sees them, the reference itself first.
        spaces: the reference's, without blocks.
        weights: a_t of each.
        options: samples, seed, threads.
        choose: which channels.
    """
    heard = [member for member, weight in zip(members, weights, strict=True) if weight]
    shares = {id(member): weight for member, weight in zip(members, weights, strict=True)}
    places = _places(members[0], heard, spaces)
    unions = {
        space.name: _Union(space, [place for place in places if place.space is space], heard, shares)
        for space in spaces
    }
    maps: dict[int, dict[str, ChannelMap]] = {id(member): {} for member in members}
    unseen = {place.name for place in places}
    for names in _observe(heard, places, options):
        unseen -= set(names)
        for name in list(unions):
            unions[name].add(names)
            if not any(place.name in unseen for place in unions[name].places):
                # statistics are let go as soon as all are there: wide streams have large ones
                for number, found in _share_out(unions.pop(name), members, choose).items():
                    maps[number][name] = found
    return_memory()
    return [_mapped(members[0], member, maps[id(member)], spaces) for member in members]


@dataclass
class _Place:
    """One value of ours, in which a space lies, that layers read, and the members that have a counterpart of it."""

    name: str
    space: Space
    slots: Slots
    members: dict[int, tuple[str, Slots]]
    """By member: the name of its value, and where its channels lie."""
    sums: Moments = field(default_factory=Moments)
    known: bool = True
    """Whether the values have one grid."""


def _places(reference: Counterpart, members: Sequence[Counterpart], spaces: Sequence[Space]) -> list[_Place]:
    inputs = dict.fromkeys(layer.input.name or "" for layer in find_layers(reference.teacher))
    found = []
    for name in inputs:
        for space in spaces:
            slots = space.value(name)
            if slots is None or len(slots.axes) != 1:
                continue
            theirs = {}
            for member in members:
                value = member.values.get(name, "")
                own = member.spaces[space.name].value(value) if space.name in member.spaces else None
                if own is not None and len(own.axes) == 1 and own.index.shape[1] == slots.index.shape[1]:
                    theirs[id(member)] = (value, own)
            if theirs:
                found.append(_Place(name, space, slots, theirs))
    return found


def _observe(members: Sequence[Counterpart], places: Sequence[_Place], options: FuseOptions) -> Iterator[list[str]]:
    """Gather the second moments of all members' channels side by side at each place, on the samples of all.

    Yields the names of the values that are done with, the rest at the end.
    """
    generator = np.random.default_rng(options.seed)
    owners = {id(member.task.data): member.task for member in members}.values()
    feeds = []
    for owner in owners:
        split = owner.data.calibration.take(options.samples, options.seed)
        feeds.append([owner.feeds(split, member.task) for member in members])

    def update(_: int, batches: Sequence[Arrays]) -> None:
        for place in places:
            arrays = [
                (batch[place.name], place.members[id(member)][1])
                for member, batch in zip(members, batches, strict=True)
                if place.name in batch and id(member) in place.members
            ]
            if arrays:
                _add(place, arrays, generator)

    names = list(dict.fromkeys(place.name for place in places))
    models, values = [member.teacher for member in members], [member.values for member in members]
    yield from walk(models, feeds, values, names, update, options.threads)
    yield []


def _add(place: _Place, arrays: Sequence[tuple[np.ndarray, Slots]], generator: np.random.Generator) -> None:
    grids = {grid_of(array, slots.axes[0]) for array, slots in arrays}
    if len(grids) > 1:
        place.known = False
        return
    positions = Positions.sample(generator, grids.pop())
    columns = []
    for array, slots in arrays:
        rows = output_rows(array, slots.axes[0], positions)
        columns.append(np.concatenate([rows[:, slot] for slot in slots.index.T]))  # each slot of a channel is a sample
    place.sums.update(np.concatenate(columns, axis=1))


class _Union:
    """The channels of all networks in one space side by side: what is seen and read of them, over its places.

    Places count alike: each place's covariance is divided by its trace, and what a network reads there is scaled to its
    weight.
    """

    def __init__(
        self, space: Space, places: Sequence[_Place], members: Sequence[Counterpart], shares: Mapping[int, float]
    ):
        self.space, self.places, self._shares = space, places, shares
        self._models = {id(member): member.teacher for member in members}
        self.members = [n for n in self._models if places and all(n in place.members for place in places)]
        """By number, the reference first where it is heard: those that can be looked at in every place."""
        self._covariance: np.ndarray | None = None
        self._roots: dict[int, list[np.ndarray]] = {number: [] for number in self.members}

    def add(self, names: Sequence[str]) -> None:
        """Take in the places at the values `names`, which have been seen to the end."""
        for place in self.places:
            if place.name in names:
                if place.known and self.members:
                    self._add(place)
                place.sums = Moments()

    def reading(self) -> Reading | None:
        """All places together; None where there is none. The weights that read them are used up."""
        if self._covariance is None:
            return None
        parts = [_compact(np.concatenate(self._roots.pop(n), axis=1)).astype(np.float32) for n in self.members]
        return Reading(self._covariance, block_diag(*parts))

    def _add(self, place: _Place) -> None:
        sizes = [len(slots.index) for _, slots in place.members.values()]
        offsets = dict(zip(place.members, np.cumsum([0, *sizes]), strict=False))
        wanted = np.concatenate([offsets[n] + np.arange(len(place.members[n][1].index)) for n in self.members])
        covariance = place.sums.into_covariance()
        if not np.array_equal(wanted, np.arange(len(covariance))):
            covariance = covariance[np.ix_(wanted, wanted)]
        covariance /= max(float(np.trace(covariance)), 1e-30)
        start = 0
        for number in self.members:
            name, slots = place.members[number]
            root, end = reading_root(self._models[number], name, slots), start + len(slots.index)
            spread = float(np.vdot(root, covariance[start:end, start:end] @ root))
            self._roots[number].append(root * (np.sqrt(self._shares[number] / spread) if spread > 0 else 0.0))
            start = end
        if self._covariance is None:
            self._covariance = covariance
        else:
            self._covariance += covariance


def _share_out(union: _Union, members: Sequence[Counterpart], choose: Chooser) -> dict[int, ChannelMap]:
    """The maps of the members that have the space."""
    space, reading = union.space, union.reading()
    sizes = {id(m): m.spaces[space.name].size for m in members if space.name in m.spaces}
    first = id(members[0])
    if reading is None:
        return {n: _nothing(space.size, m) for n, m in sizes.items()} | {
            first: ChannelMap.from_permutation(np.arange(space.size))
        }
    starts = dict(zip(union.members, np.cumsum([0, *(sizes[number] for number in union.members)]), strict=False))
    return_memory()
    chosen = _placed(choose(space, reading), space.size)
    back = predictions([reading], chosen)
    found = {}
    for number, size in sizes.items():
        forward, backward = np.zeros((space.size, size), np.int8), np.zeros((size, space.size), np.int8)
        if number in starts:
            start = starts[number]
            for place, channel in enumerate(chosen):
                if start <= channel < start + size:
                    forward[place, channel - start] = 1
            backward = back[start : start + size].astype(np.float32)
        found[number] = ChannelMap(forward, backward)
    return found


def _nothing(ours: int, theirs: int) -> ChannelMap:
    return ChannelMap(np.zeros((ours, theirs), np.int8), np.zeros((theirs, ours), np.int8))


def _placed(chosen: Sequence[int], count: int) -> list[int]:
    """The reference's own channels in their places, the others in those that are free."""
    stay = {channel for channel in chosen if channel < count}
    others = iter(sorted(set(chosen) - stay))
    return [place if place in stay else next(others) for place in range(count)]


def reading_root(model: oir.Model, name: str, slots: Slots) -> np.ndarray:
    """[channels, r]: L with L L' = sum W W' over the layers that read the value `name`, and over a channel's slots."""
    columns = [np.zeros((len(slots.index), 0))]
    for layer in find_layers(model):
        if layer.input.name == name:
            rows = block_diag(*map(_compact, _matrices(layer)))
            columns += [rows[slot] for slot in slots.index.T]
    return _compact(np.concatenate(columns, axis=1))


def _matrices(layer: Layer) -> list[np.ndarray]:
    """For each group of a layer [inputs, outputs * taps]."""
    weight, groups = get_array(layer.weight).astype(np.float64), layer.groups
    if layer.op == "ConvTranspose":  # [in, out / groups, ...]
        return np.split(weight.reshape(len(weight), -1), groups)
    if layer.op == "Conv":  # [out, in / groups, ...]
        return [np.moveaxis(own, 1, 0).reshape(own.shape[1], -1) for own in np.split(weight, groups)]
    return [weight.T if layer.op == "Gemm" and layer.transposed else weight]


def _compact(matrix: np.ndarray) -> np.ndarray:
    """A matrix with the same product with its own transpose, and no more columns than rows."""
    rows, columns = matrix.shape
    return matrix if columns <= rows else np.asarray(np.linalg.qr(matrix.T, mode="r")).T


def _mapped(
    reference: Counterpart, member: Counterpart, maps: Mapping[str, ChannelMap], spaces: Sequence[Space]
) -> Counterpart:
    if member.partner is not None:
        partner = replace(member.partner, maps=maps)
        orders, forward = target_channels(reference.teacher, partner, spaces)
        return replace(member, orders=orders, maps=forward, partner=partner)
    forward = {
        slots.name: maps[space.name].forward
        for space in spaces
        if space.name in maps
        for slots in space.values
        if slots.name in member.values and slots.index.shape == (space.size, 1)
    }
    return replace(member, orders={}, maps=forward)
