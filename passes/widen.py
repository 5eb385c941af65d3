"""Widen: several networks of one architecture side by side, as one of their widths together (exact).

Each channel space becomes the union of the networks' channels. With weights a_t that sum to 1, a layer whose weight is
W_t in network t gets

    from a space to a space           diag(W_1, ..., W_N); biases and norms stand one after the other
    from a fixed axis (the input)     [W_1; ...; W_N]
    to a fixed axis (the output)      [a_1 W_1, ..., a_N W_N], bias sum_t a_t b_t

so the last layers write the weighted mean of what the networks' last layers write. What follows them is applied to
that mean: of a classifier that ends in a softmax the logits are averaged, of a generator that ends in a tanh what goes
into it. In each space of the result a run of the first network's channels comes before that of the second. Groups of a
convolution add up where the channels of each lie together, else each group becomes block-diagonal.

This is the "big student" of Pašen and Boža, Merging of neural networks, section 2.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.correspond import correspond
from onnxmerge.ir.labels import rank
from onnxmerge.ir.normalise import infer_shapes
from onnxmerge.ir.rules.registry import integer, optional, required
from onnxmerge.ir.spaces import Spaces, find_spaces
from onnxmerge.ir.weights import get_array, is_float
from onnxmerge.passes.resize import (
    AxisMap,
    Key,
    numbered,
    replace_constant,
    resize_constants,
    sizes_of,
    unchanged,
    verify,
)
from onnxmerge.passes.roles import MOVES, read_axis, title, why_not_alone
from onnxmerge.passes.side_by_side import beside, joined, joined_groups, on_one_axis, side_by_side

_NORMS = frozenset(("BatchNormalization", "InstanceNormalization"))
_LINEAR = MOVES | {
    "Neg",
    "Dropout",
    "AveragePool",
    "GlobalAveragePool",
    "ReduceMean",
    "ReduceSum",
    "Resize",
    "Upsample",
}
_SUMS = frozenset(("Add", "Sub", "Sum", "Mean"))
_PER_CHANNEL = frozenset(("Add", "Sub", "Mul", "Div", "Pow", "PRelu", "Max", "Min"))
"""Operators whose scalar constant may become one number for each channel."""


class Kind(IntEnum):
    """What a value of the widened network is."""

    SAME = 0
    """The same in all networks, such as the input."""
    WIDE = 1
    """The channels of all networks."""
    MEAN = 2
    """The weighted mean of the networks' values."""
    AFTER = 3
    """Computed from a mean by what is not linear."""


@dataclass(frozen=True)
class _Role:
    kind: Kind
    axis: int | None = None
    """Of a wide value: its channel axis, when it has one."""
    sources: frozenset[str] = frozenset()
    """The means that a mean or what comes after it is made of."""


class Widen(oir.passes.FunctionalPass):
    """Put the model it is called on and `others` side by side.

    Args:
        others: normalised models of the same architecture, matched by `correspond`.
        weights: of the model itself and of each other one in the mean of outputs; equal when not given.
    """

    preserves = "exact"

    def __init__(self, others: Sequence[oir.Model], weights: Sequence[float] | None = None):
        self.others = list(others)
        given = np.ones(len(self.others) + 1) if weights is None else np.asarray(weights, np.float64)
        self.weights = (given / given.sum()).tolist()

    def requires(self, model: oir.Model) -> None:
        """There is another network, and one weight for each."""
        if not self.others or len(self.weights) != len(self.others) + 1:
            raise ModelError("there must be another network, and one weight for each")

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """The widened network, with the names of the model it is called on.

        Raises:
            ModelError: the networks differ in more than their weights, or a node cannot work on the channels of all of
                them side by side.
        """
        for node in model.graph:
            if any(a.type in (oir.AttributeType.GRAPH, oir.AttributeType.GRAPHS) for a in node.attributes.values()):
                raise ModelError(f"{title(node)}: operators with graphs inside cannot be widened")
        widening = _Widening(model, _matched(model, self.others), self.weights)
        for node, target in zip(model.graph, widening.result.graph, strict=True):
            widening.visit(node, target)
        return oir.passes.PassResult(widening.finish(), modified=True)


def same_architecture(model: oir.Model, other: oir.Model) -> bool:
    """Whether two networks differ in nothing but their weights."""
    try:
        _matched(model, [other])
    except ModelError:
        return False
    return True


