"""Evaluate every node whose inputs are all constant, with onnx's reference implementation.

Weights behind Transpose, Reshape or Cast become weights in final form, and shape arithmetic over known sizes becomes a
constant that the label rules can read.
"""

from collections.abc import Container

import numpy as np
import onnx_ir as oir
from onnx.reference.op_run import OpRun
from onnx.reference.ops import load_op

_RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
_LIMIT_BYTES = 1 << 28  # a folded constant is stored: do not turn a small Expand into a huge weight


def fold_constants(model: oir.Model, keep: Container[str] = ()) -> None:
    """Replace constant nodes by initializers, in place; nodes that read an initializer in `keep` stay."""
    graph = model.graph
    outputs = set(graph.outputs)
    for node in list(graph):
        arrays = _evaluate(node, model.opset_imports.get("", 1)) if _foldable(node, outputs, keep) else None
        if arrays is None:
            continue
        for value, array in zip(node.outputs, arrays, strict=True):
            name = value.name or ""
            value.name = f"{name}__computed"
            tensor = oir.tensor(np.asarray(array, order="C"), name=name)
            constant = oir.Value(
                name=name, shape=oir.Shape(array.shape), type=oir.TensorType(tensor.dtype), const_value=tensor
            )
            graph.register_initializer(constant)
            value.replace_all_uses_with(constant)
        graph.remove(node, safe=True)


def _foldable(node: oir.Node, graph_outputs: set[oir.Value], keep: Container[str]) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_type in _RANDOM or any(o in graph_outputs for o in node.outputs):
        return False
    if any(a.type in (oir.AttributeType.GRAPH, oir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return False
    if node.op_type == "Shape":
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        return shape is not None and all(isinstance(d, int) for d in shape)
    return all(v is None or (v.const_value is not None and v.name not in keep) for v in node.inputs)


def _evaluate(node: oir.Node, opset: int) -> list[np.ndarray] | None:
    """The outputs of a constant node, or None where the reference implementation has no answer."""
    if node.op_type == "Shape":
        whole = np.array(list(node.inputs[0].shape), dtype=np.int64)  # type: ignore[union-attr, arg-type]
        start = node.attributes["start"].as_int() if "start" in node.attributes else 0
        end = node.attributes["end"].as_int() if "end" in node.attributes else len(whole)
        return [whole[start:end]]
    proto = oir.serde.serialize_node(node)
    feeds = [None if v is None else v.const_value.numpy() for v in node.inputs]  # type: ignore[union-attr]
    try:
        operator: type[OpRun] = load_op("", node.op_type, opset)
        context = {"log": lambda *_: None, "opsets": {"": opset}, "verbose": 0, "new_ops": None}
        results = operator(proto, context).run(*feeds)
    except (ImportError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None
    arrays = [np.asarray(r) for r in results]
    return arrays if sum(a.nbytes for a in arrays) <= _LIMIT_BYTES else None
