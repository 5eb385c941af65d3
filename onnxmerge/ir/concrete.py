"""A copy of a graph in which every axis has a size, for analysis.

Exported graphs compute shapes at run time (Shape, Gather, Concat, Reshape). Channels sit on axes whose sizes the
weights fix, so one choice of the free sizes shows where channels go for all.
"""

from collections.abc import Container

import onnx
import onnx_ir as oir

from onnxmerge.ir.fold_constants import Folder
from onnxmerge.ir.infer_node import infer_node
from onnxmerge.ir.labels import dims
from onnxmerge.ir.shapes import SAME_SHAPE, keeps_count, shapes_agree
from onnxmerge.ir.weights import is_float

BATCH = 2
FREE_SIZES = (32, 224)
"""Sizes tried for axes other than the batch: the first for which all shapes are known is taken."""


def with_sizes(model: oir.Model) -> oir.Model:
    """`model` itself when all its shapes are known, else a copy with sizes for its free axes; weights are shared.

    Shape arithmetic is folded away. Where no size fits, what lies behind the contradiction stays without a shape.
    """
    if not _unknown(model):
        return model
    trials = []
    for size in FREE_SIZES:
        trials.append(_sized(model, size))
        if not _unknown(trials[-1]):
            break
    return min(trials, key=_unknown)


def _sized(model: oir.Model, size: int) -> oir.Model:
    copy = model.clone()
    sizes: dict[str, int] = {}
    for value in copy.graph.inputs:
        if value.shape is not None:
            value.shape = oir.Shape(
                [
                    d if isinstance(d, int) else sizes.setdefault(str(d), BATCH if axis == 0 else size)
                    for axis, d in enumerate(value.shape)
                ]
            )
    settle(copy)
    return copy


def settle(model: oir.Model) -> bool:
    """Infer shapes and fold shape arithmetic, in place; False when the sizes of the inputs contradict each other.

    Both happen in one walk over the nodes, since a shape may hang on a constant that hangs on a shape, and so on to any
    depth. What onnx cannot tell of one node alone (If, Loop) it may tell of the whole: then there is another walk.
    """
    for value in [*model.graph.outputs, *(value for node in model.graph for value in node.outputs)]:
        if value.producer() is not None and value.producer().domain == "":  # type: ignore[union-attr]
            value.shape = None
    weights = {
        name
        for name, value in model.graph.initializers.items()
        if is_float(value) and value.const_value is not None and value.const_value.size > 1
    }
    if not _walk(model, weights):
        return False
    return not _unknown(model) or (shapes_agree(model) and _walk(model, weights))


def _walk(model: oir.Model, weights: Container[str]) -> bool:
    folder, opset = Folder(model, keep=weights), model.opset_imports.get("", 1)
    for node in list(model.graph):
        if node.domain == "" and not folder.fold(node) and not _infer_outputs(node, opset):
            return False
    return True


def _infer_outputs(node: oir.Node, opset: int) -> bool:
    """Set the shapes of a node's outputs where onnx can tell them; False when they are impossible."""
    try:
        made = infer_node(node, opset)
    except onnx.shape_inference.InferenceError:
        return False
    except Exception:  # of many kinds, for an operator that onnx knows no shapes of
        made = []
    for value, kind in zip(node.outputs, made, strict=False):
        shape = oir.serde.deserialize_type_proto_for_shape(kind)
        if shape is not None:
            value.shape, value.type = shape, oir.serde.deserialize_type_proto_for_type(kind)
            if any(size is not None and size < 0 for size in dims(value)):
                return False
    if node.op_type in SAME_SHAPE and node.outputs[0].shape is None and node.inputs[0] is not None:
        node.outputs[0].shape, node.outputs[0].type = node.inputs[0].shape, node.inputs[0].type
    return node.op_type != "Reshape" or keeps_count(node)


def _unknown(model: oir.Model) -> int:
    """How many values that are read have no shape, or an axis without a size."""
    computed = [value for node in model.graph for value in node.outputs if value.uses() or value.is_graph_output()]
    return sum(value.shape is None or None in dims(value) for value in computed)
