"""QuantizeLinear and DequantizeLinear: one scale for the whole tensor, or one for each index of an axis."""

import onnx_ir as oir

from onnxmerge.ir.labels import Trace, carries, dims, rank
from onnxmerge.ir.rules.registry import RULES, integer, is_constant, optional, required, rule, source_axis


@rule("QuantizeLinear", "DequantizeLinear")
def quantize(node: oir.Node, trace: Trace) -> None:
    """Scales and zero points along the channel axis belong to the channels."""
    data = required(node, 0)
    label = trace.label(data)
    parameters = [value for value in node.inputs[1:] if value is not None]
    if not carries(label) and not any(carries(trace.label(value)) for value in parameters):
        return
    axis = integer(node, "axis", 1)
    for value in parameters:
        if _is_single(value):
            continue
        source = source_axis(value, 0)
        if len(dims(value)) != 1 or source is None:
            trace.freeze(node, "its scales are computed, or one holds for a block", label, trace.label(value))
            return
        if label.shape[axis] > 1:
            trace.use_partly(source[0], (source[1],), label, (axis % label.ndim,))
    trace.set_label(node.outputs[0], label)


@rule("MatMulInteger")
def integer_product(node: oir.Node, trace: Trace) -> None:
    """MatMul of integers; the right factor's zero point may be one for each column."""
    RULES["MatMul"](node, trace)
    label = trace.label(node.outputs[0])
    of_rows, of_columns = optional(node, 2), optional(node, 3)
    by_column = of_columns is not None and is_constant(of_columns) and rank(of_columns) == 1
    if not _is_single(of_rows) or not (by_column or _is_single(of_columns)):
        trace.freeze(node, "its zero points are computed, or not by column", label)
    elif of_columns is not None and not _is_single(of_columns) and label.shape[-1] > 1:
        trace.use_partly(of_columns, (0,), label, (label.ndim - 1,))


@rule("DynamicQuantizeLinear")
def dynamic_quantize(node: oir.Node, trace: Trace) -> None:
    """The scale is found from the least and the greatest entry of all, whatever their order."""
    trace.set_label(node.outputs[0], trace.label(required(node, 0)))


def _is_single(value: oir.Value | None) -> bool:
    """Whether it is left out or holds one number for the whole tensor."""
    return value is None or all(size == 1 for size in dims(value))
