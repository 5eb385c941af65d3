"""Fold constant nodes where it costs nothing: no stored byte more, and every result as onnxruntime would compute it.

Where one exporter stored `Transpose(weight)` and another the transposed weight, the two meet in the folded form. A
weight that is stored in few bits and decoded (Cast, DequantizeLinear), or is also read unfolded, stays as it is.
"""

from functools import partial

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.fold_constants import evaluate

_MOVING = {"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Concat", "Slice", "Gather", "Split"}
_SPREADING = {"Expand", "Tile", "ConstantOfShape", "Range"}
_ROUNDED = {"Add", "Sub", "Mul", "Div", "Neg", "Abs", "Sqrt"}
"""Operators whose result IEEE 754 fixes to the bit."""
_INTEGER = {"Add", "Sub", "Mul", "Neg", "Abs", "Min", "Max", "Equal", "Less", "Greater", "Not", "And", "Or"}
_INTEGER |= {"Where", "Size", "ReduceProd", "ReduceSum", "ReduceMin", "ReduceMax"}
_FEW_BYTES = 1024
"""So much may be stored more: shapes, axes and other results of shape arithmetic."""
_MOST_BYTES = 1 << 26
"""Larger external arrays stay on disk and are not folded."""


def fold_stored(model: oir.Model) -> bool:
    """Replace constant nodes of the main graph by initializers, in place; whether there were any.

    Shapes must have been inferred; what is folded may let more shapes be inferred, and more be folded.
    """
    graph = model.graph
    folded = False
    for node in list(graph):
        if any(output.is_graph_output() for output in node.outputs) or not _exact(node):
            continue
        tensors = _fold(node, model.opset_imports.get("", 1), max(_freed(node), _FEW_BYTES))
        if tensors is None:
            continue
        for value, tensor in zip(node.outputs, tensors, strict=True):
            tensor.name, value.name = value.name, f"{value.name}__computed"
            constant = oir.Value(
                name=tensor.name, shape=oir.Shape(tensor.shape.numpy()), type=oir.TensorType(tensor.dtype)
            )
            constant.const_value = tensor
            graph.register_initializer(constant)
            value.replace_all_uses_with(constant)
        graph.remove(node, safe=True)
        folded = True
    return folded


def _fold(node: oir.Node, opset: int, allowed: int) -> list[oir.TensorProtocol] | None:
    """The node's outputs, None where they take more than `allowed` bytes.

    What comes from disk is computed anew whenever it is asked for, and not kept in memory.
    """
    sources = [
        None if v is None else oir.Value(name=v.name, shape=v.shape, type=v.type, const_value=v.const_value)
        for v in node.inputs
    ]
    alone = oir.Node("", node.op_type, sources, list(node.attributes.values()), num_outputs=len(node.outputs))

    def compute() -> list[oir.TensorProtocol] | None:
        arrays = evaluate(alone, opset, allowed)
        copies = None if arrays is None else [oir.tensor(np.array(array, order="C")) for array in arrays]
        del arrays  # views of a mapped file, which could not be closed before they are gone
        for source in sources:
            if source is not None and isinstance(source.const_value, oir.ExternalTensor):
                source.const_value.release()
        return copies

    def again(index: int) -> oir.TensorProtocol:
        tensors = compute()
        assert tensors is not None
        return tensors[index]

    found = compute()
    if found is None or not any(source is not None and _on_disk(source.const_value) for source in sources):
        return found
    return [
        oir.LazyTensor(partial(again, index), dtype=tensor.dtype, shape=oir.Shape(tensor.shape.numpy()))
        for index, tensor in enumerate(found)
    ]


def _exact(node: oir.Node) -> bool:
    """Whether the node is constant and onnx's reference implementation gives the bits that any runtime gives."""
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "Shape":
        source = node.inputs[0]
        return source is not None and source.shape is not None and all(isinstance(size, int) for size in source.shape)
    found = [value.const_value for value in node.inputs if value is not None]
    tensors = [tensor for tensor in found if tensor is not None]
    if len(tensors) < len(found) or (not tensors and node.op_type not in _SPREADING):
        return False
    types = {tensor.dtype for tensor in tensors}
    if oir.DataType.STRING in types or any(_on_disk(tensor) and tensor.nbytes > _MOST_BYTES for tensor in tensors):
        return False
    if node.op_type in _MOVING | _SPREADING:
        return True
    if not all(_is_common(kind) for kind in types):
        return False
    if not all(kind.is_integer() or kind == oir.DataType.BOOL for kind in types):
        return node.op_type in _ROUNDED
    if node.op_type == "Cast":
        return "to" in node.attributes and _is_common(oir.DataType(node.attributes["to"].as_int()))
    if node.op_type in ("Div", "Mod"):  # the reference rounds down, runtimes round towards zero
        dividend, divisor = (tensor.numpy() for tensor in tensors)
        return bool((dividend >= 0).all() and (divisor > 0).all())
    return node.op_type in _INTEGER


def _is_common(kind: oir.DataType) -> bool:
    named = {oir.DataType.BOOL, oir.DataType.FLOAT, oir.DataType.DOUBLE, oir.DataType.INT32, oir.DataType.INT64}
    return kind in named


def _on_disk(tensor: oir.TensorProtocol | None) -> bool:
    return isinstance(tensor, oir.ExternalTensor | oir.LazyTensor)


def _freed(node: oir.Node) -> int:
    """Bytes of the initializers that nothing but this node reads."""
    alone = {
        value
        for value in node.inputs
        if value is not None and value.const_value is not None and {user for user, _ in value.uses()} == {node}
    }
    return sum(value.const_value.nbytes for value in alone if value.const_value is not None)
