"""Insert a layer or a residual block that changes nothing (exact), so that networks of unequal depth can be matched.

Behind a value x = f(z), with f idempotent (f(f(z)) = f(z), such as ReLU) or no activation at all:

    dense      f(I x + 0)
    conv       f(K * x + 0), K the Dirac kernel: 1 in the middle of each channel's own kernel
    residual   f(x + W2 g(W1 x)), W1 = I or K, W2 = 0; g is f, or ReLU where there is none

A batch norm in it has scale 1, shift 0, mean 0 and variance 1 - epsilon, so that it multiplies by exactly 1. W1 is not
zero, as in CLAFusion, but the identity: with two zero layers no gradient would ever reach either.

`InsertIdentity` makes the layer or block itself; `InsertLike` copies the operators of another network's, so that both
graphs match node by node.

Sources: CLAFusion (Nguyen et al.), section 3.2, and Net2Net (Chen et al. 2016), "deeper".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.labels import dims, rank
from onnxmerge.ir.normalise import infer_shapes
from onnxmerge.ir.rules.registry import integer, required
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.ir.weights import add_initializer, get_array
from onnxmerge.passes.roles import LAYERS, read_axis, title

Kind = Literal["dense", "conv", "residual"]

_IDEMPOTENT = frozenset(("Relu", "Clip"))
_OTHERS = frozenset(
    (
        *("LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Gelu", "Sigmoid", "HardSigmoid", "HardSwish", "Mish", "Swish"),
        *("Tanh", "Softplus", "Softsign", "ThresholdedRelu", "Softmax", "LogSoftmax", "Erf", "Exp", "Log", "Shrink"),
    )
)
ACTIVATIONS = _IDEMPOTENT | _OTHERS
"""Nonlinearities. Behind one that is not idempotent nothing can be inserted."""
_KEEPS_RANGE = frozenset(
    (
        *("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"),
        *("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose"),
    )
)
"""Operators whose results lie between the least and the greatest of what they read."""
_KEEPS_ZERO = frozenset(("Relu", "LeakyRelu", "PRelu"))
_GEOMETRY = ("strides", "dilations", "pads")
_EPSILON = 1e-5


class InsertIdentity(oir.passes.InPlacePass):
    """Insert one layer or block behind a value; whatever read the value reads what comes out.

    Args:
        after: name of the value.
        kind: "dense" works on the last axis, "conv" on axis 1, "residual" on whichever carries the channels.
        kernel: size of a convolution's kernel along every axis of space, odd.
        norm: put a batch norm behind each layer inserted.
        groups: of the convolutions.
        name: prefix of the new nodes, values and arrays; derived from `after` when not given.
    """

    preserves = "exact"

    def __init__(
        self, after: str, kind: Kind, *, kernel: int = 3, norm: bool = False, groups: int = 1, name: str | None = None
    ):
        self.after = after
        self.kind = kind
        self.kernel = kernel
        self.norm = norm
        self.groups = groups
        self.name = name

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Insert it.

        Raises:
            UsageError: there is no such value, or kernel or groups do not fit.
            ModelError: the value's activation is not idempotent, or its shape fits no such layer.
        """
        source = _find(model, self.after)
        activation = _activation(source)
        axis = self._channel_axis(model, source)
        size = dims(source)[axis]
        if size is None or source.dtype is None:
            raise ModelError(f"{self.after!r}: the number of its channels is not known")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UsageError(f"a kernel of size {self.kernel} has no middle: the size must be odd")
        if self.groups < 1 or size % self.groups:
            raise UsageError(f"{self.after!r}: {size} channels cannot be parted into {self.groups} groups")
        convolution = self.kind == "conv" or (self.kind == "residual" and axis == 1 and rank(source) > 2)
        if source.is_graph_input() and source.is_graph_output():
            raise ModelError(f"{self.after!r} is an input and an output: nothing can stand between")
        readers = list(source.uses())
        shape = _Shape(axis, size, self.kernel if convolution else None, self.groups)
        piece = _Piece(model.graph, source, self.name or _free_prefix(model, self.after), shape)
        value = piece.layer(source, zero=False)
        if self.norm:
            value = piece.batch_norm(value, size, {"epsilon": _EPSILON})
        if self.kind == "residual":
            value = piece.layer(piece.activated(value, activation or oir.node("Relu", [None])), zero=True)
            if self.norm:
                value = piece.batch_norm(value, size, {"epsilon": _EPSILON})
            value = piece.node("Add", [value, source])
        if activation is not None:
            value = piece.activated(value, activation)
        piece.place()
        _reroute(model, source, value, readers, piece.prefix)
        return oir.passes.PassResult(model, modified=True)

    def _channel_axis(self, model: oir.Model, source: oir.Value) -> int:
        count = rank(source)
        lowest = {"dense": 2, "conv": 3, "residual": 2}[self.kind]
        if count < lowest:
            raise ModelError(f"{self.after!r} has rank {count}, but kind {self.kind!r} needs at least rank {lowest}")
        carried = [
            s.axes for space in find_spaces(model).spaces for s in space.values if s.name == self.after and s.axes
        ]
        last = self.kind == "dense" or count == 2 or (self.kind == "residual" and (count - 1,) in carried)
        axis = count - 1 if last else 1
        if carried and (axis,) not in carried:
            raise ModelError(f"{self.after!r} has its channels on axes {carried[0]}: kind {self.kind!r} does not fit")
        if self.norm and axis != 1:
            raise ModelError(f"{self.after!r} has its channels on axis {axis}: a batch norm needs them on axis 1")
        return axis


