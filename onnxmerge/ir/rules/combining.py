"""Concat and Pad: channels side by side."""

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.labels import Trace, carries, channel_axes, dims, rank
from onnxmerge.ir.rules.registry import axes_of, integer, is_constant, optional, required, rule


@rule("Concat")
def concat(node: oir.Node, trace: Trace) -> None:
    """Along a channel axis: the operands' channels one after the other. Along another: the same channels in all."""
    operands = [value for value in node.inputs if value is not None]
    labels = [trace.label(value) for value in operands]
    if not any(carries(label) for label in labels):
        return
    axis = integer(node, "axis", 0) % rank(operands[0])
    varying = {a for label in labels for a in channel_axes(label)}
    if varying == {axis} or (not varying and all(dims(value)[axis] == 1 for value in operands)):
        parts = [_spread(trace, value, label, axis) for value, label in zip(operands, labels, strict=True)]
        if any(part is None for part in parts):
            trace.freeze(node, "the size of an operand along the channel axis is unknown", *labels)
        else:
            trace.set_label(node.outputs[0], np.concatenate([p for p in parts if p is not None], axis))
    elif axis not in varying and all(carries(label) for label in labels):
        for label in labels[1:]:
            trace.unite(labels[0], label)
        trace.set_label(node.outputs[0], labels[0])
    else:
        trace.freeze(node, "it joins tensors that carry channels with tensors that carry none", *labels)


def _spread(trace: Trace, value: oir.Value, label: np.ndarray, axis: int) -> np.ndarray | None:
    """`label` with one atom for each index of `axis`; an operand without channels gets fixed ones."""
    size = dims(value)[axis]
    if size is None or (label.shape[axis] == size and carries(label)):
        return None if size is None else label
    shape = [1] * label.ndim
    shape[axis] = size
    atoms = trace.fresh(size).reshape(shape)
    trace.fix(atoms)
    return atoms


@rule("Pad")
def pad(node: oir.Node, trace: Trace) -> None:
    """Spatial padding passes. Channels padded with a constant are fresh channels, all alike but kept by themselves."""
    data, amounts = required(node, 0), required(node, 1)
    label = trace.label(data)
    if not carries(label):
        return
    if not is_constant(amounts) or amounts.const_value is None:
        if not _pads_axes_without_channels(node, label):
            trace.freeze(node, "its amounts are computed", label)
        else:
            trace.set_label(node.outputs[0], label)
        return
    axes = axes_of(node, 3, label.ndim) or list(range(label.ndim))
    before, after = amounts.const_value.numpy().reshape(2, -1)
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
    for axis, left, right in zip(axes, before, after, strict=True):
        if label.shape[axis] == 1 or (left == 0 and right == 0):
            continue
        if mode != "constant" or left < 0 or right < 0 or label.ndim != label.shape.count(1) + 1:
            trace.freeze(node, f"it pads a channel axis with mode {mode!r} or a negative amount", label)
            return
        parts = []
        for count in (int(left), int(right)):
            shape = [1] * label.ndim
            shape[axis] = count
            atoms = trace.fresh(count)
            trace.tag(atoms)
            parts.append(atoms.reshape(shape))
        label = np.concatenate([parts[0], label, parts[1]], axis)
    trace.set_label(node.outputs[0], label)


def _pads_axes_without_channels(node: oir.Node, label: np.ndarray) -> bool:
    axes = axes_of(node, 3, label.ndim)
    return optional(node, 3) is not None and axes is not None and not set(axes) & set(channel_axes(label))
