"""Carry one network's channels over to another's: soft maps between channel spaces of any two widths (approximate).

Between a space of n channels of ours and the space of m channels of theirs that does its job stand two matrices with
rows that sum to one: *forward* F [n, m] says which mean of their channels ours is, *backward* B [m, n] which mean of
ours their channel sees where it is read. With (n) an array's axis that makes the space or has a number for each of its
channels, and (n) an axis that reads it,

    makes    W' = F W         reads    W' = W B         both    W' = F W B

A permutation has F[i, order[i]] = 1 and B = F'. Then this is `permute_slots`, bit for bit.

Of a transport plan T [m, n] with row sums a and column sums b, F = T' / b and B = T / a. OTFusion (Singh and Jaggi
2020) divides by b on both sides. For equal widths that is the same. Otherwise the rows of its B sum to n / m, and so
much is what reads the space scaled by: the network with other widths has less say. Here a constant that is transported
stays the same in both directions, and a network whose channels are split into equal halves gives the network itself.

Running variances: their standard deviations are averaged, v' = (F sqrt(v))^2. That is the variance of F z when the
channels that one of ours stands for move together, which is what they were matched for; F v would be larger.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.labels import dims, rank
from onnxmerge.ir.rules.registry import required
from onnxmerge.ir.spaces import Slots, Space
from onnxmerge.ir.weights import get_array, is_float
from onnxmerge.passes.roles import LAYERS, read_axis, why_not_alone

_NORMS = frozenset(
    (
        *("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization"),
        "RMSNormalization",
    )
)


@dataclass(frozen=True)
class ChannelMap:
    """How a space of theirs stands for one of ours; the rows of both matrices sum to one."""

    forward: np.ndarray
    """[ours, theirs]"""
    backward: np.ndarray
    """[theirs, ours]"""

    @staticmethod
    def from_permutation(order: np.ndarray) -> "ChannelMap":
        """The map of an alignment: our channel i is their channel `order[i]`."""
        forward = np.zeros((len(order), len(order)), np.int8)
        forward[np.arange(len(order)), order] = 1
        return ChannelMap(forward, forward.T)

    @staticmethod
    def from_plan(plan: np.ndarray, *, published: bool = False) -> "ChannelMap":
        """The map of a transport plan [theirs, ours], whose entries are not negative.

        Args:
            plan: T
            published: divide by the masses of ours on both sides, as OTFusion does.

        Raises:
            ModelError: a channel has no mass.
        """
        ours, theirs = plan.sum(0), plan.sum(1)
        if not (ours > 0).all() or not (theirs > 0).all():
            raise ModelError("the transport plan leaves out a channel")
        return ChannelMap((plan / ours).T, plan / (ours if published else theirs[:, None]))

    @cached_property
    def order(self) -> np.ndarray | None:
        """For each of our channels theirs, when the map is a permutation; else None."""
        order = self.forward.argmax(1)
        permutation = ChannelMap.from_permutation(order) if self.forward.shape[0] == self.forward.shape[1] else None
        same = permutation is not None and np.array_equal(self.forward, permutation.forward)
        return order if same and np.array_equal(self.backward, self.forward.T) else None


ChannelMaps = Mapping[str, ChannelMap]
"""By the name of our space."""


@dataclass(frozen=True)
class MappedPartner:
    """Another network of the same structure and any widths.

    Attributes:
        model: the network.
        values: names of our values -> theirs.
        constants: names of our constants -> theirs.
        spaces: names of our spaces -> theirs (see `matching_spaces`).
        maps: by our spaces; `match_channels` finds them.
        weight: its share in a mean.
    """

    model: oir.Model
    values: Mapping[str, str]
    constants: Mapping[str, str]
    spaces: Mapping[str, Space]
    maps: ChannelMaps = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True)
class Place:
    """Where a space lies in an array of ours and in the array of theirs, and which of their channels ours are."""

    ours: Slots
    theirs: Slots
    matrix: np.ndarray
    """[ours, theirs]"""
    order: np.ndarray | None
    """The same as an order, when it is one."""


# --- which space is which ---------------------------------------------------------------------------------------------


def matching_spaces(ours: Sequence[Space], theirs: Sequence[Space], constants: Mapping[str, str]) -> dict[str, Space]:
    """For each of our spaces the one of theirs that lies in the arrays that stand for its own.

    Args:
        ours: spaces without blocks.
        theirs: all spaces of the other network; those of blocks are not looked at.
        constants: names of our constants -> theirs.

    Raises:
        ModelError: a space of ours has no counterpart.
    """
    candidates: dict[_Key, list[Space]] = {}
    for space in theirs:
        if not space.blocks:
            candidates.setdefault(_key(space, {}), []).append(space)
    alike: dict[_Key, list[Space]] = {}
    for space in ours:
        alike.setdefault(_key(space, constants), []).append(space)
    matched: dict[str, Space] = {}
    for key, own in alike.items():
        found = candidates.get(key, [])
        if len(found) != len(own):
            arrays = ", ".join(sorted({repr(slots.name) for slots in own[0].weights}))
            raise ModelError(f"the other network has no channel space like {own[0].name!r}, which lies in {arrays}")
        matched |= {a.name: b for a, b in zip(own, found, strict=True)}  # several, such as groups: in order
    return matched


_Key = tuple[tuple[str, tuple[int, ...], int], ...]
"""The arrays of a space: name, axes, slots of each channel."""


def _key(space: Space, names: Mapping[str, str]) -> _Key:
    return tuple(sorted((names.get(own.name, own.name), own.axes, own.index.shape[1]) for own in space.weights))


# --- arrays -----------------------------------------------------------------------------------------------------------


def transported_arrays(reference: oir.Model, partner: MappedPartner, spaces: Sequence[Space]) -> dict[str, np.ndarray]:
    """The partner's floating-point arrays in our shapes and channels, by our names.

    Where all maps are permutations an array keeps its element type, else it is float64. Between unequal widths numbers
    that stand alone are left out: many go by the width, such as the scale of a head's scores, and those of ours go with
    ours. (A sum of products of two activations over n channels in place of m becomes n / m of what it was.)

    Args:
        reference: our network.
        partner: the other, with a map for each space.
        spaces: ours, without blocks.

    Raises:
        ModelError: an array does not fit ours, or a node whose weights cannot be told apart into those that make
            channels and those that read them meets a map that is no permutation.
    """
    found = {
        value.name or "": transported_array(value, partner, spaces) for value in reference.graph.initializers.values()
    }
    return {name: array for name, array in found.items() if array is not None}


def transported_array(value: oir.Value, partner: MappedPartner, spaces: Sequence[Space]) -> np.ndarray | None:
    """What `transported_arrays` has for one constant of ours; None where it has nothing."""
    name = value.name or ""
    if name not in partner.constants or not is_float(value):
        return None
    if get_array(value).size <= 1 and any(partner.spaces[space.name].size != space.size for space in spaces):
        return None
    inside = [space for space in spaces if any(slots.name == name for slots in space.weights)]
    return _carry_constant(value, partner, inside)


def _carry_constant(value: oir.Value, partner: MappedPartner, spaces: Iterable[Space]) -> np.ndarray:
    name = value.name or ""
    array = get_array(partner.model.graph.initializers[partner.constants[name]])
    shape, places = get_array(value).shape, constant_places(value, partner, spaces)
    if _is_variance(value) and any(place.order is None for place in places):
        return carry(np.sqrt(np.maximum(array.astype(np.float64), 0)), shape, places, name) ** 2
    return carry(array, shape, places, name)


def constant_places(value: oir.Value, partner: MappedPartner, spaces: Iterable[Space]) -> list[Place]:
    """Where the spaces, which all have a map, lie in a constant of ours.

    Raises:
        ModelError: see `transported_arrays`.
    """
    reading, found = reading_axes(value), []
    for space in spaces:
        own = partner.maps[space.name]
        for ours, theirs in paired_slots(value.name or "", space, partner):
            if reading is None and own.order is None:
                node = next(node for node, _ in value.uses())
                raise ModelError(
                    f"{node.op_type} {node.name!r}: it is not known along which axes of {ours.name!r} channels are read"
                )
            reads = reading is not None and set(ours.axes) <= reading
            found.append(Place(ours, theirs, own.backward.T if reads else own.forward, own.order))
    return found


def paired_slots(name: str, space: Space, partner: MappedPartner) -> list[tuple[Slots, Slots]]:
    """Where our space lies in our constant `name`, and where theirs lies in the one that stands for it."""
    ours = [slots for slots in space.weights if slots.name == name]
    theirs = [slots for slots in partner.spaces[space.name].weights if slots.name == partner.constants[name]]
    return list(zip(sorted(ours, key=_axes), sorted(theirs, key=_axes), strict=True))


def _axes(slots: Slots) -> tuple[int, ...]:
    return slots.axes


def reading_axes(value: oir.Value) -> set[int] | None:
    """The axes along which a constant reads channels, the others make them or go with them; None when unknown."""
    found = [_reading(node, index) for node, index in value.uses()]
    return found[0] if found and all(axes == found[0] for axes in found) else None


def _reading(node: oir.Node, index: int) -> set[int] | None:
    if node.domain not in ("", "ai.onnx"):
        return None
    count, axis = rank(required(node, index)), read_axis(node) if index == 1 else None
    if axis is not None:
        return {axis}
    if node.op_type == "MatMul":
        return {count - 1} if index == 0 else {max(count - 2, 0)}
    if (node.op_type in LAYERS and index == 2) or (node.op_type in _NORMS and index > 0):
        return set()
    return set() if why_not_alone(node, index, range(count)) is None else None


def _is_variance(value: oir.Value) -> bool:
    return any(node.op_type == "BatchNormalization" and index == 4 for node, index in value.uses())


# --- values -----------------------------------------------------------------------------------------------------------


def carry_value(name: str, array: np.ndarray, partner: MappedPartner, spaces: Iterable[Space]) -> np.ndarray:
    """Their activations [samples, ...] for our value `name`, in our channels.

    The sizes of axes that carry no channels of `spaces` stay theirs.
    """
    places = value_places(name, partner, spaces)
    shape = list(array.shape)
    for axes in {place.ours.axes for place in places}:
        own = [place for place in places if place.ours.axes == axes]
        grown = sum(place.ours.index.size - place.theirs.index.size for place in own)
        if len(axes) == 1:
            shape[axes[0]] += grown
        elif grown:
            raise ModelError(f"{name!r}: channels of unequal number lie on several axes together")
    return carry(array, tuple(shape), places, name)


def value_places(name: str, partner: MappedPartner, spaces: Iterable[Space]) -> list[Place]:
    """Where the spaces that have a map lie in our value `name`."""
    found = []
    for space in spaces:
        ours, theirs = space.value(name), partner.spaces[space.name].value(partner.values.get(name, ""))
        if ours is not None and theirs is not None and space.name in partner.maps:
            own = partner.maps[space.name]
            found.append(Place(ours, theirs, own.forward, own.order))
    return found


def target_channels(
    reference: oir.Model, partner: MappedPartner, spaces: Sequence[Space]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The `orders` and the `maps` of a `Teacher`: for each of our values on one of whose axes mapped spaces lie.

    Values all of whose channels are permuted have an order, the others a matrix [ours, theirs].
    """
    orders, maps = {}, {}
    computed = {o.name or "": o for node in reference.graph for o in node.outputs}
    carriers = dict.fromkeys(slots.name for space in spaces for slots in space.values if slots.name in computed)
    for name in carriers:
        places = value_places(name, partner, spaces)
        if not places or {len(place.ours.axes) for place in places} != {1} or len({p.ours.axes for p in places}) > 1:
            continue
        size = dims(computed[name])[places[0].ours.axes[0]]
        if size is None:
            continue
        theirs = size + sum(place.theirs.index.size - place.ours.index.size for place in places)
        along = [
            replace(place, ours=replace(place.ours, axes=(0,)), theirs=replace(place.theirs, axes=(0,)))
            for place in places
        ]
        if all(place.order is not None for place in places):
            orders[name] = carry(np.arange(theirs), (size,), along, name)
        elif len(along) == 1 and _in_order(along[0].ours, size) and _in_order(along[0].theirs, theirs):
            maps[name] = along[0].matrix  # not copied for each value of a stream
        else:
            maps[name] = carry(np.eye(theirs), (size, theirs), along, name)
    return orders, maps