class InsertLike(oir.passes.InPlacePass):
    """Insert a copy of another network's step: the same operators and attributes, with arrays that change nothing.

    A layer becomes I or K. In a residual block the branch's last layer becomes zero and those before it I or K; their
    widths keep their ratio to the block's. What the copy makes is called NAME/end.

    Args:
        after: name of the value behind which the copy goes.
        nodes: the step in topological order, as it stands in its own normalised network: it reads one computed value,
            and its last node makes what it hands on.
        again: whether to put behind the copy, once more, the activation that lies before `after`.
        name: prefix of the new nodes, values and arrays.
    """

    preserves = "exact"

    def __init__(self, after: str, nodes: Sequence[oir.Node], *, again: bool, name: str):
        self.after = after
        self.nodes = nodes
        self.again = again
        self.name = name

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Insert it.

        Raises:
            UsageError: there is no such value.
            ModelError: the step changes sizes, is no layer or block with an identity skip, does not fit the value, or
                the activation is not idempotent.
        """
        source = _find(model, self.after)
        activation = _activation_before(source) if self.again else None
        readers = list(source.uses())
        convolution = any(node.op_type == "Conv" for node in self.nodes)
        entry, axis = _entry(self.nodes), 1 if convolution else -1
        count, own = dims(source)[axis], dims(entry)[axis]
        if rank(source) != rank(entry) or count is None or own is None or source.dtype is None:
            raise ModelError(
                f"a step that reads {entry.name!r} of shape {list(dims(entry))} does not fit behind {source.name!r} of "
                f"shape {list(dims(source))}"
            )
        piece = _Piece(model.graph, source, self.name, _Shape(axis, count, None, 1))
        copy = _Copy(piece, count / own, _branch_end(self.nodes, entry), {entry: (source, count)})
        for node in self.nodes:
            copy.add(node)
        value, _ = copy.made[self.nodes[-1].outputs[0]]
        value.name = f"{self.name}/end"
        if activation is not None:
            value = piece.activated(value, activation)
        piece.place()
        _reroute(model, source, value, readers, self.name)
        return oir.passes.PassResult(model, modified=True)


@dataclass(frozen=True)
class _Shape:
    axis: int
    channels: int
    kernel: int | None
    """None for a matrix."""
    groups: int


class _Piece:
    """The nodes to insert, in order, and their arrays."""

    def __init__(self, graph: oir.Graph, source: oir.Value, prefix: str, shape: _Shape):
        self.graph, self.source, self.prefix, self.shape = graph, source, prefix, shape
        assert source.dtype is not None
        self.dtype = source.dtype.numpy()
        self.nodes: list[oir.Node] = []

    def node(self, op_type: str, inputs: list[oir.Value | None], **attributes: object) -> oir.Value:
        """Add a node and return its output."""
        name = f"{self.prefix}/{len(self.nodes)}_{op_type}"
        made = oir.node(op_type, inputs, attributes, name=name)  # type: ignore[arg-type]
        made.outputs[0].name = f"{name}_output"
        made.outputs[0].shape, made.outputs[0].type = self.source.shape, self.source.type
        self.nodes.append(made)
        return made.outputs[0]

    def array(self, role: str, array: np.ndarray) -> oir.Value:
        """Register an array under the name of the next node."""
        return add_initializer(self.graph, f"{self.prefix}/{len(self.nodes)}_{role}", array.astype(self.dtype))

    def layer(self, value: oir.Value, *, zero: bool) -> oir.Value:
        """A layer that passes `value` on, or makes zeros of it."""
        count, kernel, groups = self.shape.channels, self.shape.kernel, self.shape.groups
        bias = self.array("bias", np.zeros(count))
        if kernel is None:
            weight = self.array("weight", np.zeros((count, count)) if zero else np.eye(count))
            if rank(self.source) == 2:
                return self.node("Gemm", [value, weight, bias], transB=1)
            return self.node("Add", [self.node("MatMul", [value, weight]), bias])
        spatial = rank(self.source) - 2
        kernels = _dirac(count, count, groups, (kernel,) * spatial, (kernel // 2,) * spatial)
        weight = self.array("weight", np.zeros_like(kernels) if zero else kernels)
        sizes = {"kernel_shape": [kernel] * spatial, "pads": [kernel // 2] * 2 * spatial}
        return self.node("Conv", [value, weight, bias], **sizes, group=groups)

    def batch_norm(self, value: oir.Value, count: int, attributes: dict[str, object]) -> oir.Value:
        """A batch norm of `count` channels that multiplies by 1: variance + epsilon is 1 in the value's precision."""
        variance = 1.0 - float(attributes.get("epsilon", _EPSILON))  # type: ignore[arg-type]
        parameters = {"scale": 1.0, "shift": 0.0, "mean": 0.0, "variance": variance}
        arrays = [self.array(role, np.full(count, number)) for role, number in parameters.items()]
        return self.node("BatchNormalization", [value, *arrays], **attributes)

    def activated(self, value: oir.Value, like: oir.Node) -> oir.Value:
        """The activation `like` on `value`, with constants of its own."""
        bounds = [bound if bound is None else self.array("bound", get_array(bound)) for bound in like.inputs[1:]]
        return self.node(like.op_type, [value, *bounds], **_attributes(like))

    def place(self) -> None:
        """Put the nodes behind the one that makes the source."""
        producer = self.source.producer()
        first = next(iter(self.graph), None)
        if producer is not None:
            self.graph.insert_after(producer, self.nodes)
        elif first is not None:
            self.graph.insert_before(first, self.nodes)
        else:
            self.graph.extend(self.nodes)


