"""DepthToSpace and SpaceToDepth: channels exchanged for blocks of places."""

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.labels import NO_CHANNEL, Trace, carries, channel_axes, dims
from onnxmerge.ir.rules.registry import integer, required, rule


@rule("DepthToSpace")
def depth_to_space(node: oir.Node, trace: Trace) -> None:
    """[N, C b b, H, W] to [N, C, H b, W b]: the b b channels that make one are one, each with its place in a block."""
    data = required(node, 0)
    label = trace.label(data)
    if not carries(label):
        return
    block = integer(node, "blocksize", 1) ** 2
    depth_first = "mode" not in node.attributes or node.attributes["mode"].as_string() == "DCR"
    if channel_axes(label) not in ((), (1,)) or (label == NO_CHANNEL).any():
        trace.freeze(node, "channels are not on axis 1", label)
        return
    count = int(dims(data)[1] or 0)
    parts = np.broadcast_to(label.ravel(), count).reshape((block, -1) if depth_first else (-1, block))
    parts = parts.T if depth_first else parts
    trace.unite(parts, parts[:, :1])
    trace.set_label(node.outputs[0], parts[:, 0].reshape(1, -1, 1, 1))


@rule("SpaceToDepth")
def space_to_depth(node: oir.Node, trace: Trace) -> None:
    """[N, C, H b, W b] to [N, b b C, H, W]: all channels once for each place in a block."""
    data = required(node, 0)
    label = trace.label(data)
    if not carries(label):
        return
    if channel_axes(label) not in ((), (1,)):
        trace.freeze(node, "channels are not on axis 1", label)
        return
    trace.set_label(node.outputs[0], np.tile(label, (1, integer(node, "blocksize", 1) ** 2, 1, 1)))
