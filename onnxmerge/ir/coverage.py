"""How much of a network the channel spaces cover."""

import math

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.labels import dims
from onnxmerge.ir.spaces import Slots, Spaces
from onnxmerge.ir.weights import is_float

_PARAMETRISED = {
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "PRelu"),
    *("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization"),
}


def permutable_share(model: oir.Model, spaces: Spaces) -> float:
    """The share of the parameters of layers, norms and added biases that lie in a space of more than one channel.

    Other constants, such as anchor tables, count neither way. A network without parameters has the share 0.
    """
    shapes = {value.name or "": _shape(value) for value in _parameters(model)}
    covered = {name: np.zeros(shape, bool) for name, shape in shapes.items()}
    for space in spaces.permutable():
        for slots in space.weights:
            if slots.name in covered:
                _mark(covered[slots.name], slots)
    total = sum(math.prod(shape) for shape in shapes.values())
    return sum(int(mask.sum()) for mask in covered.values()) / total if total else 0.0


def _parameters(model: oir.Model) -> list[oir.Value]:
    constants = [
        (node, value)
        for node in model.graph
        for value in node.inputs
        if value is not None and value.const_value is not None and is_float(value)
    ]
    return [v for node, v in constants if node.op_type in _PARAMETRISED or (node.op_type == "Add" and _is_vector(v))]


def _is_vector(value: oir.Value) -> bool:
    return math.prod(_shape(value)) == max(_shape(value), default=1) > 1


def _shape(value: oir.Value) -> tuple[int, ...]:
    return tuple(int(size or 0) for size in dims(value))


def _mark(mask: np.ndarray, slots: Slots) -> None:
    """Set what lies in `slots` to True, in place."""
    if slots.rows is not None:
        mask = mask[(slice(None),) * slots.rows.axis + (slice(slots.rows.start, slots.rows.stop),)]
    moved = np.moveaxis(mask, slots.axes, range(len(slots.axes)))
    moved[np.unravel_index(slots.index.ravel(), moved.shape[: len(slots.axes)])] = True
