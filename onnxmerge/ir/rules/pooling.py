"""Operators that work on space and leave channels alone."""

import onnx_ir as oir

from onnxmerge.ir.labels import Trace, carries, channel_axes, dims
from onnxmerge.ir.rules.registry import axes_of, optional, required, rule


@rule("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def pooling(node: oir.Node, trace: Trace) -> None:
    """Axis 1 passes; what channels there are in a map become one."""
    label = trace.along(node, trace.label(required(node, 0)), 1)
    if len(node.outputs) > 1 and carries(label):
        trace.freeze(node, "the indices of a max pooling count channels", label)
    else:
        trace.set_label(node.outputs[0], label)


@rule("GridSample", "RoiAlign", "MaxRoiPool")
def sampling(node: oir.Node, trace: Trace) -> None:
    """Axis 1 passes; the other inputs say where in space to read."""
    label = trace.along(node, trace.label(required(node, 0)), 1)
    places = [trace.label(value) for value in node.inputs[1:] if value is not None]
    if any(carries(own) for own in places):
        trace.freeze(node, "channels say where to read", label, *places)
    else:
        trace.set_label(node.outputs[0], label)


@rule("Resize", "Upsample")
def resize(node: oir.Node, trace: Trace) -> None:
    """Axes that keep their size and their scale keep their channels; along others they become one."""
    data, output = required(node, 0), node.outputs[0]
    label = trace.label(data)
    given = [trace.label(value) for value in node.inputs[1:] if value is not None]
    mixed = [axis for axis in channel_axes(label) if not _keeps(node, axis, dims(data), dims(output))]
    if any(carries(own) for own in given) or (mixed and set(mixed) == set(channel_axes(label))):
        trace.freeze(node, "it resizes the axis that carries channels", label, *given)
    else:
        trace.set_label(output, trace.united(label, mixed))


def _keeps(node: oir.Node, axis: int, before: tuple[int | None, ...], after: tuple[int | None, ...]) -> bool:
    """Whether an axis is copied: its size stays, its scale is not 1.1 rounded down, and it is not cropped."""
    if len(before) != len(after) or before[axis] is None or before[axis] != after[axis]:
        return False
    axes = axes_of(node, 4, len(before)) or list(range(len(before)))
    if axis not in axes:
        return True
    transformation = node.attributes.get("coordinate_transformation_mode")
    scales = optional(node, 2 if node.op_type == "Resize" else 1)
    known = None if scales is None or scales.const_value is None else scales.const_value.numpy()
    cropped = transformation is not None and transformation.as_string() == "tf_crop_and_resize"
    return not cropped and (known is None or known.size == 0 or bool(known[axes.index(axis)] == 1))