@dataclass
class _Copy:
    """The copy of a step under way."""

    piece: _Piece
    ratio: float
    """Channels of the value behind which the copy goes, over those that the step itself reads."""
    last: oir.Node | None
    """The layer that ends a residual branch and becomes zero; None for a step that is one layer."""
    made: dict[oir.Value, tuple[oir.Value, int]]
    """Value of the step -> its copy and that copy's channels."""

    def add(self, node: oir.Node) -> None:
        """Copy one node whose inputs have been copied."""
        inputs = [None if v is None else self.made.get(v) for v in node.inputs]
        (value, count), *others = [given for given in inputs if given is not None]
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            made = self._layer(node, value, count)
        elif node.op_type == "BatchNormalization":
            made = self.piece.batch_norm(value, count, _attributes(node)), count
        elif node.op_type == "Add" and not others:
            zeros = self.piece.array("bias", np.zeros(count))
            made = self.piece.node("Add", [zeros if given is None else value for given in inputs]), count
        elif node.op_type == "Add" and self.last is not None:
            made = self.piece.node("Add", [given[0] for given in inputs if given is not None]), count
        elif node.op_type in ACTIVATIONS and self.last is not None:
            made = self._activation(node, value, count), count
        else:
            raise ModelError(f"{title(node)} cannot be made to change nothing, so no step like its own can be inserted")
        self.made[node.outputs[0]] = made

    def _layer(self, node: oir.Node, value: oir.Value, count: int) -> tuple[oir.Value, int]:
        weight = node.inputs[1]
        axis = read_axis(node)
        if axis is None or weight is None:
            raise ModelError(f"{title(node)} has no constant matrix or kernel, so no step like its own can be inserted")
        width = count if self.last is None else max(1, round(self.ratio * int(dims(weight)[1 - axis] or 0)))
        groups = integer(node, "group", 1)
        if count % groups or width % groups:
            raise ModelError(f"{title(node)}: {count} -> {width} channels cannot be parted into its {groups} groups")
        if node.op_type == "Conv":
            array = _dirac(width, count, groups, tuple(int(size or 0) for size in dims(weight)[2:]), _middle(node))
        else:
            array = np.eye(width, count) if axis == 1 else np.eye(count, width)
        arrays = [self.piece.array("weight", np.zeros_like(array) if node is self.last else array)]
        arrays += [self.piece.array("bias", np.zeros(width)) for _ in node.inputs[2:]]
        return self.piece.node(node.op_type, [value, *arrays], **_attributes(node)), width

    def _activation(self, node: oir.Node, value: oir.Value, count: int) -> oir.Value:
        """Its slopes or bounds go along; one for each channel becomes their mean, as the channels are others."""
        arrays: list[oir.Value | None] = []
        for given in node.inputs[1:]:
            array = None if given is None else get_array(given)
            if array is not None and array.size > 1:
                array = np.full([count if size > 1 else 1 for size in array.shape], array.mean())
            arrays.append(None if array is None else self.piece.array("bound", array))
        return self.piece.node(node.op_type, [value, *arrays], **_attributes(node))