def _matched(model: oir.Model, others: Sequence[oir.Model]) -> dict[str, list[np.ndarray]]:
    """For each constant of `model` its array in every network."""
    arrays = {name: [get_array(value)] for name, value in model.graph.initializers.items()}
    for number, other in enumerate(others, start=2):
        inputs = len(other.graph.inputs) == len(model.graph.inputs)
        found = correspond(model, other) if inputs else None
        if found is None or found.stopped:
            reason = found.stopped[0] if found else "they have other numbers of inputs"
            raise ModelError(f"network {number} is not of the same architecture as the first: {reason}")
        ends = [found.values.get(output.name or "") for output in model.graph.outputs]
        if ends != [output.name for output in other.graph.outputs]:
            raise ModelError(f"network {number} is not of the same architecture as the first: its outputs differ")
        for name, theirs in found.constants.items():
            arrays[name].append(get_array(other.graph.initializers[theirs]))
    return arrays


class _Widening:
    """One run: the roles of values so far, and the network under construction."""

    def __init__(self, model: oir.Model, arrays: dict[str, list[np.ndarray]], weights: list[float]):
        self.model, self.arrays, self.weights = model, arrays, weights
        self.result = model.clone()
        self.sizes = sizes_of(model)
        self.spaces: Spaces = find_spaces(model)
        own = [space for space in self.spaces.spaces if not space.blocks]
        self.space_of = np.repeat(np.arange(len(own)), [space.size for space in own])
        self.numbers = numbered(own, self.sizes)
        self.axes = {slots.name: slots.axes for space in own for slots in space.values}
        self.constant_axes = {slots.name: slots.axes for space in own for slots in space.weights if slots.rows is None}
        self.roles: dict[str, _Role] = {value.name or "": _Role(Kind.SAME) for value in model.graph.inputs}
        self.maps: dict[str, dict[int, AxisMap]] = {}

    def finish(self) -> oir.Model:
        """Sizes, shapes and the proof."""
        resize_constants(self.result, self.maps, self.sizes)
        infer_shapes(self.result)
        total = len(self.space_of)
        wanted: dict[Key, np.ndarray] = {}
        for key, numbers in self.numbers.items():
            joint = self._joint(key)
            own = numbers[joint.source]
            wanted[key] = np.where(joint.parent < 0, -1, joint.parent * total + own)
        verify(self.result, wanted, frozenset())
        return self.result

    def visit(self, node: oir.Node, target: oir.Node) -> None:
        """Widen one node: `target` stands for `node` in the result."""
        kinds = {self._role(value).kind for value in node.inputs if value is not None}
        carried = any((output.name or "", None) in self.numbers for output in node.outputs)
        if (Kind.WIDE in kinds or carried) and kinds & {Kind.MEAN, Kind.AFTER}:
            raise ModelError(f"{title(node)}: what is averaged over the networks meets what is not{self._frozen()}")
        if Kind.WIDE in kinds or carried:
            self._visit_wide(node, target)
        elif node.op_type == "Shape":
            self._set(node, _Role(Kind.SAME))
        elif kinds <= {Kind.SAME}:
            self._visit_same(node, target)
        else:
            self._visit_mean(node, target)

    # --- roles ---

    def _role(self, value: oir.Value) -> _Role:
        return self.roles.get(value.name or "", _Role(Kind.SAME))

    def _differing(self, node: oir.Node) -> list[int]:
        """The inputs that are constants and not the same in all networks."""
        found = []
        for index, value in enumerate(node.inputs):
            if value is not None and value.const_value is not None and is_float(value):
                first, *rest = self.arrays[value.name or ""]
                if any(not np.array_equal(first, array) for array in rest):
                    found.append(index)
        return found

    def _frozen(self) -> str:
        """Why channels that one would expect to be wide may not be."""
        nodes = [f"{node.op} {node.node!r}: {node.reason}" for node in self.spaces.frozen]
        return f" (channels keep their place because of {nodes[0]})" if nodes else ""

    def _set(self, node: oir.Node, role: _Role) -> None:
        for output in node.outputs:
            self.roles[output.name or ""] = role

    # --- nodes that read or make wide values ---

    def _visit_wide(self, node: oir.Node, target: oir.Node) -> None:
        wide = [(i, v) for i, v in enumerate(node.inputs) if v is not None and self._role(v).kind == Kind.WIDE]
        for index, value in wide:
            axis = self._role(value).axis
            axes = self.axes.get(value.name or "", ()) or (() if axis is None else (axis,))
            reason = why_not_alone(node, index, axes)
            if reason is not None:
                raise ModelError(f"{title(node)}: {reason}, so networks side by side would mix")
        if node.op_type == "Shape":  # sizes follow by themselves
            self._set(node, _Role(Kind.SAME))
            return
        if read_axis(node) is not None:
            self._visit_layer(node, target)
            return
        counts = {len(self.numbers[value.name or "", None]) for _, value in wide}
        if node.op_type not in MOVES and len(counts) > 1:
            raise ModelError(f"{title(node)}: one channel of each network meets many, so networks would mix")
        places = [self._role(value).axis for _, value in wide if rank(value) == rank(node.outputs[0])]
        for output in node.outputs:
            if not output.uses() and not output.is_graph_output():
                continue
            if (output.name or "", None) not in self.numbers:
                raise ModelError(f"{title(node)}: it mixes the channels of the networks{self._frozen()}")
            self._set_wide(output, places[0] if places else None)
        for index, constant in enumerate(node.inputs):
            if constant is not None and constant.const_value is not None:
                self._widen_constant(node, target, index)

    def _set_wide(self, output: oir.Value, axis: int | None) -> None:
        """Note that a value is wide; `axis` is where its channels lie if the analysis sees only one of them."""
        name = output.name or ""
        axes = self.axes[name]
        joint = self._joint((name, None))
        if len(axes) > 1:
            fits = on_one_axis(joint, [self.sizes[name][a] for a in axes], len(self.weights))
            self.maps[name] = {} if fits is None else {axes[fits[0]]: fits[1]}
            self.roles[name] = _Role(Kind.WIDE)
            return
        own = axes[0] if axes else axis
        self.maps[name] = {} if own is None else {own: joint}
        self.roles[name] = _Role(Kind.WIDE, own)

    def _joint(self, key: Key) -> AxisMap:
        return side_by_side(self.numbers[key], self.space_of, len(self.weights))

    def _visit_layer(self, node: oir.Node, target: oir.Node) -> None:
        data, weight, bias, output = required(node, 0), required(node, 1), optional(node, 2), node.outputs[0]
        arrays, groups, reads = self.arrays[weight.name or ""], integer(node, "group", 1), read_axis(node)
        assert reads is not None
        shape = arrays[0].shape
        made = self._side(output, (weight.name or "", (1 - reads,)), shape[1 - reads] * (1 if reads else groups))
        read = self._side(data, (weight.name or "", (reads,)), shape[reads] * (groups if reads else 1))
        carried = (output.name or "", None) in self.numbers
        if made is None or (carried and (made.parent < 0).any()):
            raise ModelError(f"{title(node)}: some of its channels keep their place and some do not{self._frozen()}")
        if read is None:
            raise ModelError(f"{title(node)}: one channel of each network is read as many, so networks would mix")
        if groups == 1:
            ordered = [np.moveaxis(array, 1 - reads, 0) for array in arrays]
            kernel = np.moveaxis(joined(ordered, made, read, self.weights), 0, 1 - reads)
        else:
            rows, columns = (made, read) if reads == 1 else (read, made)
            found = joined_groups(arrays, rows, columns, groups, self.weights, rows_are_made=reads == 1)
            if found is None:
                raise ModelError(f"{title(node)}: its groups cannot be put side by side")
            kernel, count = found
            target.attributes["group"] = oir.AttrInt64("group", count)
        replace_constant(self.result.graph, target, 1, kernel)
        if bias is not None and bias.const_value is not None:
            channels = int(made.source.max()) + 1
            vectors = [np.broadcast_to(own, (*own.shape[:-1], channels)) for own in self.arrays[bias.name or ""]]
            joint = beside(vectors, vectors[0].ndim - 1, made, self.weights)
            assert joint is not None
            replace_constant(self.result.graph, target, 2, joint)
        if carried:
            self._set_wide(output, 1 if node.op_type.startswith("Conv") else rank(output) - 1)
        else:
            self._set(node, _Role(Kind.MEAN, sources=frozenset([output.name or ""])))

    def _side(self, value: oir.Value, key: Key, size: int) -> AxisMap | None:
        """The joint order of the channels that a layer makes or reads; None where one channel stands for many."""
        if (value.name or "", None) not in self.numbers:
            return unchanged(size)
        own = key if key in self.numbers else (value.name or "", None)  # groups of a kernel have no order of their own
        return self._joint(own) if len(self.numbers[own]) == size else None

    def _widen_constant(self, node: oir.Node, target: oir.Node, index: int) -> None:
        """Put a constant that meets wide values side by side with those of the other networks."""
        name = required(node, index).name or ""
        arrays, axes = self.arrays[name], self.constant_axes.get(name)
        joint: np.ndarray | None = None
        if axes is not None:
            shape = [arrays[0].shape[axis] for axis in axes]
            fits = (0, self._joint((name, axes))) if len(axes) == 1 else None
            fits = fits or on_one_axis(self._joint((name, axes)), shape, len(self.weights))
            joint = None if fits is None else beside(arrays, axes[fits[0]], fits[1])
        elif node.op_type in _NORMS or (index in self._differing(node) and node.op_type in _PER_CHANNEL):
            role = self.roles[node.outputs[0].name or ""]
            if arrays[0].size == 1 and role.axis is not None:  # one number for all channels
                order = self._joint((node.outputs[0].name or "", None))
                behind = 0 if node.op_type in _NORMS else rank(node.outputs[0]) - 1 - role.axis
                joint = beside([a.reshape(-1) for a in arrays], 0, AxisMap(np.zeros_like(order.source), order.parent))
                joint = None if joint is None else joint.reshape(-1, *[1] * behind)
        elif index not in self._differing(node):
            return
        if joint is None:
            raise ModelError(f"{title(node)}: {name!r} differs between the networks where they have no channels")
        replace_constant(self.result.graph, target, index, joint)

    # --- nodes before and after ---

    def _visit_same(self, node: oir.Node, target: oir.Node) -> None:
        differing = self._differing(node)
        if differing and read_axis(node) is not None:
            self._visit_layer(node, target)
        elif differing:
            name = required(node, differing[0]).name
            raise ModelError(f"{title(node)}: {name!r} differs between the networks before their first layers")
        else:
            self._set(node, _Role(Kind.SAME))

    def _visit_mean(self, node: oir.Node, target: oir.Node) -> None:
        """What a mean goes through must be the same in all networks, but for what is added to it."""
        roles = {i: self._role(v) for i, v in enumerate(node.inputs) if v is not None}
        averaged = {i: role for i, role in roles.items() if role.kind >= Kind.MEAN}
        is_mean = all(role.kind == Kind.MEAN for role in averaged.values())
        for index in self._differing(node):
            value = required(node, index)
            if not is_mean or node.op_type not in ("Add", "Sub"):
                raise ModelError(
                    f"{title(node)}: {value.name!r} differs between the networks, but what it meets is averaged over "
                    f"them{self._frozen()}"
                )
            mean = sum(
                w * a.astype(np.float64) for w, a in zip(self.weights, self.arrays[value.name or ""], strict=True)
            )
            replace_constant(self.result.graph, target, index, np.asarray(mean))
        sources = frozenset().union(*(role.sources for role in averaged.values()))
        if _is_linear(node, set(averaged)):
            if is_mean and len(sources) > 1:
                sources = frozenset([node.outputs[0].name or ""])
            self._set(node, _Role(Kind.MEAN if is_mean else Kind.AFTER, sources=sources))
        elif len(sources) > 1:
            raise ModelError(f"{title(node)}: it combines outputs whose mean over the networks does not tell its own")
        else:
            self._set(node, _Role(Kind.AFTER, sources=sources))


def _is_linear(node: oir.Node, averaged: set[int]) -> bool:
    """Whether a weighted mean passes through `node`, up to a constant, when its other inputs are the same."""
    if node.op_type in _LINEAR or node.op_type == "BatchNormalization" or read_axis(node) is not None:
        return averaged == {0} or node.op_type == "Concat"
    if node.op_type in ("Mul", "MatMul"):
        return len(averaged) == 1
    return node.op_type in _SUMS or (node.op_type == "Div" and averaged == {0})
