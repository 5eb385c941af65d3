"""Gemm and MatMul: a constant matrix reads the channels of one axis and makes fresh ones."""

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.labels import Trace, carries, channel_axes, dims, no_channels
from onnxmerge.ir.rules.registry import integer, is_constant, optional, required, rule


@rule("Gemm")
def gemm(node: oir.Node, trace: Trace) -> None:
    """Y = X W + b with W constant, [K, N] or [N, K] by transB."""
    data, weight, bias = required(node, 0), required(node, 1), optional(node, 2)
    label = trace.label(data)
    if not is_constant(weight) or integer(node, "transA", 0):
        trace.freeze(node, "both factors are computed or the data is transposed", label, trace.label(weight))
        return
    reads = 1 if integer(node, "transB", 0) else 0
    made = _linear(node, trace, label, weight, reads)
    if bias is None:
        return
    if not is_constant(bias):
        trace.freeze(node, "its bias is computed", trace.label(bias), made)
    elif dims(bias) and dims(bias)[-1] != 1:
        trace.use(bias, (len(dims(bias)) - 1,), made)


@rule("MatMul")
def matmul(node: oir.Node, trace: Trace) -> None:
    """Data [..., K] times a constant [K, N]; any other product of computed values freezes what reaches it."""
    data, weight = required(node, 0), required(node, 1)
    label = trace.label(data)
    if is_constant(weight) and len(dims(weight)) == 2 and label.ndim >= 2:
        _linear(node, trace, label, weight, 0)
    else:
        trace.freeze(node, "product of two computed values, or of a batch of matrices", label, trace.label(weight))


def _linear(node: oir.Node, trace: Trace, label: np.ndarray, weight: oir.Value, reads: int) -> np.ndarray:
    """Record both axes of `weight`, label the output, and return the fresh atoms."""
    last = label.ndim - 1
    if channel_axes(label) not in ((), (last,)):
        trace.freeze(node, "channels lie on an axis that the matrix does not read", label)
        label = no_channels(label.ndim)
    if carries(label):
        trace.use(weight, (reads,), label)
    count = dims(weight)[1 - reads]
    assert count is not None
    made = trace.fresh(count)
    trace.use(weight, (1 - reads,), made)
    trace.set_label(node.outputs[0], made.reshape((1,) * last + (count,)))
    return made
