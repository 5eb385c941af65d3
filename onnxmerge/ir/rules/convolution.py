"""Convolutions: fresh channels out of the channels they read; depthwise ties its output to its input."""

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.labels import Rows, Trace, carries, dims
from onnxmerge.ir.rules.registry import integer, is_constant, optional, required, rule


@rule("Conv")
def convolution(node: oir.Node, trace: Trace) -> None:
    """Weight [M, C/g, *kernel]: axis 0 makes M channels, axis 1 reads the C/g channels of its group."""
    _convolve(node, trace, required(node, 1), [optional(node, 2)])


@rule("ConvTranspose")
def transposed_convolution(node: oir.Node, trace: Trace) -> None:
    """Weight [C, M/g, *kernel]: axis 0 reads C channels, axis 1 makes the M/g channels of their group."""
    _convolve(node, trace, required(node, 1), [optional(node, 2)], transposed=True)


@rule("ConvInteger")
def integer_convolution(node: oir.Node, trace: Trace) -> None:
    """Conv of integers; the weight's zero point may be one for each output channel."""
    _convolve(node, trace, required(node, 1), [optional(node, 3)])


@rule("QLinearConv")
def quantized_convolution(node: oir.Node, trace: Trace) -> None:
    """Conv of quantised numbers; the weight's scale and zero point may be one for each output channel."""
    _convolve(node, trace, required(node, 3), [optional(node, 4), optional(node, 5), optional(node, 8)])


def _convolve(
    node: oir.Node, trace: Trace, weight: oir.Value, per_output: list[oir.Value | None], transposed: bool = False
) -> None:
    """Record both axes of the weight and all arrays with one entry for each output channel, and label the output."""
    data = required(node, 0)
    label = trace.label(data)
    if not is_constant(weight):
        trace.freeze(node, "its weight is computed", label, trace.label(weight))
        return
    label = trace.along(node, label, 1)
    groups = integer(node, "group", 1)
    rows, columns = int(dims(weight)[0] or 0), int(dims(weight)[1] or 0)
    made_count, read_count = (columns * groups, rows) if transposed else (rows, columns * groups)
    if dims(data)[1] not in (None, read_count):
        raise ModelError(f"{node.op_type} {node.name!r} reads {read_count} channels but is given {dims(data)[1]}")
    made = trace.fresh(made_count).reshape(groups, -1)
    read = np.broadcast_to(label.ravel(), read_count).reshape(groups, -1)  # one label may stand for all channels
    ordered, by_group = (read, made) if transposed else (made, read)  # along axis 0, and along axis 1 in each group
    tied = carries(label) and groups > 1 and read.shape[1] == 1
    if tied:  # depthwise, with one or more outputs for each input channel
        trace.unite(made, read)
    elif groups > 1:
        for own in [*made, *(read if carries(label) else ())]:
            trace.tag(own)
    if carries(ordered):
        trace.use(weight, (0,), ordered)
    if carries(by_group) and not tied:
        size = rows // groups
        for group, own in enumerate(by_group):
            trace.use(weight, (1,), own, Rows(0, group * size, (group + 1) * size) if groups > 1 else None)
    for array in per_output:
        if array is None or dims(array) != (made_count,):
            continue  # one scale for all channels
        if is_constant(array):
            trace.use(array, (0,), made)
        else:
            trace.freeze(node, "its bias is computed", trace.label(array), made)
    trace.set_label(node.outputs[0], made.reshape([made_count if axis == 1 else 1 for axis in range(label.ndim)]))
