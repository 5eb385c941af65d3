"""Reductions: symmetric in what they sum over, so reduced channels may come in any order."""

import onnx_ir as oir

from onnxmerge.ir.labels import Trace, rank
from onnxmerge.ir.rules.registry import axes_of, integer, optional, required, rule


@rule(
    *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"),
    *("ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"),
)
def reduction(node: oir.Node, trace: Trace) -> None:
    """Channels of the reduced axes fall together, those of the others stay."""
    data = required(node, 0)
    label = trace.label(data)
    axes = axes_of(node, 1, rank(data))
    if axes is None:
        if optional(node, 1) is not None:
            trace.freeze(node, "its axes are computed", label)
            return
        axes = [] if integer(node, "noop_with_empty_axes", 0) else list(range(rank(data)))
    kept = trace.together(label, axes)
    shape = [size for axis, size in enumerate(kept.shape) if axis not in axes or integer(node, "keepdims", 1)]
    trace.set_label(node.outputs[0], kept.reshape(shape))


@rule("Softmax", "LogSoftmax", "Hardmax")
def softmax(node: oir.Node, trace: Trace) -> None:
    """Every entry along the axis meets the sum of all: symmetric, as long as they stay together."""
    data = required(node, 0)
    label = trace.label(data)
    trace.together(label, [integer(node, "axis", -1) % rank(data)])
    trace.set_label(node.outputs[0], label)