def _entry(nodes: Sequence[oir.Node]) -> oir.Value:
    """The one computed value that a step's nodes read and do not make."""
    own = {value for node in nodes for value in node.outputs}
    read = dict.fromkeys(v for node in nodes for v in node.inputs if v is not None and v.const_value is None)
    entries = [value for value in read if value not in own]
    if len(entries) != 1:
        names = ", ".join(repr(value.name) for value in entries)
        raise ModelError(f"the step that ends with {title(nodes[-1])} reads {names}: only one value can be passed on")
    return entries[0]


def _branch_end(nodes: Sequence[oir.Node], entry: oir.Value) -> oir.Node | None:
    """The last layer of a residual block's branch; None when the step does not end in a sum."""
    computed = [value for value in nodes[-1].inputs if value is not None and value.const_value is None]
    if len(computed) == 1:
        return None
    if nodes[-1].op_type != "Add" or entry not in computed:
        raise ModelError(
            f"{title(nodes[-1])} does not add what its block reads: only blocks with an identity skip can be inserted"
        )
    value = computed[1 - computed.index(entry)]
    while (node := value.producer()) is not None and node in nodes:
        if node.op_type in LAYERS:
            return node
        read = [v for v in node.inputs if v is not None and v.const_value is None]
        if len(read) != 1 or node.op_type not in _KEEPS_ZERO | {"Add", "BatchNormalization"}:
            break
        value = read[0]
    raise ModelError(f"{title(nodes[-1])} adds {value.name!r}, which no layer of its branch can make zero")


