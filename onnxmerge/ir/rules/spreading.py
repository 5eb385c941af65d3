"""Expand and Tile: a tensor repeated."""

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.labels import Trace, aligned, carries, channel_axes, dims, rank
from onnxmerge.ir.rules.registry import required, rule, source_axis
from onnxmerge.ir.rules.selecting import rearranged


@rule("Expand")
def expand(node: oir.Node, trace: Trace) -> None:
    """Only axes of size 1 grow, and new ones appear in front: channels pass.

    A weight that is expanded for several readers carries channels on its last axis from here on; for a single reader,
    that reader tells which of its axes do (`source_axis`).
    """
    data, shape = required(node, 0), required(node, 1)
    label = trace.label(data)
    if carries(trace.label(shape)):
        trace.freeze(node, "its shape is computed from channels", label, trace.label(shape))
        return
    source = source_axis(data, rank(data) - 1) if rank(data) and not carries(label) else None
    size = dims(data)[-1] if rank(data) else 1
    if source is not None and size is not None and size > 1 and len(node.outputs[0].uses()) > 1:
        fresh = trace.fresh(size)
        trace.use(source[0], (source[1],), fresh)
        label = fresh.reshape([1] * (rank(data) - 1) + [size])
    trace.set_label(node.outputs[0], aligned(label, rank(node.outputs[0])))


@rule("Tile")
def tile(node: oir.Node, trace: Trace) -> None:
    """Along a channel axis every channel comes back in each copy."""
    data, repeats = required(node, 0), required(node, 1)
    label = trace.label(data)
    if not carries(label):
        return
    grown = [axis for axis in channel_axes(label) if dims(node.outputs[0])[axis] != dims(data)[axis]]
    if grown and repeats.const_value is None:
        trace.freeze(node, "how often it repeats channels is computed", label, trace.label(repeats))
    elif grown and repeats.const_value is not None:
        counts = [int(n) if axis in grown else 1 for axis, n in enumerate(repeats.const_value.numpy())]
        places = np.tile(np.arange(label.size).reshape(label.shape), counts)
        trace.set_label(node.outputs[0], rearranged(trace, label, places))
    else:
        trace.set_label(node.outputs[0], label)
