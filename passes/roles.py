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
_BY_SIZE = frozenset(("Reshape", "Expand", "Tile", "Resize", "Slice", "Split", "Pad"))
"""Operators that are told sizes by other inputs than the first."""
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
    if not axes:
        return None
    if node.domain not in ("", "ai.onnx"):
        return "it is of an unknown domain"
    if op == "Shape":
        return "the number of channels goes into a computation" if _becomes_number(node, axes) else None
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


def _becomes_number(shape: oir.Node, axes: set[int]) -> bool:
    """Whether a size along `axes` that a Shape tells is turned into a floating-point number, as for a mean or a scale.

    Sizes that say how to reshape follow by themselves.
    """
    entries = list(range(rank(required(shape, 0))))
    end = integer(shape, "end", len(entries))
    pending = [(shape.outputs[0], entries[integer(shape, "start", 0) : end], True)]
    while pending:
        value, entries, in_order = pending.pop()
        for node, index in value.uses():
            if index > 0 and node.op_type in _BY_SIZE:
                continue
            if node.op_type == "Cast" and oir.DataType(integer(node, "to", 0)).is_floating_point():
                if axes & set(entries):
                    return True
                continue
            picks = in_order and index == 0 and node.op_type in ("Gather", "Slice")
            own = _chosen(node, entries) if picks else entries
            known = picks or (in_order and node.op_type in ("Squeeze", "Unsqueeze", "Identity", "Cast"))
            pending += [(output, own, known) for output in node.outputs]
    return False


def _chosen(node: oir.Node, entries: list[int]) -> list[int]:
    """The entries that a Gather or a Slice picks; all of them when that is computed."""
    constants = [v.const_value for v in node.inputs[1:] if v is not None]
    given = [tensor.numpy() for tensor in constants if tensor is not None]
    if len(given) < len(node.inputs) - 1:
        return entries
    if node.op_type == "Gather":
        return [entries[int(place)] for place in given[0].ravel()]
    starts, ends = (int(bound.item()) for bound in given[:2])
    return entries[starts : ends : int(given[3].item()) if len(given) > 3 else 1]