def _in_order(slots: Slots, size: int) -> bool:
    return slots.rows is None and np.array_equal(slots.index, np.arange(size)[:, None])


# --- one array --------------------------------------------------------------------------------------------------------


def carry(array: np.ndarray, shape: tuple[int, ...], places: Sequence[Place], name: str) -> np.ndarray:
    """Their `array` in our `shape`: along the axes of each place our channels, what lies in no place in its order.

    Places that are limited to rows lie behind those that are not, because rows are counted in ours.

    Raises:
        ModelError: what lies in no place is not of our size; the message calls the array `name`.
    """
    result = array
    for axes in dict.fromkeys(place.ours.axes for place in sorted(places, key=lambda p: p.ours.rows is not None)):
        own = [place for place in places if place.ours.axes == axes]
        target = tuple(shape[axis] if axis in axes else size for axis, size in enumerate(result.shape))
        step = _along if own[0].ours.rows is None else _in_rows
        result = step(result, target, own, name)
    if result.shape != shape:
        raise ModelError(f"{name!r} has shape {list(shape)} in one network and {list(result.shape)} in the other")
    return result


def _in_rows(array: np.ndarray, shape: tuple[int, ...], places: Sequence[Place], name: str) -> np.ndarray:
    """As `_along`, for each group of rows by itself; rows without a place stay."""
    dtype = array.dtype if all(place.order is not None for place in places) else np.dtype(np.float64)
    groups = {place.ours.rows: [p for p in places if p.ours.rows == place.ours.rows] for place in places}
    covered = sum(rows.stop - rows.start for rows in groups if rows is not None)
    if array.shape != shape and covered < shape[next(rows.axis for rows in groups if rows is not None)]:
        raise ModelError(f"{name!r}: the channels of some groups have no counterpart in the other network")
    result = array.astype(dtype) if array.shape == shape else np.empty(shape, dtype)
    for rows, own in groups.items():
        assert rows is not None
        part = (slice(None),) * rows.axis + (slice(rows.start, rows.stop),)
        result[part] = _along(array[part], result[part].shape, own, name)
    return result


