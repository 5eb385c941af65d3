"""Which channels of which network a fused network gets: chosen space by space from all networks' activations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.layers import Layer, find_layers
from onnxmerge.ir.spaces import Slots, Space
from onnxmerge.ir.weights import get_array
from onnxmerge.methods.counterparts import Counterpart, FuseOptions
from onnxmerge.passes.channel_map import ChannelMap, target_channels
from onnxmerge.passes.select_channels import Reading, predictions, select_channels
from onnxmerge.runtime.activations import lockstep
from onnxmerge.runtime.patches import Positions, grid_of, output_rows
from onnxmerge.runtime.statistics import PairStatistics


def select(
    members: Sequence[Counterpart], spaces: Sequence[Space], weights: Sequence[float], options: FuseOptions
) -> list[Counterpart]:
    """The members with orders, maps and partners that give each of our channels to one of them.

    A space that is read nowhere where the others can be looked at keeps the reference's channels.

    Args:
        members: the networks as the reference sees them, the reference itself first.
        spaces: the reference's, without blocks.
        weights: a_t of each.
        options: samples, seed, threads.
    """
    heard = [member for member, weight in zip(members, weights, strict=True) if weight]
    shares = {id(member): weight for member, weight in zip(members, weights, strict=True)}
    places = _places(members[0], heard, spaces)
    _observe(heard, places, options)
    maps: dict[int, dict[str, ChannelMap]] = {id(member): {} for member in members}
    for space in spaces:
        own = [place for place in places if place.space is space and place.known]
        for number, found in _share_out(space, own, members, shares).items():
            maps[number][space.name] = found
    return [_mapped(members[0], member, maps[id(member)], spaces) for member in members]


@dataclass
class _Place:
    """One value of ours, in which a space lies, that layers read, and the members that have a counterpart of it."""

    space: Space
    slots: Slots
    members: dict[int, tuple[str, Slots]]
    """By member: the name of its value, and where its channels lie."""
    sums: PairStatistics = field(default_factory=lambda: PairStatistics(within=False))
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
                found.append(_Place(space, slots, theirs))
    return found


def _observe(members: Sequence[Counterpart], places: Sequence[_Place], options: FuseOptions) -> None:
    """Gather the second moments of all members' channels side by side at each place, on the samples of all."""
    generator = np.random.default_rng(options.seed)
    for owner in {id(member.task.data): member.task for member in members}.values():
        split = owner.data.calibration.take(options.samples, options.seed)
        sources = []
        for member in members:
            names = dict.fromkeys(place.members[id(member)][0] for place in places if id(member) in place.members)
            sources.append((member.teacher, owner.feeds(split, member.task), list(names)))
        for batches in lockstep(*sources, threads=options.threads):
            values = {id(member): batch for member, batch in zip(members, batches, strict=True)}
            for place in places:
                _add(place, values, generator)


def _add(place: _Place, values: Mapping[int, Mapping[str, np.ndarray]], generator: np.random.Generator) -> None:
    arrays = [(values[number][name], slots) for number, (name, slots) in place.members.items()]
    grids = {grid_of(array, slots.axes[0]) for array, slots in arrays}
    if len(grids) > 1:
        place.known = False
        return
    positions = Positions.sample(generator, grids.pop())
    columns = []
    for array, slots in arrays:
        rows = output_rows(array, slots.axes[0], positions)
        columns.append(np.concatenate([rows[:, slot] for slot in slots.index.T]))  # each slot of a channel is a sample
    rows = np.concatenate(columns, axis=1)
    place.sums.update(rows, rows)


