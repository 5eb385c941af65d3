"""A copy of a graph in which every axis has a size, for analysis.

Exported graphs compute shapes at run time (Shape, Gather, Concat, Reshape). Channels sit on axes whose sizes the
weights fix, so one choice of the free sizes shows where channels go for all.
"""

import math

import onnx_ir as oir

from onnxmerge.ir.fold_constants import fold_constants
from onnxmerge.ir.labels import dims
from onnxmerge.ir.shapes import infer_shapes, shapes_agree
from onnxmerge.ir.weights import is_float

BATCH = 2
FREE_SIZES = (32, 224)
"""Sizes tried for axes other than the batch: the first for which all shapes are known is taken."""
_ROUNDS = 4  # folding shows shapes, which allow more folding


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
    if not settle(copy):
        infer_shapes(copy)
    return copy


def settle(model: oir.Model) -> bool:
    """Infer shapes and fold shape arithmetic in turns, in place; False when the sizes of the inputs contradict it."""
    for output in model.graph.outputs:
        output.shape = None
    weights = {
        name for name, value in model.graph.initializers.items() if is_float(value) and math.prod(value.shape) > 1
    }
    left = None
    for _ in range(_ROUNDS):
        if not shapes_agree(model):
            return False
        fold_constants(model, keep=weights)
        if (unknown := _unknown(model)) in (0, left):
            break
        left = unknown
    return True


def _unknown(model: oir.Model) -> int:
    """How many values that are read have no shape, or an axis without a size."""
    computed = [value for node in model.graph for value in node.outputs if value.uses() or value.is_graph_output()]
    return sum(value.shape is None or None in dims(value) for value in computed)
