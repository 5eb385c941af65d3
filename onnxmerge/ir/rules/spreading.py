"""Expand and Tile: a tensor repeated."""

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.labels import Trace, carries, channel_axes, dims, rank
from onnxmerge.ir.rules.registry import required, rule
from onnxmerge.ir.rules.selecting import rearranged


@rule("Expand")
def expand(node: oir.Node, trace: Trace) -> None:
    """Only axes of size 1 grow, and new ones appear in front: channels pass."""
    data, shape = required(node, 0), required(node, 1)
    label = trace.label(data)
    if carries(trace.label(shape)):
        trace.freeze(node, "its shape is computed from channels", label, trace.label(shape))
        return
    added = rank(node.outputs[0]) - label.ndim
    trace.set_label(node.outputs[0], label.reshape((1,) * added + label.shape))


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
