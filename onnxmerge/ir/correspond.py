"""Which value of one network does the job of which value of another: matching two graphs from their inputs on.

Networks of unequal width match too. Then sizes may differ on axes that carry channels, and so may what only says how
many channels there are: a group for each of them, the shape that a Reshape makes, where a Slice cuts them. This is
decided on the channel spaces of both. Values that match carry spaces that match, on the same axes, and what a Slice, a
Gather or a Pad does along all other axes is the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.concrete import with_sizes
from onnxmerge.ir.identity import Defaults, attribute_content
from onnxmerge.ir.labels import NO_CHANNEL, Trace, dims, rank
from onnxmerge.ir.rules import RULES
from onnxmerge.ir.rules.registry import required, source_axis
from onnxmerge.ir.space import Slots
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.ir.weights import get_array, is_float

_COUNT = "group"
"""The attribute that may differ where it is the number of channels that a node reads."""
_TOLD_BY_SIZES = ("Reshape", "Expand", "Tile", "Resize", "Split")
"""Operators whose integer constants say no more than the sizes of what they read and make."""
_MOVES = ("Slice", "Gather", "Pad")
"""Operators that do the same along an axis, whatever the sizes of the others are."""


@dataclass
class Correspondence:
    """Names in the first model -> names in the second, for computed values and for constants."""

    values: dict[str, str] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    """One sentence for each node of the first model that reads matched values but has no partner."""


def correspond(first: oir.Model, second: oir.Model, *, same_sizes: bool = True) -> Correspondence:
    """Match nodes of two normalised models in topological order.

    Two nodes match when they have the same operator and attributes (one at its default is none), read matched values at
    the same places, and their constants have equal shapes and, where they are integers (pads, axes), equal content.
    Without `same_sizes` all this may differ in the number of channels. Among several equal candidates the first in
    graph order is taken.
    """
    matching = _Matching(first, second, None if same_sizes else _Widths(first, second))
    for node in first.graph:
        matching.visit(node)
    return matching.found


class _Matching:
    """One run over the nodes of the first model."""

    def __init__(self, first: oir.Model, second: oir.Model, widths: "_Widths | None"):
        pairs = list(zip(first.graph.inputs, second.graph.inputs, strict=True))
        self.found = Correspondence({left.name or "": right.name or "" for left, right in pairs})
        self._partners = {left.name or "": right for left, right in pairs}
        self._position = {node: number for number, node in enumerate(second.graph)}
        self._taken: set[oir.Node] = set()
        self._defaults = [Defaults(model.opset_imports) for model in (first, second)]
        self._widths = widths

    def visit(self, node: oir.Node) -> None:
        """Find the partner of `node`, if all that it reads has one."""
        computed = [v.name or "" for v in node.inputs if v is not None and v.const_value is None]
        if not computed or any(name not in self._partners for name in computed):
            return
        readers = dict.fromkeys(reader for reader, _ in self._partners[computed[0]].uses())
        candidates = [reader for reader in readers if reader in self._position and reader not in self._taken]
        reasons = []
        for candidate in sorted(candidates, key=self._position.__getitem__):
            reason = self._difference(node, candidate)
            if reason is None:
                self._pair(node, candidate)
                return
            reasons.append(reason)
        self.found.stopped.append(f"{node.op_type} {node.name!r}: " + (reasons[0] if reasons else "nothing like it"))

    def _pair(self, left: oir.Node, right: oir.Node) -> None:
        self._taken.add(right)
        for a, b in zip(left.inputs, right.inputs, strict=True):
            if a is not None and b is not None and a.const_value is not None:
                self.found.constants[a.name or ""] = b.name or ""
        for a, b in zip(left.outputs, right.outputs, strict=True):
            self.found.values[a.name or ""] = b.name or ""
            self._partners[a.name or ""] = b
            if self._widths is not None:
                self._widths.pair(a, b)

    def _difference(self, left: oir.Node, right: oir.Node) -> str | None:
        """Why the two nodes do not match, or None."""
        if (left.domain, left.op_type) != (right.domain, right.op_type) or any(
            len(getattr(left, side)) != len(getattr(right, side)) for side in ("inputs", "outputs")
        ):
            return f"the other network has {right.op_type} {right.name!r} there"
        for a, b in zip(left.inputs, right.inputs, strict=True):
            if (a is None) != (b is None):
                return "one leaves out an optional input"
            if a is None or b is None:
                continue
            if (a.const_value is None) != (b.const_value is None):
                return f"{a.name!r} is constant in one network only"
            if a.const_value is None and self.found.values.get(a.name or "") != b.name:
                return "it reads other values"
        more = _constants_differ if self._widths is None else self._widths.differ
        return self._attributes_differ(left, right) or more(left, right)

    def _attributes_differ(self, left: oir.Node, right: oir.Node) -> str | None:
        ours, theirs = (
            {attribute.name: attribute for attribute in defaults.said(node)}
            for defaults, node in zip(self._defaults, (left, right), strict=True)
        )
        for name in sorted(ours.keys() | theirs.keys()):
            if name not in ours or name not in theirs:
                return f"only one of the two sets the attribute {name!r}"
            depthwise = self._widths is not None and name == _COUNT and _is_depthwise(left) and _is_depthwise(right)
            if not depthwise and _content(ours[name]) != _content(theirs[name]):
                return f"the attribute {name!r} differs"
        return None


def _constants_differ(left: oir.Node, right: oir.Node) -> str | None:
    for a, b in zip(left.inputs, right.inputs, strict=True):
        if a is None or b is None or a.const_value is None:
            continue
        if dims(a) != dims(b):
            return _other_shape(a, b)
        if not is_float(a) and not np.array_equal(get_array(a), get_array(b)):
            return f"the constant {a.name!r} differs"
    return None


def _is_depthwise(node: oir.Node) -> bool:
    """Whether the node has a group for each channel that it reads."""
    return dims(required(node, 0))[1:2] == (node.attributes[_COUNT].as_int(),)


def _content(attribute: oir.Attr) -> bytes:
    return attribute_content(attribute) or str(attribute.value).encode()


def _other_shape(a: oir.Value, b: oir.Value, why: str = "") -> str:
    return f"{a.name!r} has shape {list(dims(a))} in one network and {list(dims(b))} in the other{why}"


class _Network:
    """Where the channels of one network lie, and its nodes in a copy in which all axes have sizes."""

    def __init__(self, model: oir.Model):
        self._values = {output.name: output for node in with_sizes(model).graph for output in node.outputs}
        self._spaces: dict[str, list[tuple[str, Slots]]] = {}
        found = find_spaces(model)
        self.frozen = found.frozen
        for space in found.spaces:
            if not space.blocks:
                for slots in (*space.values, *space.weights):
                    self._spaces.setdefault(slots.name, []).append((space.name, slots))

    def sized(self, node: oir.Node) -> oir.Node | None:
        """The node in the copy; None where it is shape arithmetic, and so has become a constant there."""
        output = self._values.get(node.outputs[0].name)
        return None if output is None else output.producer()

    def spaces(self, value: oir.Value) -> list[tuple[str, Slots]]:
        """The spaces that lie in a value or an array, in the order of their first channels."""
        own = self._spaces.get(value.name or "") or self._of_source(value)
        return sorted(own, key=lambda found: (found[1].axes, int(found[1].index.min())))

    def _of_source(self, value: oir.Value) -> list[tuple[str, Slots]]:
        """The spaces of an array that is only repeated, such as a class token; its reader told of them."""
        value = self._values.get(value.name, value)
        found: list[tuple[str, Slots]] = []
        for axis in range(rank(value)):
            source = source_axis(value, axis)
            if source is not None:
                array, own = source
                lying = self._spaces.get(array.name or "", ())
                found += [(space, replace(slots, axes=(axis,))) for space, slots in lying if slots.axes == (own,)]
        return found


class _Widths:
    """Whether matched nodes differ in the number of their channels alone."""

    def __init__(self, first: oir.Model, second: oir.Model):
        self._ours, self._theirs = _Network(first), _Network(second)
        self._partners: dict[str, str] = {}
        self._reverse: dict[str, str] = {}

    def pair(self, left: oir.Value, right: oir.Value) -> None:
        """Take the spaces that lie in two values to be the same."""
        for (ours, _), (theirs, _) in zip(self._ours.spaces(left), self._theirs.spaces(right), strict=True):
            self._partners[ours] = theirs
            self._reverse[theirs] = ours

    def differ(self, left: oir.Node, right: oir.Node) -> str | None:
        """What else differs in the constants and the outputs of two nodes, or None."""
        a, b = self._ours.sized(left), self._theirs.sized(right)
        if a is None or b is None:  # what comes of shape arithmetic shows where it is read
            return None
        return self._constants_differ(a, b) or self._values_differ(a, b)

    def _values_differ(self, left: oir.Node, right: oir.Node) -> str | None:
        for a, b in zip(left.outputs, right.outputs, strict=True):
            ours, theirs = self._ours.spaces(a), self._theirs.spaces(b)
            if len(ours) != len(theirs):
                return (
                    f"{a.name!r} carries {len(ours)} channel spaces in one network and {len(theirs)} in the other: "
                    "groups of channels that keep to themselves, such as heads, must be equal in number"
                )
            for (space, own), (other, their) in zip(ours, theirs, strict=True):
                if own.axes != their.axes or own.index.shape[1] != their.index.shape[1]:
                    return f"the channels of {a.name!r} lie otherwise in the other network"
                if self._partners.get(space, other) != other or self._reverse.get(other, space) != space:
                    return f"{a.name!r} carries other channels in the other network"
            if _fixed_sizes(a, [slots for _, slots in ours]) != _fixed_sizes(b, [slots for _, slots in theirs]):
                return _other_shape(a, b, self._why())
        return None

    def _why(self) -> str:
        """Why sizes that differ cannot be mapped."""
        nodes = [f"{n.op} {n.node!r}: {n.reason}" for n in (*self._ours.frozen, *self._theirs.frozen)]
        kept = f" (some keep their place because of {nodes[0]})" if nodes else ""
        return f", and not only in channels that can be mapped{kept}"

    def _constants_differ(self, left: oir.Node, right: oir.Node) -> str | None:
        for a, b in zip(left.inputs, right.inputs, strict=True):
            if a is None or b is None or a.const_value is None or b.const_value is None:
                continue
            if is_float(a):
                on = {axis for _, slots in (*self._ours.spaces(a), *self._theirs.spaces(b)) for axis in slots.axes}
                if rank(a) != rank(b) or any(
                    one != other and axis not in on
                    for axis, (one, other) in enumerate(zip(dims(a), dims(b), strict=True))
                ):
                    return _other_shape(a, b, self._why())
            elif not np.array_equal(get_array(a), get_array(b)) and not (
                left.op_type in _TOLD_BY_SIZES or (left.op_type in _MOVES and self._same_places(left, right))
            ):
                return f"the constant {a.name!r} differs"
        return None

    def _same_places(self, left: oir.Node, right: oir.Node) -> bool:
        """Whether both nodes take what is no channel from the same places: by their label rule, along each axis."""
        a, b = required(left, 0), required(right, 0)
        channels = {axis for _, slots in self._ours.spaces(a) for axis in slots.axes}
        pairs = zip(_places(left, rank(a)), _places(right, rank(b)), strict=True)
        return all(axis in channels or np.array_equal(ours, theirs) for axis, (ours, theirs) in enumerate(pairs))


def _fixed_sizes(value: oir.Value, spaces: list[Slots]) -> list[int | None]:
    """The sizes of the axes without channels, then for each of the others how many places on it are no channels."""
    sizes = dims(value)
    along = dict.fromkeys(slots.axes for slots in spaces)
    inside = {axis for axes in along for axis in axes}
    found: list[int | None] = [size for axis, size in enumerate(sizes) if axis not in inside]
    for axes in along:
        whole = int(np.prod([sizes[axis] or 0 for axis in axes]))
        found.append(whole - sum(slots.index.size for slots in spaces if slots.axes == axes))
    return found


def _places(node: oir.Node, count: int) -> Iterator[np.ndarray]:
    """For each axis of the first input the places on it that the output is taken from."""
    data = required(node, 0)
    for axis in range(count):
        trace = Trace(())
        shape = [int(size or 1) if other == axis else 1 for other, size in enumerate(dims(data))]
        trace.labels[data.name or ""] = np.arange(max(shape)).reshape(shape)
        RULES[node.op_type](node, trace)
        yield np.full(1, NO_CHANNEL) if trace.frozen else trace.label(node.outputs[0])
