"""Operators that act on each element alone: the channels of all operands are the same channels."""

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.labels import Trace, carries, channel_axes, dims
from onnxmerge.ir.rules.registry import is_constant, rule


@rule(
    *("Abs", "Ceil", "Celu", "Clip", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity"),
    *("LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Softplus"),
    *("Softsign", "Sqrt", "Tanh", "ThresholdedRelu", "Cast", "Dropout", "IsNaN", "IsInf"),
    *("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Mean", "Sum", "Where", "PRelu", "Mod"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor"),
)
def elementwise(node: oir.Node, trace: Trace) -> None:
    """Unite the operands' channels after numpy broadcasting; constants get slots on the channel axes.

    An operand that varies along a channel axis but carries no channels there (a graph input, a position table computed
    at run time) fixes the order.
    """
    operands = [value for value in node.inputs if value is not None]
    rank = max(len(dims(value)) for value in operands)
    labels = [_pad(trace.label(value), rank) for value in operands if not is_constant(value)]
    if not any(carries(label) for label in labels):
        return
    whole = max(labels, key=np.size)
    for label in labels:  # the first channel on each position stands for all
        whole = np.where(whole == -1, label, whole)
    varying = channel_axes(whole)
    computed = iter(labels)
    for value in operands:
        sizes = (1,) * (rank - len(dims(value))) + dims(value)
        spread = [axis for axis in varying if sizes[axis] != 1]
        if is_constant(value):
            _constant(trace, value, whole, spread, rank)
            continue
        label = next(computed)
        if any(label.shape[axis] == 1 for axis in spread) or (spread and not carries(label)):
            trace.freeze(node, "a channel axis meets a tensor that carries no channels there", *labels)
            return
        if carries(label) and (spread or not varying):  # a single channel spread over many is none of them
            trace.unite(label, whole)
    trace.set_label(node.outputs[0], whole)


def _constant(trace: Trace, value: oir.Value, whole: np.ndarray, spread: list[int], rank: int) -> None:
    if not spread:
        return
    for axis in channel_axes(whole):  # the constant is one along this axis: all its channels share the slot
        if axis not in spread:
            trace.unite(whole, whole.take([0], axis))
            whole = whole.take([0], axis)
    own = tuple(axis - (rank - len(dims(value))) for axis in spread)
    trace.use(value, own, whole)


def _pad(label: np.ndarray, rank: int) -> np.ndarray:
    return label.reshape((1,) * (rank - label.ndim) + label.shape) if label.ndim < rank else label


@rule("Softmax", "LogSoftmax")
def softmax(node: oir.Node, trace: Trace) -> None:
    """Symmetric in the entries of its axis, so any order of channels is as good."""
    value = node.inputs[0]
    assert value is not None
    trace.set_label(node.outputs[0], trace.label(value))