def _middle(node: oir.Node) -> tuple[int, ...]:
    """Where a convolution's kernel holds the place it stands for.

    Raises:
        ModelError: its output is not as large as its input.
    """
    kernel = [int(size or 0) for size in dims(required(node, 1))[2:]]
    given = {name: list(node.attributes[name].as_ints()) for name in _GEOMETRY if name in node.attributes}
    dilations = given.get("dilations", [1] * len(kernel))
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    mode = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    if mode.startswith("SAME"):
        before = [(total + (mode == "SAME_LOWER")) // 2 for total in reach]
        after = [total - first for total, first in zip(reach, before, strict=True)]
    else:
        pads = given.get("pads", [0] * 2 * len(kernel)) if mode == "NOTSET" else [0] * 2 * len(kernel)
        before, after = pads[: len(kernel)], pads[len(kernel) :]
    strided = any(step != 1 for step in given.get("strides", []))
    fits = all(b + a == r and b % d == 0 for b, a, r, d in zip(before, after, reach, dilations, strict=True))
    if strided or not fits:
        raise ModelError(f"{title(node)} makes fewer or other places than it reads, so nothing like it changes nothing")
    return tuple(b // d for b, d in zip(before, dilations, strict=True))


def _dirac(width: int, count: int, groups: int, kernel: tuple[int, ...], middle: tuple[int, ...]) -> np.ndarray:
    """[width, count / groups, *kernel] kernels that hand on the first channels of each group, the rest is zero."""
    array = np.zeros((width, count // groups, *kernel))
    for first in range(0, width, width // groups):
        for channel in range(min(width, count) // groups):
            array[(first + channel, channel, *middle)] = 1
    return array


def _attributes(node: oir.Node) -> dict[str, object]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _find(model: oir.Model, name: str) -> oir.Value:
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    found = next((value for value in values if value.name == name), None)
    if found is None:
        raise UsageError(f"the network computes no value {name!r}")
    return found


def _activation(source: oir.Value) -> oir.Node | None:
    """The idempotent activation that makes `source`, or None when no activation does."""
    node = source.producer()
    if node is None or node.op_type not in ACTIVATIONS:
        return None
    if node.op_type not in _IDEMPOTENT or any(v is not None and v.const_value is None for v in node.inputs[1:]):
        raise ModelError(
            f"{source.name!r} comes out of {node.op_type}, which is not idempotent: applied again it would change it"
        )
    return node


def _activation_before(source: oir.Value) -> oir.Node:
    """The idempotent activation whose range `source` keeps, be there pooling or reshaping between."""
    value = source
    while (node := value.producer()) is not None and node.op_type in _KEEPS_RANGE:
        if integer(node, "count_include_pad", 0):
            break
        value = required(node, 0)
    activation = _activation(value)
    if activation is None:
        raise ModelError(f"no activation makes {source.name!r}, so one put behind it would change it")
    return activation


def _free_prefix(model: oir.Model, after: str) -> str:
    taken = {node.name or "" for node in model.graph}
    number = 1
    while any(name.startswith(f"{after}/identity{number}/") for name in taken):
        number += 1
    return f"{after}/identity{number}"


def _reroute(
    model: oir.Model, source: oir.Value, value: oir.Value, readers: Sequence[tuple[oir.Node, int]], prefix: str
) -> None:
    """Let `readers` and the graph's outputs read `value` instead of `source`, and infer the shapes."""
    for node, index in readers:
        node.replace_input_with(index, value)
    if source.is_graph_output():
        _take_over_outputs(model, source, value, f"{prefix}/before")
    infer_shapes(model)


def _take_over_outputs(model: oir.Model, source: oir.Value, value: oir.Value, name: str) -> None:
    """Let `value` be the graph's output instead of `source`, under its name; `source` gets another."""
    source.name, value.name = name, source.name
    for index, output in enumerate(model.graph.outputs):
        if output is source:
            model.graph.outputs[index] = value
