"""Layers: a typed view over the graph, recomputed when the graph changes."""

import math
from dataclasses import dataclass

import onnx_ir as oir

from onnxmerge.ir.labels import dims
from onnxmerge.ir.weights import is_float

_LINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_NORMS = {"BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization"}
_ACTIVATIONS = {
    *("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Gelu", "Sigmoid", "HardSigmoid", "HardSwish", "Mish"),
    *("Tanh", "Softplus", "Softsign", "ThresholdedRelu", "Clip", "Softmax", "LogSoftmax"),
}


@dataclass(frozen=True)
class Layer:
    """A linear operator with its bias, norm and activation."""

    name: str
    node: oir.Node
    input: oir.Value
    weight: oir.Value
    bias: oir.Value | None
    linear: oir.Value
    """Output of the linear operator, bias included."""
    norm: oir.Node | None
    pre_activation: oir.Value
    """Output after the norm, before the nonlinearity."""
    activation: oir.Node | None

    @property
    def op(self) -> str:
        """Type of the linear operator."""
        return self.node.op_type

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for matrices."""
        return self.node.attributes["group"].as_int() if "group" in self.node.attributes else 1

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight as stored."""
        return tuple(int(size or 0) for size in dims(self.weight))

    @property
    def out_channels(self) -> int:
        """Channels (units) the layer makes."""
        shape = self.weight_shape
        if self.op == "Conv" or (self.op == "Gemm" and self.transposed):
            return shape[0]
        return shape[1] * self.groups if self.op == "ConvTranspose" else shape[-1]

    @property
    def transposed(self) -> bool:
        """Whether a Gemm stores its weight as [out, in]."""
        return "transB" in self.node.attributes and self.node.attributes["transB"].as_int() == 1

    @property
    def parameters(self) -> int:
        """Weights, biases and norm parameters."""
        norm = [] if self.norm is None else [v for v in self.norm.inputs[1:] if v is not None]
        arrays = [self.weight, *([] if self.bias is None else [self.bias]), *norm]
        return sum(math.prod(int(size or 0) for size in dims(array)) for array in arrays)

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates for one sample; None where a spatial size is unknown."""
        positions = dims(self.input if self.op == "ConvTranspose" else self.linear)[1:]
        channels_last = self.op in ("Gemm", "MatMul")
        spatial = positions[:-1] if channels_last else positions[1:]
        if any(size is None for size in spatial):
            return None
        return math.prod(self.weight_shape) * math.prod(int(size or 0) for size in spatial)


def find_layers(model: oir.Model) -> list[Layer]:
    """The layers of a normalised model in topological order."""
    return [layer for node in model.graph if (layer := _layer(node)) is not None]


def _layer(node: oir.Node) -> Layer | None:
    if node.op_type not in _LINEAR or node.domain not in ("", "ai.onnx"):
        return None
    data, weight = node.inputs[0], node.inputs[1]
    if data is None or weight is None or weight.const_value is None or not is_float(weight):
        return None
    if any(name in node.attributes and node.attributes[name].as_float() != 1 for name in ("alpha", "beta")):
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and bias.const_value is None:
        return None
    linear = node.outputs[0]
    if node.op_type == "MatMul":
        bias, linear = _added_bias(linear)
    norm = _only_consumer(linear, _NORMS)
    pre_activation = linear if norm is None else norm.outputs[0]
    activation = _only_consumer(pre_activation, _ACTIVATIONS)
    return Layer(weight.name or "", node, data, weight, bias, linear, norm, pre_activation, activation)


def _added_bias(product: oir.Value) -> tuple[oir.Value | None, oir.Value]:
    """The bias that an Add puts on a MatMul's output and the sum, or (None, product)."""
    add = _only_consumer(product, {"Add"})
    if add is not None:
        other = add.inputs[1] if add.inputs[0] is product else add.inputs[0]
        if other is not None and other.const_value is not None and math.prod(dims(other)) == dims(other)[-1]:  # type: ignore[arg-type]
            return other, add.outputs[0]
    return None, product


def _only_consumer(value: oir.Value, op_types: set[str]) -> oir.Node | None:
    """The node that alone reads `value`, as its first input or as a summand, when it is one of `op_types`."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node, index = uses[0]
    if node.op_type not in op_types or (index != 0 and node.op_type != "Add"):
        return None
    return node


def parameter_count(model: oir.Model) -> int:
    """Number of floating-point elements stored in initializers."""
    return sum(
        v.const_value.size for v in model.graph.initializers.values() if v.const_value is not None and is_float(v)
    )
