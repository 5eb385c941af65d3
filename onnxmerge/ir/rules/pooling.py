"""Operators that work on space and leave channels alone."""

import onnx_ir as oir

from onnxmerge.ir.labels import Trace, carries, channel_axes, dims
from onnxmerge.ir.rules.registry import required, rule


@rule("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def pooling(node: oir.Node, trace: Trace) -> None:
    """Axis 1 passes; channels on a spatial axis would be mixed."""
    label = trace.label(required(node, 0))
    if channel_axes(label) not in ((), (1,)):
        trace.freeze(node, "channels lie on a spatial axis", label)
    elif len(node.outputs) > 1 and carries(label):
        trace.freeze(node, "the indices of a max pooling count channels", label)
    else:
        trace.set_label(node.outputs[0], label)


@rule("Resize", "Upsample")
def resize(node: oir.Node, trace: Trace) -> None:
    """Axes that keep their size keep their channels."""
    data, output = required(node, 0), node.outputs[0]
    label = trace.label(data)
    before, after = dims(data), dims(output)
    if len(before) == len(after) and all(
        before[axis] is not None and before[axis] == after[axis] for axis in channel_axes(label)
    ):
        trace.set_label(output, label)
    else:
        trace.freeze(node, "it resizes an axis that carries channels", label)
