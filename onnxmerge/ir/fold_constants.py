"""Evaluate every node whose inputs are all constant, with onnx's reference implementation.

Weights behind Transpose, Reshape or Cast become weights in final form, and shape arithmetic over known sizes becomes a
constant that the label rules can read. What a node makes is known before it is evaluated: its type and shape come from
onnx, and what would be too large stays a node.
"""

import math
from collections.abc import Container, Sequence

import numpy as np
import onnx
import onnx_ir as oir
from onnx.reference.op_run import OpRun
from onnx.reference.ops import load_op

from onnxmerge.ir.infer_node import infer_node, with_plain_names

_RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
_DATA_DEPENDENT = {"NonZero", "Compress", "Unique"}
"""Their sizes depend on the data, but they make little more than they read."""
_FIRST_VERSION = {"DequantizeLinear": 19}
"""The first opset for which onnx can evaluate these; older nodes mean the same there."""
_SLOW = {
    *("Conv", "ConvInteger", "ConvTranspose", "DeformConv", "QLinearConv", "Col2Im", "LRN", "Attention", "Einsum"),
    *("AveragePool", "LpPool", "MaxPool", "MaxRoiPool", "MaxUnpool", "RoiAlign", "NonMaxSuppression"),
    *("Resize", "Upsample", "GridSample", "DFT", "STFT", "LSTM", "GRU", "RNN", "ReverseSequence"),
    *("Scatter", "ScatterElements", "ScatterND", "GatherND"),
}
"""onnx evaluates these one element at a time."""
_SLOW_LIMIT = 1 << 16
"""Elements that a slow operator may read and make."""
_LIMIT_BYTES = 1 << 28
_GROWTH = 8
"""All folded constants together may take `_LIMIT_BYTES` and this many times what the model stores (int4 to float32)."""


def fold_constants(model: oir.Model) -> None:
    """Replace constant nodes by initializers, in place."""
    folder = Folder(model)
    for node in list(model.graph):
        folder.fold(node)


class Folder:
    """Folds the nodes of one graph, one at a time in topological order.

    Args:
        model: changes in place.
        keep: nodes that read an initializer in it stay.
    """

    def __init__(self, model: oir.Model, keep: Container[str] = ()):
        self._graph = model.graph
        self._outputs = set(model.graph.outputs)
        self._opset = model.opset_imports.get("", 1)
        self._keep = keep
        stored = [v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None]
        self._budget = _LIMIT_BYTES + _GROWTH * sum(stored)

    def fold(self, node: oir.Node) -> bool:
        """Replace `node` by initializers if it is constant; whether it was."""
        foldable = _foldable(node, self._outputs, self._keep)
        arrays = evaluate(node, self._opset, self._budget) if foldable else None
        if arrays is None:
            return False
        self._budget -= sum(array.nbytes for array in arrays)
        for value, array in zip(node.outputs, arrays, strict=True):
            name = value.name or ""
            value.name = f"{name}__computed"
            tensor = oir.tensor(np.asarray(array, order="C"), name=name)
            constant = oir.Value(
                name=name, shape=oir.Shape(array.shape), type=oir.TensorType(tensor.dtype), const_value=tensor
            )
            self._graph.register_initializer(constant)
            value.replace_all_uses_with(constant)
        sources = [value for value in node.inputs if value is not None]
        self._graph.remove(node, safe=True)
        _drop_unread(self._graph, sources)
        return True


def _drop_unread(graph: oir.Graph, values: Sequence[oir.Value]) -> None:
    """Remove the initializers among `values` that nothing reads any more; a chain then holds one copy of a weight."""
    for value in values:
        name = value.name or ""
        is_read = value.uses() or value.is_graph_output() or value.is_graph_input()
        if graph.initializers.get(name) is value and not is_read:
            del graph.initializers[name]


