"""What follows when the number of channels on some axes changes: sizes that constants hold, and whether it can be done.

Pruning and widening know which index of an axis comes from where. Reshape targets, the parts of a Split, the ends of a
Slice, indices of a Gather and amounts of a Pad follow from that here, for every pass alike.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.concrete import with_sizes
from onnxmerge.ir.labels import dims, rank
from onnxmerge.ir.rules.registry import axes_of, integer, optional, required
from onnxmerge.ir.space import Slots, Space
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.ir.weights import add_initializer, get_array, set_array
from onnxmerge.passes.roles import title

SHARED = -1
"""The parent of an index that all networks have in common."""
_ANY_END = 1 << 40  # a Slice to the end is exported with the largest integer


@dataclass(frozen=True)
class AxisMap:
    """Where the indices of one axis come from: index i was `source[i]` in network `parent[i]` (or `SHARED`)."""

    source: np.ndarray
    parent: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def find(self, source: np.ndarray, parent: np.ndarray) -> np.ndarray | None:
        """The indices that came from these, or None when one is missing."""
        known = {pair: i for i, pair in enumerate(zip(self.source.tolist(), self.parent.tolist(), strict=True))}
        found = [known.get(pair) for pair in zip(source.tolist(), parent.tolist(), strict=True)]
        return None if None in found else np.array(found, np.int64)


Maps = Mapping[str, Mapping[int, AxisMap]]
"""For each value, the axes whose indices change."""


Sizes = Mapping[str, tuple[int, ...]]


def unchanged(size: int) -> AxisMap:
    """The map of an axis that stays as it is."""
    return AxisMap(np.arange(size), np.full(size, SHARED))


# --- sizes ------------------------------------------------------------------------------------------------------------


def sizes_of(model: oir.Model) -> dict[str, tuple[int, ...]]:
    """The sizes of every value whose shape is known, or becomes known when free axes get a size."""
    sized = with_sizes(model)
    values = [
        *sized.graph.inputs,
        *(v for node in sized.graph for v in node.outputs),
        *model.graph.initializers.values(),
    ]
    return {v.name or "": tuple(int(d) for d in dims(v)) for v in values if v.shape is not None and None not in dims(v)}  # type: ignore[arg-type]


def resize_constants(model: oir.Model, maps: Maps, sizes: Sizes) -> None:
    """Rewrite, in place, every constant that says how many or which indices an axis has.

    Args:
        model: arrays of layers may have changed already; shapes and other constants are those before the change.
        maps: how the axes of values change.
        sizes: of the values before the change.

    Raises:
        ModelError: a node's constants cannot follow.
    """
    for node in list(model.graph):
        if node.domain not in ("", "ai.onnx"):
            continue
        after = maps.get(node.outputs[0].name or "", {})
        if node.op_type in ("Reshape", "Expand"):
            for axis, axis_map in after.items():
                _set_size(
                    model.graph, node, 1, axis, len(axis_map), keep=(0, -1) if node.op_type == "Reshape" else (1,)
                )
        elif node.op_type == "Resize" and optional(node, 3) is not None:
            for axis, axis_map in after.items():
                _set_size(model.graph, node, 3, axis, len(axis_map), keep=())
        elif node.op_type in _PICKING:
            before = maps.get(required(node, 0).name or "", {})
            outputs = any(maps.get(output.name or "") for output in node.outputs)
            if before or outputs:
                _PICKING[node.op_type](model.graph, node, maps, sizes)


def _set_size(graph: oir.Graph, node: oir.Node, index: int, axis: int, size: int, keep: tuple[int, ...]) -> None:
    """Set entry `axis` of a shape that is constant, or that a Concat puts together of constants and computed sizes."""
    target = required(node, index)
    if target.const_value is not None:
        array = np.array(get_array(target))
        if axis < len(array) and array[axis] not in keep:
            array[axis] = size
            replace_constant(graph, node, index, array)
        return
    joined = target.producer()
    if joined is None or joined.op_type != "Concat":
        return  # computed from other shapes; `verify` looks at what comes out
    start = 0
    for number, part in enumerate(joined.inputs):
        count = dims(part)[0] if part is not None and part.shape is not None and len(part.shape) == 1 else None
        if part is None or count is None:
            return
        if part.const_value is not None and start <= axis < start + count:
            array = np.array(get_array(part))
            if array[axis - start] not in keep:
                array[axis - start] = size
                replace_constant(graph, joined, number, array)
        start += count


def replace_constant(graph: oir.Graph, node: oir.Node, index: int, array: np.ndarray) -> None:
    """Give `node` the constant `array` as input `index`; other readers keep theirs."""
    value = required(node, index)
    if len(list(value.uses())) == 1:
        set_array(value, array)
    else:
        node.replace_input_with(
            index, add_initializer(graph, f"{value.name}__resized", array.astype(get_array(value).dtype))
        )


def _map(maps: Maps, sizes: Sizes, value: oir.Value, axis: int) -> AxisMap:
    own = maps.get(value.name or "", {}).get(axis)
    return unchanged(sizes[value.name or ""][axis]) if own is None else own


def _split(graph: oir.Graph, node: oir.Node, maps: Maps, sizes: Sizes) -> None:
    axis = integer(node, "axis", 0) % rank(required(node, 0))
    if not any(axis in maps.get(value.name or "", {}) for value in node.outputs):
        return
    parts = np.array([len(_map(maps, sizes, value, axis)) for value in node.outputs], np.int64)
    if optional(node, 1) is not None:
        replace_constant(graph, node, 1, parts)
        return
    node.attributes.pop("num_outputs", None)
    node.resize_inputs(2)
    node.replace_input_with(1, add_initializer(graph, f"{node.outputs[0].name}__parts", parts))


def _slice(graph: oir.Graph, node: oir.Node, maps: Maps, sizes: Sizes) -> None:
    data, output = required(node, 0), node.outputs[0]
    changed = set(maps.get(data.name or "", {})) | set(maps.get(output.name or "", {}))
    given = [value for value in node.inputs[1:] if value is not None]
    axes = axes_of(node, 3, rank(data)) or list(range(int(dims(required(node, 1))[0] or 0)))
    if not changed & set(axes):
        return
    if any(value.const_value is None for value in given):
        raise ModelError(f"{title(node)}: it cuts channels at places that are computed")
    starts, ends = (np.array(get_array(required(node, index))) for index in (1, 2))
    steps = np.ones_like(starts) if optional(node, 4) is None else np.array(get_array(required(node, 4)))
    for number, axis in enumerate(axes):
        if axis not in changed:
            continue
        own = np.arange(sizes[data.name or ""][axis])[slice(int(starts[number]), int(ends[number]), int(steps[number]))]
        picked = _picked(node, maps, sizes, axis, own)
        step = np.unique(np.diff(picked))
        if len(picked) == 0 or len(step) > 1 or (len(step) and step[0] == 0):
            raise ModelError(f"{title(node)}: the channels it cuts out would no longer lie at equal distances")
        stride = int(step[0]) if len(step) else 1
        stop = int(picked[-1]) + (1 if stride > 0 else -1)
        starts[number], ends[number], steps[number] = picked[0], stop if stop >= 0 else -_ANY_END, stride
    replace_constant(graph, node, 1, starts)
    replace_constant(graph, node, 2, ends)
    if optional(node, 4) is not None:
        replace_constant(graph, node, 4, steps)
    elif (steps != 1).any():
        raise ModelError(f"{title(node)}: the channels it cuts out would no longer lie side by side")


def _gather(graph: oir.Graph, node: oir.Node, maps: Maps, sizes: Sizes) -> None:
    data, indices = required(node, 0), required(node, 1)
    axis = integer(node, "axis", 0) % rank(data)
    picks = axis in maps.get(data.name or "", {})
    if not picks and (rank(indices) != 1 or axis not in maps.get(node.outputs[0].name or "", {})):
        return
    if indices.const_value is None or rank(indices) != 1:
        raise ModelError(f"{title(node)}: it picks channels by indices that are computed or not in a row")
    own = get_array(indices) % sizes[data.name or ""][axis]
    replace_constant(graph, node, 1, _picked(node, maps, sizes, axis, own))


def _picked(node: oir.Node, maps: Maps, sizes: Sizes, axis: int, own: np.ndarray) -> np.ndarray:
    """New indices into the data for a node that picked the indices `own` from it."""
    result = _map(maps, sizes, node.outputs[0], axis)
    found = _map(maps, sizes, required(node, 0), axis).find(own[result.source], result.parent)
    if found is None:
        raise ModelError(f"{title(node)}: the channels it picks are not all there any more")
    return found


def _pad(graph: oir.Graph, node: oir.Node, maps: Maps, sizes: Sizes) -> None:
    data, output = required(node, 0), node.outputs[0]
    if required(node, 1).const_value is None:
        return
    amounts = np.array(get_array(required(node, 1))).reshape(2, -1)
    axes = axes_of(node, 3, rank(data)) or list(range(rank(data)))
    for number, axis in enumerate(axes):
        result = maps.get(output.name or "", {}).get(axis)
        if result is None or not amounts[:, number].any():
            continue
        left, right = (int(amount) for amount in amounts[:, number])
        end = sizes[output.name or ""][axis] - right
        amounts[:, number] = [(result.source < left).sum(), (result.source >= end).sum()]
    replace_constant(graph, node, 1, amounts.ravel())


_PICKING = {"Split": _split, "Slice": _slice, "Gather": _gather, "Pad": _pad}

# --- proof ------------------------------------------------------------------------------------------------------------

Key = tuple[str, tuple[int, ...] | None]
"""A value by its name, or an array by its name and the axes along which channels lie."""


def verify(model: oir.Model, wanted: Mapping[Key, np.ndarray], open_outputs: frozenset[str]) -> None:
    """Find the channels of the rewritten model afresh and demand that they are the wanted ones.

    Args:
        model: with its new arrays, constants and shapes.
        wanted: which channel stands at each position of the axes that carry channels (flattened together, C order);
            negative where it does not matter.
        open_outputs: as for `find_spaces`.

    Raises:
        ModelError: names the node whose channels came out in another order or number.
    """
    found = numbered(find_spaces(model, open_outputs).spaces, sizes_of(model))
    forward: dict[int, int] = {}
    backward: dict[int, int] = {}
    nodes = {(value.name or "", None): node for node in model.graph for value in node.outputs}
    readers = {value.name: node for node in model.graph for value in node.inputs if value is not None}
    for name in [*(value for value in nodes if value in wanted), *(own for own in wanted if own not in nodes)]:
        want = wanted[name]
        if (want < 0).all():
            continue
        got = found.get(name, np.full(1, -1))
        if len(got) == 1 and (want == want[0]).all():
            got = np.broadcast_to(got, want.shape)
        if len(got) == len(want):
            pairs = {(int(a), int(b)) for a, b in zip(want, got, strict=True) if a >= 0}
            if all(b >= 0 and forward.setdefault(a, b) == b and backward.setdefault(b, a) == a for a, b in pairs):
                continue
        node = nodes[name] if name in nodes else readers[name[0]]
        raise ModelError(f"{title(node)}: channels come out in another order when their number changes")


def numbered(spaces: Iterable[Space], sizes: Sizes) -> dict[Key, np.ndarray]:
    """The number of the channel at each position of values and arrays, counted through all spaces; -1 where none is."""
    found: dict[Key, np.ndarray] = {}
    start = 0
    for space in spaces:
        if space.blocks:
            continue  # their channels are those of other spaces
        for slots, name in [
            *((slots, (slots.name, None)) for slots in space.values),
            *((slots, (slots.name, slots.axes)) for slots in space.weights if slots.rows is None),
        ]:
            own = found.setdefault(name, np.full(positions(slots, sizes), -1))
            own[slots.index] = start + np.arange(space.size)[:, None]
        start += space.size
    return found


def positions(slots: Slots, sizes: Sizes) -> int:
    """How many positions the axes of `slots` have together."""
    if slots.name not in sizes:
        return int(slots.index.max()) + 1
    return int(np.prod([sizes[slots.name][axis] for axis in slots.axes], dtype=np.int64))