def _share_out(
    space: Space, places: Sequence[_Place], members: Sequence[Counterpart], shares: Mapping[int, float]
) -> dict[int, ChannelMap]:
    """The maps of the members that have the space."""
    sizes = {id(m): m.spaces[space.name].size for m in members if space.name in m.spaces}
    first, everywhere = id(members[0]), _everywhere(places, sizes)
    starts = dict(zip(everywhere, np.cumsum([0, *(sizes[number] for number in everywhere)]), strict=False))
    readings = [_reading(place, everywhere, members, shares) for place in places] if first in starts else []
    if not readings:
        own = np.eye(space.size)
        nothing = {n: ChannelMap(np.zeros((space.size, m)), np.zeros((m, space.size))) for n, m in sizes.items()}
        return nothing | {first: ChannelMap(own, own)}
    chosen = _placed(select_channels(readings, space.size), space.size)
    back = predictions(readings, chosen)
    found = {}
    for number, size in sizes.items():
        forward, backward = np.zeros((space.size, size)), np.zeros((size, space.size))
        if number in starts:
            start = starts[number]
            for place, channel in enumerate(chosen):
                if start <= channel < start + size:
                    forward[place, channel - start] = 1
            backward = back[start : start + size]
        found[number] = ChannelMap(forward, backward)
    return found


def _everywhere(places: Sequence[_Place], sizes: Mapping[int, int]) -> list[int]:
    """The members that can be looked at in every place, the reference first."""
    return [number for number in sizes if places and all(number in place.members for place in places)]


def _placed(chosen: Sequence[int], count: int) -> list[int]:
    """The reference's own channels in their places, the others in those that are free."""
    stay = {channel for channel in chosen if channel < count}
    others = iter(sorted(set(chosen) - stay))
    return [place if place in stay else next(others) for place in range(count)]


def _reading(
    place: _Place, numbers: Sequence[int], members: Sequence[Counterpart], shares: Mapping[int, float]
) -> Reading:
    offsets = dict(zip(place.members, np.cumsum([0, *(len(s.index) for _, s in place.members.values())]), strict=False))
    wanted = np.concatenate([offsets[n] + np.arange(len(place.members[n][1].index)) for n in numbers])
    covariance = place.sums.covariance()[np.ix_(wanted, wanted)]
    by_number = {id(member): member for member in members}
    roots, start = [], 0
    for number in numbers:
        name, slots = place.members[number]
        size = len(slots.index)
        root = _root(by_number[number].teacher, name, slots)
        inner = covariance[start : start + size, start : start + size]
        spread = float(np.einsum("ir,ij,jr->", root, inner, root, optimize=True))
        factor = np.sqrt(shares[number] / spread) if spread > 0 else 0.0
        roots.append(np.pad(root * factor, ((start, len(wanted) - start - size), (0, 0))))
        start += size
    return Reading(covariance, np.concatenate(roots, axis=1))


def _root(model: oir.Model, name: str, slots: Slots) -> np.ndarray:
    """[channels, r]: L with L L' = sum W W' over the layers that read the value `name`, and over a channel's slots."""
    size = len(slots.index)
    importance = np.zeros((size, size))
    for layer in find_layers(model):
        if layer.input.name == name:
            importance += _importance(layer, slots)
    values, vectors = np.linalg.eigh(importance)
    alive = values > 1e-12 * max(float(values[-1]), 1e-30)
    return vectors[:, alive] * np.sqrt(values[alive])


def _importance(layer: Layer, slots: Slots) -> np.ndarray:
    """[channels, channels]: W W' of one layer."""
    weight, inputs = get_array(layer.weight).astype(np.float64), slots.index
    if layer.op in ("Conv", "ConvTranspose"):
        groups = layer.groups
        if layer.op == "ConvTranspose":  # [in, out / groups, ...]
            rows = weight.reshape(len(weight), -1)
            group = np.arange(len(weight)) // (len(weight) // groups)
            full = np.where(group[:, None] == group, rows @ rows.T, 0.0)
        else:  # [out, in / groups, ...]
            inside = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
            blocks = np.einsum("goit,gojt->gij", inside, inside, optimize=True)
            full = np.zeros((groups * weight.shape[1],) * 2)
            for number, block in enumerate(blocks):
                place = slice(number * weight.shape[1], (number + 1) * weight.shape[1])
                full[place, place] = block
        return np.sum([full[np.ix_(slot, slot)] for slot in inputs.T], axis=0)
    matrix = weight.T if layer.op == "Gemm" and layer.transposed else weight
    return np.sum([matrix[slot] @ matrix[slot].T for slot in inputs.T], axis=0)


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
