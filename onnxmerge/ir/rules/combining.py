"""Concat and Pad: channels side by side."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.labels import Trace, carries, channel_axes, dims, rank
from onnxmerge.ir.rules.registry import axes_of, integer, optional, required, rule, source_axis


@rule("Concat")
def concat(node: oir.Node, trace: Trace) -> None:
    """Along a channel axis: the operands' channels one after the other. Along another: the same channels in all.

    A weight among the operands, such as the class token, has a slot for each channel.
    """
    operands = [value for value in node.inputs if value is not None]
    labels = [trace.label(value) for value in operands]
    if not any(carries(label) for label in labels):
        return
    axis = integer(node, "axis", 0) % rank(operands[0])
    varying = sorted({a for label in labels for a in channel_axes(label)})
    if not varying and all(dims(value)[axis] == 1 for value in operands):
        varying = [axis]  # maps of one channel each
    if any(dims(value)[a] is None for value in operands for a in varying):
        trace.freeze(node, "the size of an operand along a channel axis is unknown", *labels)
    elif axis in varying:
        parts = [_part(trace, value, label, varying) for value, label in zip(operands, labels, strict=True)]
        trace.set_label(node.outputs[0], _joined(trace, parts, axis))
    else:
        _join_places(node, trace, operands, labels)


def _part(trace: Trace, value: oir.Value, label: np.ndarray, varying: Sequence[int]) -> np.ndarray:
    """`label` with one atom for each index of the axes `varying`.

    A weight gets fresh ones; any other operand without channels gets fixed ones.
    """
    shape = [int(size or 0) if axis in varying else 1 for axis, size in enumerate(dims(value))]
    if carries(label):
        return np.broadcast_to(label, shape)
    atoms = trace.fresh(int(np.prod(shape))).reshape(shape)
    if not _own(trace, value, atoms, varying):
        trace.fix(atoms)
    return atoms


def _own(trace: Trace, value: oir.Value, atoms: np.ndarray, varying: Sequence[int]) -> bool:
    """Whether `value` comes from a weight, whose slots along `varying` then belong to `atoms`."""
    sources = [source_axis(value, axis) for axis in varying]
    found = [source for source in sources if source is not None]
    if found and len(found) == len(varying):
        trace.use(found[0][0], [axis for _, axis in found], atoms)
    return len(found) == len(varying)


def _joined(trace: Trace, parts: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """The labels side by side. Where other axes carry channels too, the slots of one channel may come to lie in
    another order, which two channels of one space must do alike.
    """
    label = np.concatenate(parts, axis)
    if len(channel_axes(label)) > 1:
        starts = np.cumsum([0, *(part.size for part in parts[:-1])])
        places = [start + np.arange(part.size).reshape(part.shape) for start, part in zip(starts, parts, strict=True)]
        trace.moves.append((label.ravel(), np.concatenate(places, axis).ravel()))
    return label


def _join_places(node: oir.Node, trace: Trace, operands: Sequence[oir.Value], labels: Sequence[np.ndarray]) -> None:
    """All operands have the same channels, on axes other than the one that is joined."""
    whole = max(labels, key=lambda label: (len(channel_axes(label)), carries(label)))
    for value, label in zip(operands, labels, strict=True):
        if carries(label):
            trace.unite(whole, label)
        elif not _own(trace, value, whole, channel_axes(whole)):
            trace.freeze(node, "it joins tensors that carry channels with tensors that carry none", *labels)
            return
    trace.set_label(node.outputs[0], whole)


@rule("Pad")
def pad(node: oir.Node, trace: Trace) -> None:
    """Spatial padding passes. Channels padded with a constant are fresh channels, all alike but kept by themselves."""
    data, amounts = required(node, 0), required(node, 1)
    label = trace.label(data)
    given = [trace.label(value) for value in node.inputs[1:] if value is not None]
    axes = axes_of(node, 3, label.ndim)
    if axes is None and optional(node, 3) is None:
        axes = list(range(label.ndim))
    if axes is None or any(carries(own) for own in given):
        trace.freeze(node, "its axes or what it pads with are computed", label, *given)
        return
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
    for number, axis in enumerate(axes):
        if label.shape[axis] == 1:
            continue
        if amounts.const_value is None:
            trace.freeze(node, "its amounts are computed", label)
            return
        left, right = (int(count) for count in amounts.const_value.numpy().reshape(2, -1)[:, number])
        if left == 0 and right == 0:
            continue
        if mode != "constant" or left < 0 or right < 0:
            trace.freeze(node, f"it pads a channel axis with mode {mode!r} or a negative amount", label)
            return
        label = _joined(trace, [_padding(trace, label, axis, left), label, _padding(trace, label, axis, right)], axis)
    trace.set_label(node.outputs[0], label)


def _padding(trace: Trace, label: np.ndarray, axis: int, count: int) -> np.ndarray:
    shape = [count if a == axis else size for a, size in enumerate(label.shape)]
    atoms = trace.fresh(int(np.prod(shape)))
    trace.tag(atoms)
    return atoms.reshape(shape)
