"""Nodes with arrays that change nothing, and how they are put behind a value: for the passes that insert identities."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.labels import rank
from onnxmerge.ir.normalise import infer_shapes
from onnxmerge.ir.weights import add_initializer, get_array

_IDEMPOTENT = frozenset(("Relu", "Clip"))
_OTHERS = frozenset(
    (
        *("LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Gelu", "Sigmoid", "HardSigmoid", "HardSwish", "Mish", "Swish"),
        *("Tanh", "Softplus", "Softsign", "ThresholdedRelu", "Softmax", "LogSoftmax", "Erf", "Exp", "Log", "Shrink"),
    )
)
ACTIVATIONS = _IDEMPOTENT | _OTHERS
"""Nonlinearities. Behind one that is not idempotent nothing can be inserted."""
EPSILON = 1e-5
"""Of a batch norm."""


@dataclass(frozen=True)
class Shape:
    """What a layer to be inserted works on."""

    axis: int
    channels: int
    kernel: int | None
    """None for a matrix."""
    groups: int


class Piece:
    """The nodes to insert, in order, and their arrays."""

    def __init__(self, graph: oir.Graph, source: oir.Value, prefix: str, shape: Shape):
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
        kernels = dirac(count, count, groups, (kernel,) * spatial, (kernel // 2,) * spatial)
        weight = self.array("weight", np.zeros_like(kernels) if zero else kernels)
        sizes = {"kernel_shape": [kernel] * spatial, "pads": [kernel // 2] * 2 * spatial}
        return self.node("Conv", [value, weight, bias], **sizes, group=groups)

    def batch_norm(self, value: oir.Value, count: int, attributes: dict[str, object]) -> oir.Value:
        """A batch norm of `count` channels that multiplies by 1: variance + epsilon is 1 in the value's precision."""
        variance = 1.0 - float(attributes.get("epsilon", EPSILON))  # type: ignore[arg-type]
        parameters = {"scale": 1.0, "shift": 0.0, "mean": 0.0, "variance": variance}
        arrays = [self.array(role, np.full(count, number)) for role, number in parameters.items()]
        return self.node("BatchNormalization", [value, *arrays], **attributes)

    def activated(self, value: oir.Value, like: oir.Node) -> oir.Value:
        """The activation `like` on `value`, with constants of its own."""
        bounds = [bound if bound is None else self.array("bound", get_array(bound)) for bound in like.inputs[1:]]
        return self.node(like.op_type, [value, *bounds], **attributes_of(like))

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


def dirac(width: int, count: int, groups: int, kernel: tuple[int, ...], middle: tuple[int, ...]) -> np.ndarray:
    """[width, count / groups, *kernel] kernels that hand on the first channels of each group, the rest is zero."""
    array = np.zeros((width, count // groups, *kernel))
    for first in range(0, width, width // groups):
        for channel in range(min(width, count) // groups):
            array[(first + channel, channel, *middle)] = 1
    return array


def attributes_of(node: oir.Node) -> dict[str, object]:
    """By name, ready to make another node with."""
    return {name: attribute.value for name, attribute in node.attributes.items()}


def find_value(model: oir.Model, name: str) -> oir.Value:
    """The input or computed value of that name.

    Raises:
        UsageError: there is none.
    """
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    found = next((value for value in values if value.name == name), None)
    if found is None:
        raise UsageError(f"the network computes no value {name!r}")
    return found


def repeatable(source: oir.Value) -> oir.Node | None:
    """The idempotent activation that makes `source`, or None when no activation does.

    Raises:
        ModelError: the activation is not idempotent.
    """
    node = source.producer()
    if node is None or node.op_type not in ACTIVATIONS:
        return None
    if node.op_type not in _IDEMPOTENT or any(v is not None and v.const_value is None for v in node.inputs[1:]):
        raise ModelError(
            f"{source.name!r} comes out of {node.op_type}, which is not idempotent: applied again it would change it"
        )
    return node


def reroute(
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
