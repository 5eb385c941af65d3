"""Reductions: symmetric in what they sum over, so reduced channels may come in any order."""

import onnx_ir as oir

from onnxmerge.ir.labels import Trace, rank
from onnxmerge.ir.rules.registry import axes_of, integer, optional, required, rule


@rule(
    *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"),
    *("ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"),
)
def reduction(node: oir.Node, trace: Trace) -> None:
    """Drop the channels of the reduced axes, keep those of the others."""
    data = required(node, 0)
    label = trace.label(data)
    axes = axes_of(node, 1, rank(data))
    if axes is None:
        if optional(node, 1) is not None:
            trace.freeze(node, "its axes are computed", label)
            return
        axes = [] if integer(node, "noop_with_empty_axes", 0) else list(range(rank(data)))
    kept = label
    for axis in axes:
        if kept.shape[axis] > 1:
            other = [a for a in range(label.ndim) if a != axis and label.shape[a] > 1]
            if other:  # one atom for each pair of positions: what remains has no label of its own
                trace.freeze(node, "it reduces one of two axes that carry channels together", label)
                return
            kept = kept.take([0], axis) * 0 - 1
    shape = [size for axis, size in enumerate(kept.shape) if axis not in axes or integer(node, "keepdims", 1)]
    trace.set_label(node.outputs[0], kept.reshape(shape))
