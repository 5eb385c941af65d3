"""Operators that act on each element alone: the channels of all operands are the same channels."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.labels import Trace, aligned, carries, channel_axes, dims
from onnxmerge.ir.rules.registry import rule, source_axis


@rule(
    *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Elu", "Erf"),
    *("Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Not"),
    *("Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign"),
    *("Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Cast", "CastLike", "Dropout", "IsNaN", "IsInf"),
    *("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Mean", "Sum", "Where", "PRelu", "Mod"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor"),
    *("BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "BitShift"),
)
def elementwise(node: oir.Node, trace: Trace) -> None:
    """Unite the operands' channels after numpy broadcasting; see `broadcast`."""
    operands = [value for value in node.inputs if value is not None]
    for output in node.outputs:
        broadcast(node, trace, [(trace.label(value), value) for value in operands], output)


Operand = tuple[np.ndarray, oir.Value]
"""The label of an operand, and the value that it labels."""


def broadcast(node: oir.Node, trace: Trace, operands: Sequence[Operand], output: oir.Value) -> None:
    """Label `output`, which numpy broadcasting makes of the operands; weights get slots on the channel axes.

    An operand that varies along a channel axis but carries no channels there (a graph input, a position table computed
    at run time) fixes the order along it.
    """
    rank = max(len(dims(value)) for _, value in operands)
    labels = [aligned(label, rank) for label, _ in operands]
    if not any(carries(label) for label in labels):
        return
    axes = channel_axes(max(labels, key=np.size))
    computed: list[tuple[np.ndarray, Sequence[int]]] = []
    weights: list[tuple[oir.Value, list[int], list[int]]] = []
    for label, (_, value) in zip(labels, operands, strict=True):
        sizes = [1] * (rank - len(dims(value))) + [int(size or 0) for size in dims(value)]
        spread = [axis for axis in axes if sizes[axis] > 1]
        sources = [source_axis(value, axis - (rank - len(dims(value)))) for axis in spread]
        found = [source for source in sources if source is not None]
        if carries(label) or len(found) < len(spread):
            computed.append((label, sizes))
        elif spread:
            weights.append((found[0][0], [axis for _, axis in found], spread))
    whole = trace.combine(node, computed)
    for weight, own, spread in weights:
        trace.use_partly(weight, own, whole, spread)
    trace.set_label(output, whole)
