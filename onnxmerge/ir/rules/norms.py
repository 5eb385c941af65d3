"""Normalisations whose statistics belong to one channel each."""

import onnx_ir as oir

from onnxmerge.ir.labels import Trace, carries, channel_axes
from onnxmerge.ir.rules.registry import is_constant, required, rule


@rule("BatchNormalization", "InstanceNormalization")
def per_channel_norm(node: oir.Node, trace: Trace) -> None:
    """Scale, bias, and for batch norm mean and variance hold one entry for each channel of axis 1."""
    label = trace.label(required(node, 0))
    if not carries(label):
        return
    parameters = [value for value in node.inputs[1:] if value is not None]
    if channel_axes(label) not in ((), (1,)) or not all(is_constant(value) for value in parameters):
        trace.freeze(node, "channels are not on axis 1, or the parameters are computed", label)
        return
    for value in parameters:
        trace.use(value, (0,), label)
    trace.set_label(node.outputs[0], label)