def _foldable(node: oir.Node, graph_outputs: set[oir.Value], keep: Container[str]) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_type in _RANDOM or any(o in graph_outputs for o in node.outputs):
        return False
    if any(a.type in (oir.AttributeType.GRAPH, oir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return False
    return _sizes(node) is not None or all(
        v is None or (v.const_value is not None and v.name not in keep) for v in node.inputs
    )


def evaluate(node: oir.Node, opset: int, budget: int = _LIMIT_BYTES) -> list[np.ndarray] | None:
    """The outputs of a constant node, or None where onnx has no answer or they take more than `budget` bytes."""
    sizes = _sizes(node)
    if sizes is not None:
        return [sizes]
    try:
        expected = _expected(node, opset)
        if expected is None or sum(_bytes(shape, dtype) for shape, dtype in expected) > budget:
            return None
        feeds = [None if v is None else v.const_value.numpy() for v in node.inputs]  # type: ignore[union-attr]
        operator: type[OpRun] = load_op("", node.op_type, max(opset, _FIRST_VERSION.get(node.op_type, 0)))
        context = {"log": lambda *_: None, "opsets": {"": opset}, "verbose": 0, "new_ops": None}
        with np.errstate(all="ignore"):
            results = operator(with_plain_names(node), context).run(*feeds)
            arrays = [np.asarray(r).astype(t, copy=False) for r, (_, t) in zip(results, expected, strict=True)]
    except Exception:  # the reference implementation and onnx's shape inference raise many kinds
        return None
    return arrays if all(_fits(a.shape, shape) for a, (shape, _) in zip(arrays, expected, strict=True)) else None


def _sizes(node: oir.Node) -> np.ndarray | None:
    """What a Shape gives, or a Gather or Slice of one, where the sizes that it asks for are known; else None."""
    source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if node.op_type == "Shape":
        sizes = _whole_shape(node)
    elif source is not None and source.op_type == "Shape" and node.op_type in ("Gather", "Slice"):
        given = [None if v is None or v.const_value is None else v.const_value.numpy() for v in node.inputs[1:]]
        sizes = _whole_shape(source)
        if sizes is None or any(array is None for array in given):
            return None
        try:
            if node.op_type == "Gather":
                sizes = sizes.take(given[0])  # type: ignore[arg-type]
            else:
                start, end, *rest = (int(array.item()) for array in given)  # type: ignore[union-attr]
                sizes = sizes[start : end : rest[1] if len(rest) > 1 else 1]
        except (IndexError, ValueError):  # a damaged graph: onnxruntime will say so
            return None
    else:
        return None
    return None if sizes is None or (sizes < 0).any() else sizes


def _whole_shape(node: oir.Node) -> np.ndarray | None:
    """The output of a Shape, -1 where a size is free; None where not even the rank is known."""
    value = node.inputs[0]
    if value is None or value.shape is None:
        return None
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    end = node.attributes["end"].as_int() if "end" in node.attributes else len(value.shape)
    return np.array([d if isinstance(d, int) else -1 for d in value.shape], np.int64)[start:end]


_Expected = tuple[tuple[int | None, ...], np.dtype]
"""Shape (None where it depends on the data) and element type of an output."""


def _expected(node: oir.Node, opset: int) -> list[_Expected] | None:
    """What onnx infers of the outputs of a constant node; None where that does not bound their size."""
    expected: list[_Expected] = []
    for made in (inferred.tensor_type for inferred in infer_node(node, opset)):
        shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in made.shape.dim)
        known = made.HasField("shape") and None not in shape
        if made.elem_type == onnx.TensorProto.STRING or not (known or node.op_type in _DATA_DEPENDENT):
            return None
        expected.append((shape, oir.DataType(made.elem_type).numpy()))
    read = sum(value.const_value.size for value in node.inputs if value is not None and value.const_value is not None)
    elements = read + sum(_bytes(shape, np.dtype(np.int8)) for shape, _ in expected)
    return None if node.op_type in _SLOW and elements > _SLOW_LIMIT else expected


def _bytes(shape: tuple[int | None, ...], dtype: np.dtype) -> int:
    """A lower bound where a size is not known."""
    return math.prod(size for size in shape if size is not None) * dtype.itemsize


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(e is None or e == s for s, e in zip(shape, expected, strict=True))
