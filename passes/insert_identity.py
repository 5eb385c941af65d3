"""Insert a layer or a residual block that changes nothing (exact), so that networks of unequal depth can be matched.

Behind a value x = f(z), with f idempotent (f(f(z)) = f(z), such as ReLU) or no activation at all:

    dense      f(I x + 0)
    conv       f(K * x + 0), K the Dirac kernel: 1 in the middle of each channel's own kernel
    residual   f(x + W2 g(W1 x)), W1 = I or K, W2 = 0; g is f, or ReLU where there is none

A batch norm in it has scale 1, shift 0, mean 0 and variance 1 - epsilon, so that it multiplies by exactly 1. W1 is not
zero, as in CLAFusion, but the identity: with two zero layers no gradient would ever reach either.

Sources: CLAFusion (Nguyen et al.), section 3.2, and Net2Net (Chen et al. 2016), "deeper".
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.labels import dims, rank
from onnxmerge.ir.normalise import infer_shapes
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.ir.weights import add_initializer, get_array

Kind = Literal["dense", "conv", "residual"]

_IDEMPOTENT = frozenset(("Relu", "Clip"))
_ACTIVATIONS = frozenset(
    (
        *("LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Gelu", "Sigmoid", "HardSigmoid", "HardSwish", "Mish", "Swish"),
        *("Tanh", "Softplus", "Softsign", "ThresholdedRelu", "Softmax", "LogSoftmax", "Erf", "Exp", "Log", "Shrink"),
    )
)
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
            value = piece.batch_norm(value)
        if self.kind == "residual":
            value = piece.layer(piece.activated(value, activation or oir.node("Relu", [None])), zero=True)
            if self.norm:
                value = piece.batch_norm(value)
            value = piece.node("Add", [value, source])
        if activation is not None:
            value = piece.activated(value, activation)
        piece.place()
        for node, index in readers:
            node.replace_input_with(index, value)
        if source.is_graph_output():
            _take_over_outputs(model, source, value, f"{piece.prefix}/before")
        infer_shapes(model)
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
        dirac = np.zeros((count, count // groups, *[kernel] * spatial))
        if not zero:
            middle = kernel**spatial // 2
            own = np.arange(count)
            dirac.reshape(count, count // groups, -1)[own, own % (count // groups), middle] = 1
        weight = self.array("weight", dirac)
        sizes = {"kernel_shape": [kernel] * spatial, "pads": [kernel // 2] * 2 * spatial}
        return self.node("Conv", [value, weight, bias], **sizes, group=groups)

    def batch_norm(self, value: oir.Value) -> oir.Value:
        """A batch norm that multiplies by 1: variance + epsilon is 1 in the value's own precision."""
        count = self.shape.channels
        parameters = {"scale": 1.0, "shift": 0.0, "mean": 0.0, "variance": 1.0 - _EPSILON}
        arrays = [self.array(role, np.full(count, number)) for role, number in parameters.items()]
        return self.node("BatchNormalization", [value, *arrays], epsilon=_EPSILON)

    def activated(self, value: oir.Value, like: oir.Node) -> oir.Value:
        """The activation `like` on `value`, with constants of its own."""
        bounds = [bound if bound is None else self.array("bound", get_array(bound)) for bound in like.inputs[1:]]
        return self.node(like.op_type, [value, *bounds], **{name: a.value for name, a in like.attributes.items()})

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


def _find(model: oir.Model, name: str) -> oir.Value:
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    found = next((value for value in values if value.name == name), None)
    if found is None:
        raise UsageError(f"the network computes no value {name!r}")
    return found


def _activation(source: oir.Value) -> oir.Node | None:
    """The idempotent activation that makes `source`, or None when no activation does."""
    node = source.producer()
    if node is None or node.op_type not in _ACTIVATIONS | _IDEMPOTENT:
        return None
    if node.op_type not in _IDEMPOTENT or any(v is not None and v.const_value is None for v in node.inputs[1:]):
        raise ModelError(
            f"{source.name!r} comes out of {node.op_type}, which is not idempotent: applied again it would change it"
        )
    return node


def _free_prefix(model: oir.Model, after: str) -> str:
    taken = {node.name or "" for node in model.graph}
    number = 1
    while any(name.startswith(f"{after}/identity{number}/") for name in taken):
        number += 1
    return f"{after}/identity{number}"


def _take_over_outputs(model: oir.Model, source: oir.Value, value: oir.Value, name: str) -> None:
    """Let `value` be the graph's output instead of `source`, under its name; `source` gets another."""
    source.name, value.name = name, source.name
    for index, output in enumerate(model.graph.outputs):
        if output is source:
            model.graph.outputs[index] = value
