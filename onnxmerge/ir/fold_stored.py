"""Fold constant nodes where it costs nothing: no stored byte more, and every result as onnxruntime would compute it.

Where one exporter stored `Transpose(weight)` and another the transposed weight, the two meet in the folded form. A
weight that is stored in few bits and decoded (Cast, DequantizeLinear), or is also read unfolded, stays as it is.
"""

import math
from functools import partial

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.fold_constants import _evaluate
from onnxmerge.ir.sizes import sizes_of

_MOVING = {"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Concat", "Slice", "Gather", "Split"}
_SPREADING = {"Expand", "Tile", "ConstantOfShape", "Range"}
_ROUNDED = {"Add", "Sub", "Mul", "Div", "Neg", "Abs", "Sqrt"}
"""Operators whose result IEEE 754 fixes to the bit."""
_INTEGER = {"Add", "Sub", "Mul", "Div", "Neg", "Abs", "Min", "Max", "Equal", "Less", "Greater", "Not", "And", "Or"}
_INTEGER |= {"Where", "Size", "ReduceProd", "ReduceSum", "ReduceMin", "ReduceMax"}
_FEW_BYTES = 1024
"""So much may be stored more: shapes, axes and other results of shape arithmetic."""
_MOST_BYTES = 1 << 26
"""Larger external arrays stay on disk and are not folded."""


def fold_stored(model: oir.Model) -> None:
    """Replace constant nodes of the main graph by initializers, in place; shapes must have been inferred."""
    graph = model.graph
    for node in list(graph):
        if any(output.is_graph_output() for output in node.outputs) or not _exact(node):
            continue
        allowed = max(_freed(node), _FEW_BYTES)
        if node.op_type in _SPREADING and not _size(node.outputs[0]) <= allowed:
            continue
        tensors = _fold(node, model.opset_imports.get("", 1))
        if tensors is None or sum(tensor.nbytes for tensor in tensors) > allowed:
            continue
        for value, tensor in zip(node.outputs, tensors, strict=True):
            tensor.name, value.name = value.name, f"{value.name}__computed"
            constant = oir.Value(name=tensor.name, shape=oir.Shape(tensor.shape), type=oir.TensorType(tensor.dtype))
            constant.const_value = tensor
            graph.register_initializer(constant)
            value.replace_all_uses_with(constant)
        graph.remove(node, safe=True)


def _fold(node: oir.Node, opset: int) -> list[oir.TensorProtocol] | None:
    """The node's outputs; what comes from disk is computed anew whenever it is asked for, and not kept in memory."""
    sources = [
        None if v is None else oir.Value(name=v.name, shape=v.shape, const_value=v.const_value) for v in node.inputs
    ]
    alone = oir.Node("", node.op_type, sources, list(node.attributes.values()), num_outputs=len(node.outputs))

    def compute() -> list[oir.TensorProtocol] | None:
        arrays = _evaluate(alone, opset)
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
        oir.LazyTensor(partial(again, index), dtype=tensor.dtype, shape=oir.Shape(tensor.shape))
        for index, tensor in enumerate(found)
    ]


def _exact(node: oir.Node) -> bool:
    """Whether the node is constant and onnx's reference implementation gives the bits that any runtime gives."""
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "Shape":
        source = node.inputs[0]
        return source is not None and source.shape is not None and all(isinstance(d, int) for d in source.shape)
    tensors = [value.const_value for value in node.inputs if value is not None]
    if not tensors and node.op_type not in _SPREADING:
        return False
    if any(t is None or t.dtype == oir.DataType.STRING or _is_large(t) for t in tensors):
        return False
    if node.op_type in _MOVING | _SPREADING:
        return True
    types = {t.dtype for t in tensors if t is not None}
    whole = all(t.is_integer() or t == oir.DataType.BOOL for t in types)
    if node.op_type == "Cast":
        return whole and "to" in node.attributes and _is_common(oir.DataType(node.attributes["to"].as_int()))
    if node.op_type == "Div" and whole:  # the reference rounds down, runtimes round towards zero
        return all((t.numpy() >= 0).all() for t in tensors if t is not None) and tensors[1].numpy().all()  # type: ignore[union-attr]
    return node.op_type in (_INTEGER if whole else _ROUNDED) and all(map(_is_common, types))


def _is_common(kind: oir.DataType) -> bool:
    named = {oir.DataType.BOOL, oir.DataType.FLOAT, oir.DataType.DOUBLE, oir.DataType.INT32, oir.DataType.INT64}
    return kind in named


def _is_large(tensor: oir.TensorProtocol) -> bool:
    return _on_disk(tensor) and tensor.nbytes > _MOST_BYTES


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


def _size(value: oir.Value) -> float:
    """Bytes, or infinity where the shape or type is unknown."""
    sizes = sizes_of(value)
    if sizes is None or value.dtype is None:
        return math.inf
    return math.prod(size if isinstance(size, int) else math.inf for size in sizes) * value.dtype.itemsize
