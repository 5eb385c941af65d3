"""Prune channel spaces (exact for dead channels): a selection on each space.

For kept channels k_0 < ... < k_{K-1} of a space, every array that touches the space loses the slots of all others,

    W'[..., slots of k_0, ..., slots of k_{K-1}, ...],

values shrink alike, and so do the constants that hold their sizes and the groups of convolutions. For channels that are
not dead (see `dead_channels`) the result is the network without what they contribute.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.normalise import infer_shapes
from onnxmerge.ir.rules.registry import integer, required
from onnxmerge.ir.space import Slots, Space
from onnxmerge.ir.weights import get_array, set_array
from onnxmerge.passes.resize import SHARED, AxisMap, Key, Sizes, numbered, positions, resize_constants, sizes_of, verify
from onnxmerge.passes.roles import sums_over, title, why_not_alone

Masks = dict[str, dict[int, np.ndarray]]
"""For each value or array, the axes that shrink and which of their indices stay."""


class Prune(oir.passes.FunctionalPass):
    """Keep the channels `keep[space]` of each named space, in their order; other spaces stay whole."""

    preserves = "exact"

    def __init__(self, keep: Mapping[str, np.ndarray], spaces: Mapping[str, Space]):
        self.keep = {name: np.asarray(kept, np.int64) for name, kept in keep.items()}
        self.spaces = spaces

    def requires(self, model: oir.Model) -> None:
        """Every selection names a space and at least one of its channels, in ascending order."""
        for name, kept in self.keep.items():
            if name not in self.spaces:
                raise ModelError(f"there is no channel space {name!r}")
            if any(slots.name not in model.graph.initializers for slots in self.spaces[name].weights):
                raise ModelError(f"{name!r} is a channel space of another network")
            if kept.ndim != 1 or len(kept) == 0:
                raise ModelError(f"{name!r}: at least one channel must be kept")
            if kept[0] < 0 or kept[-1] >= self.spaces[name].size or (np.diff(kept) <= 0).any():
                raise ModelError(f"{name!r}: not an ascending selection of {self.spaces[name].size} channels")

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """A pruned copy of the model.

        Raises:
            ModelError: a node mixes channels in another way than a layer does, needs them in equal groups, or cannot
                follow when their number changes.
        """
        pruned, sizes = model.clone(), sizes_of(model)
        dropped = self._dropped()
        if not dropped:
            return oir.passes.PassResult(pruned, modified=False)
        values = _by_axis(model, _masks(((slots, own) for s, own in dropped for slots in s.values), sizes), sizes)
        _forbid_mixing(model, values)
        grouped = _prune_groups(pruned, values)
        slots = ((slots, own) for s, own in dropped for slots in s.weights if slots.name not in grouped)
        for name, masks in _by_axis(model, _masks(slots, sizes), sizes).items():
            value = pruned.graph.initializers[name]
            set_array(value, _shrink(get_array(value), masks))
        resize_constants(pruned, {name: _maps(kept) for name, kept in values.items()}, sizes)
        for output in pruned.graph.outputs:  # an open one shrinks, and its declared shape with it
            kept = values.get(output.name or "", {})
            if output.shape is not None:
                output.shape = oir.Shape([int(kept[a].sum()) if a in kept else d for a, d in enumerate(output.shape)])
        infer_shapes(pruned)
        outputs = {output.name or "" for output in model.graph.outputs}
        opened = frozenset(s.name for space in self.spaces.values() for s in space.values if s.name in outputs)
        verify(pruned, self._wanted(sizes), opened)
        return oir.passes.PassResult(pruned, modified=True)

    def _dropped(self) -> list[tuple[Space, np.ndarray]]:
        chosen = [(self.spaces[name], kept) for name, kept in self.keep.items()]
        return [(s, np.setdiff1d(np.arange(s.size), kept)) for s, kept in chosen if len(kept) < s.size]

    def _wanted(self, sizes: Sizes) -> dict[Key, np.ndarray]:
        """Which channel stands where afterwards; negative for those that are alone in their space."""
        several = [  # one channel alone may be broadcast, or stand beside others without a slot of its own
            np.full(space.size, len(self.keep.get(space.name, range(space.size))) > 1)
            for space in self.spaces.values()
            if not space.blocks
        ]
        told = np.concatenate([*several, [False]])  # the last is for positions without a channel
        wanted = {}
        masks = _masks(((s, own) for space, own in self._dropped() for s in (*space.values, *space.weights)), sizes)
        for (name, axes), numbers in numbered(self.spaces.values(), sizes).items():
            whole = next((m for (n, a), m in masks.items() if n == name and (axes is None or a == axes)), None)
            wanted[name, axes] = numbers if whole is None else numbers[whole]
        return {key: np.where(told[numbers], numbers, -1) for key, numbers in wanted.items()}


def _masks(dropped: Iterable[tuple[Slots, np.ndarray]], sizes: Sizes) -> dict[tuple[str, tuple[int, ...]], np.ndarray]:
    """For names and axes (flattened together) which positions stay."""
    masks: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}
    for slots, own in dropped:
        mask = masks.setdefault((slots.name, slots.axes), np.ones(positions(slots, sizes), bool))
        mask[slots.index[own]] = False
    return masks


def _by_axis(model: oir.Model, masks: Mapping[tuple[str, tuple[int, ...]], np.ndarray], sizes: Sizes) -> Masks:
    """The masks of each axis alone, where what stays is a product of them."""
    found: Masks = {}
    for (name, axes), mask in masks.items():
        whole = mask.reshape([sizes[name][axis] for axis in axes] if name in sizes else -1)
        single = per_axis(whole)
        if not np.array_equal(outer(single), whole):
            node = next(n for n in model.graph for v in (*n.outputs, *n.inputs) if v is not None and v.name == name)
            raise ModelError(f"{title(node)}: what is kept of its channels would not be equal rows and columns")
        own = {axis: stays for axis, stays in zip(axes, single, strict=True) if not stays.all()}
        found.setdefault(name, {}).update(own)
    return found


def per_axis(mask: np.ndarray) -> list[np.ndarray]:
    """For each axis of `mask` which of its indices have an entry that is true."""
    return [np.any(np.moveaxis(mask, axis, 0).reshape(size, -1), axis=1) for axis, size in enumerate(mask.shape)]


def outer(masks: Iterable[np.ndarray]) -> np.ndarray:
    """The product of masks of single axes."""
    result = np.ones((), bool)
    for mask in masks:
        result = np.logical_and.outer(result, mask)
    return result


def _maps(masks: Mapping[int, np.ndarray]) -> dict[int, AxisMap]:
    return {axis: AxisMap(np.flatnonzero(mask), np.full(int(mask.sum()), SHARED)) for axis, mask in masks.items()}


def _shrink(array: np.ndarray, masks: Mapping[int, np.ndarray]) -> np.ndarray:
    for axis, mask in masks.items():
        array = np.compress(mask, array, axis)
    return array


def _forbid_mixing(model: oir.Model, masks: Masks) -> None:
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            axes = masks.get(value.name or "", {}) if value is not None else {}
            reason = why_not_alone(node, index, axes)
            if reason is not None and not sums_over(node, index, axes):
                raise ModelError(f"{title(node)}: {reason}, so none can be left out")


def _prune_groups(model: oir.Model, masks: Masks) -> set[str]:
    """Prune the weights of grouped convolutions in place, set their number of groups, and return their names.

    A group that loses all of its inputs and outputs goes; the others must stay of equal size.
    """
    done = set()
    for node in model.graph:
        groups = integer(node, "group", 1)
        if node.op_type not in ("Conv", "ConvTranspose") or groups == 1:
            continue
        data, weight, made = required(node, 0), required(node, 1), node.outputs[0]
        array = get_array(weight)
        by_groups = array.reshape(groups, -1, *array.shape[1:])
        first, second = (made, data) if node.op_type == "Conv" else (data, made)
        rows = masks.get(first.name or "", {}).get(1, np.ones(by_groups.shape[1] * groups, bool)).reshape(groups, -1)
        columns = masks.get(second.name or "", {}).get(1, np.ones(array.shape[1] * groups, bool)).reshape(groups, -1)
        alive = np.flatnonzero(rows.any(1) | columns.any(1))
        counts = {(int(rows[group].sum()), int(columns[group].sum())) for group in alive}
        if len(counts) != 1 or 0 in next(iter(counts)):
            raise ModelError(f"{title(node)}: its {groups} groups would no longer be of equal size")
        if rows.all() and columns.all():
            continue
        kept = [by_groups[group][rows[group]][:, columns[group]] for group in alive]
        set_array(weight, np.concatenate(kept))
        node.attributes["group"] = oir.AttrInt64("group", len(alive))
        done.add(weight.name or "")
    return done
