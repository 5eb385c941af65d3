"""Conv: fresh channels out of the channels it reads; depthwise ties its output to its input."""

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.labels import Rows, Trace, carries, channel_axes, dims, no_channels
from onnxmerge.ir.rules.registry import integer, is_constant, optional, required, rule


@rule("Conv")
def convolution(node: oir.Node, trace: Trace) -> None:
    """Weight [M, C/g, *kernel]: axis 0 makes M channels, axis 1 reads the C/g channels of its group."""
    data, weight, output = required(node, 0), required(node, 1), node.outputs[0]
    label = trace.label(data)
    if not is_constant(weight):
        trace.freeze(node, "its weight is computed", label, trace.label(weight))
        return
    if channel_axes(label) not in ((), (1,)):
        trace.freeze(node, "channels lie on a spatial axis", label)
        label = no_channels(label.ndim)
    made_count, read_count = dims(weight)[0], dims(weight)[1]
    groups = integer(node, "group", 1)
    assert made_count is not None and read_count is not None
    if dims(data)[1] not in (None, read_count * groups):
        raise ModelError(f"Conv {node.name!r} reads {read_count * groups} channels but is given {dims(data)[1]}")
    made = trace.fresh(made_count)
    read = np.broadcast_to(label.ravel(), read_count * groups)  # one label may stand for all channels
    if groups == 1:
        if carries(label):
            trace.use(weight, (1,), read)
    elif read_count == 1:  # depthwise, with made_count / groups outputs for each input channel
        if carries(label):
            trace.unite(made.reshape(groups, -1), read.reshape(groups, 1))
        else:
            for outputs in made.reshape(groups, -1):
                trace.tag(outputs)
    else:
        for group, outputs in enumerate(made.reshape(groups, -1)):
            trace.tag(outputs)
            if carries(label):
                inputs = read.reshape(groups, -1)[group]
                trace.tag(inputs)
                size = len(outputs)
                trace.use(weight, (1,), inputs, Rows(0, group * size, (group + 1) * size))
    trace.use(weight, (0,), made)
    bias = optional(node, 2)
    if is_constant(bias):
        assert bias is not None
        trace.use(bias, (0,), made)
    elif bias is not None:
        trace.freeze(node, "its bias is computed", trace.label(bias), made)
    shape = [1] * label.ndim
    shape[1] = made_count
    trace.set_label(output, made.reshape(shape))
