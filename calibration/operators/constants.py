"""Constants, shapes and types."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir
import torch
from torch import Tensor

from onnxmerge.calibration.operators.registry import Attributes, integers, operator

_HALF = {np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)}

# Gradients of half-precision values underflow, so half-precision graphs are computed in float32.
_TORCH_TYPES = {
    onnx_ir.DataType.FLOAT16: torch.float32,
    onnx_ir.DataType.BFLOAT16: torch.float32,
    onnx_ir.DataType.FLOAT: torch.float32,
    onnx_ir.DataType.DOUBLE: torch.float64,
    onnx_ir.DataType.BOOL: torch.bool,
    onnx_ir.DataType.UINT8: torch.uint8,
    onnx_ir.DataType.INT8: torch.int8,
    onnx_ir.DataType.INT16: torch.int16,
    onnx_ir.DataType.INT32: torch.int32,
    onnx_ir.DataType.INT64: torch.int64,
}


def to_torch(array: np.ndarray) -> Tensor:
    """A copy of `array`; half-precision floats become float32."""
    return torch.from_numpy(np.array(array, dtype=np.float32 if array.dtype in _HALF else array.dtype, order="C"))


@operator("Constant")
def constant(attributes: Attributes) -> Tensor:
    """The value that the node holds."""
    (name, value), *_ = attributes.items()
    types: dict[str, Any] = {"value_int": np.int64, "value_ints": np.int64}
    if name == "value":
        return to_torch(value.numpy())
    if name in ("value_float", "value_floats", *types):
        return to_torch(np.array(value, dtype=types.get(name, np.float32)))
    raise NotImplementedError(f"a constant held as {name!r} is not supported")


@operator("ConstantOfShape")
def constant_of_shape(attributes: Attributes, shape: Tensor) -> Tensor:
    """A tensor of the given shape filled with one value (default: float 0)."""
    value = to_torch(attributes["value"].numpy()) if "value" in attributes else torch.zeros(1)
    return value.reshape(()).expand(integers(shape)).to(shape.device, copy=True)


@operator("Shape")
def shape(attributes: Attributes, x: Tensor) -> Tensor:
    """The sizes of axes `start` to `end`."""
    return torch.tensor(list(x.shape)[attributes.get("start", 0) : attributes.get("end")], device=x.device)


@operator("Size")
def size(attributes: Attributes, x: Tensor) -> Tensor:
    """The number of elements."""
    return torch.tensor(x.numel(), device=x.device)


@operator("Range")
def arange(attributes: Attributes, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """`start, start + delta, ...`, up to and without `limit`."""
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype, device=start.device)


@operator("Cast")
def cast(attributes: Attributes, x: Tensor) -> Tensor:
    """Convert the type; half precision stands for float32 here."""
    wanted = onnx_ir.DataType(attributes["to"])
    if wanted not in _TORCH_TYPES:
        raise NotImplementedError(f"a cast to {wanted.name} is not supported")
    return x.to(_TORCH_TYPES[wanted])


@operator("CastLike")
def cast_like(attributes: Attributes, x: Tensor, like: Tensor) -> Tensor:
    """Convert to the type of `like`."""
    return x.to(like.dtype)


@operator("Identity")
def identity(attributes: Attributes, x: Tensor) -> Tensor:
    """The input."""
    return x


@operator("Dropout")
def dropout(attributes: Attributes, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> Tensor:
    """The input: a merged network is calibrated as it will be run."""
    return x
