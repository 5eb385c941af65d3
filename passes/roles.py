"""What one node does along the axes of what it reads: the questions that pruning and widening ask."""

from collections.abc import Iterable

import onnx_ir as oir

from onnxmerge.ir.labels import rank
from onnxmerge.ir.rules.registry import axes_of, integer, optional, required

_ELEMENTWISE = frozenset(
    (
        *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Elu"),
        *("Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg"),
        *("Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus"),
        *("Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Cast", "Dropout", "IsNaN", "IsInf"),
        *("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Mean", "Sum", "Where", "PRelu", "Mod"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor"),
    )
)
MOVES = frozenset(
    (
        *("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Split", "Slice", "Gather"),
        *("Expand", "Tile", "Pad", "Identity"),
    )
)
"""Operators that only move, pick, repeat or pad elements."""
_ON_AXIS_1 = frozenset(
    (
        *("BatchNormalization", "InstanceNormalization", "Resize", "Upsample"),
        *("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"),
    )
)
_ALONG_AXIS = {"Softmax": -1, "LogSoftmax": -1, "Hardmax": -1, "LpNormalization": -1}
_FROM_AXIS = frozenset(("LayerNormalization", "RMSNormalization"))
_OVER_CHANNELS = frozenset(("GroupNormalization", "MeanVarianceNormalization", "LRN"))
LAYERS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
"""Operators that sum channels times a weight."""
_SUMS = frozenset(("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"))


def title(node: oir.Node) -> str:
    """How messages call a node."""
    return f"{node.op_type} {node.name or node.outputs[0].name!r}"


def read_axis(node: oir.Node) -> int | None:
    """The axis of the weight, input 1 of a layer, that reads channels; the other of the first two makes them.

    None when the node is no layer with a constant matrix or kernel.
    """
    weight = optional(node, 1)
    if node.op_type not in LAYERS or node.domain not in ("", "ai.onnx") or weight is None or weight.const_value is None:
        return None
    if node.op_type in ("Gemm", "MatMul"):
        if rank(weight) != 2 or integer(node, "transA", 0):
            return None
        return integer(node, "transB", 0)
    return 1 if node.op_type == "Conv" else 0


def sums_over(node: oir.Node, index: int, axes: Iterable[int]) -> bool:
    """Whether `node` only sums the entries of its computed input `index` along one of `axes`.

    A channel that is zero may be left out of such a sum.
    """
    if node.op_type in _SUMS:
        return bool(set(axes) & set(_reduced(node)))
    if node.op_type == "MatMul" and all(value is not None and value.const_value is None for value in node.inputs):
        last = rank(required(node, index)) - 1
        return (last if index == 0 else last - 1) in axes
    return False


def why_not_alone(node: oir.Node, index: int, axes: Iterable[int]) -> str | None:
    """Why `node` does not treat each entry of its input `index` along `axes` by itself, or None when it does.

    A layer that reads the axis with its weight counts as treating each by itself.
    """
    axes, op = set(axes), node.op_type
    if not axes or op == "Shape":
        return None
    if node.domain not in ("", "ai.onnx"):
        return "it is of an unknown domain"
    if op in _ELEMENTWISE or op in MOVES:
        return "channels lie in what says how it moves others" if op in MOVES - {"Concat"} and index > 0 else None
    if op in _ON_AXIS_1:
        return None if axes == {1} and index == 0 else "channels are not on axis 1 alone"
    if op in _ALONG_AXIS:
        along = integer(node, "axis", _ALONG_AXIS[op]) % rank(required(node, index))
        return "it normalises over channels" if along in axes else None
    if op in _FROM_AXIS:
        first = integer(node, "axis", -1) % rank(required(node, 0))
        return "it normalises over channels" if any(axis >= first for axis in axes) else None
    if op in _OVER_CHANNELS:
        return "it normalises over channels"
    if op.startswith("Reduce") and index == 0:
        return "it reduces over channels" if axes & set(_reduced(node)) else None
    if op in LAYERS:
        if read_axis(node) is not None:
            return None
        if op == "MatMul" and not any(v is not None and v.const_value is not None for v in node.inputs):
            return "it sums products of channels" if sums_over(node, index, axes) else None
    return "it is not known to treat each channel by itself"


def _reduced(node: oir.Node) -> list[int]:
    count = rank(required(node, 0))
    axes = axes_of(node, 1, count)
    if axes is None:
        return [] if integer(node, "noop_with_empty_axes", 0) else list(range(count))
    return axes