def _along(array: np.ndarray, shape: tuple[int, ...], places: Sequence[Place], name: str) -> np.ndarray:
    axes = places[0].ours.axes
    moved = np.moveaxis(array, axes, range(len(axes)))
    sizes = [shape[axis] for axis in axes]
    flat = moved.reshape(-1, *moved.shape[len(axes) :])
    ours = np.setdiff1d(
        np.arange(np.prod(sizes, dtype=np.int64)), np.concatenate([p.ours.index.ravel() for p in places])
    )
    theirs = np.setdiff1d(np.arange(len(flat)), np.concatenate([p.theirs.index.ravel() for p in places]))
    if len(ours) != len(theirs):
        raise ModelError(
            f"{name!r}: {len(ours)} channels that keep their place meet {len(theirs)} of the other network"
        )
    exact = all(place.order is not None for place in places)
    result = np.empty((int(np.prod(sizes)), *flat.shape[1:]), array.dtype if exact else np.float64)
    result[ours] = flat[theirs]
    for place in places:
        if place.order is not None:
            result[place.ours.index] = flat[place.theirs.index[place.order]]
        else:
            result[place.ours.index] = np.tensordot(place.matrix, flat[place.theirs.index].astype(np.float64), 1)
    return np.moveaxis(result.reshape(*sizes, *flat.shape[1:]), range(len(axes)), axes)
