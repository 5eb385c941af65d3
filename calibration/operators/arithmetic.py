"""Element-wise arithmetic, comparison and logic; all broadcast as in numpy."""

from functools import reduce

import torch
from torch import Tensor

from onnxmerge.calibration.operators.registry import Attributes, operator, register_plain


def _divide(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _power(x: Tensor, y: Tensor) -> Tensor:
    return torch.pow(x, y).to(x.dtype)


register_plain(
    {
        "Add": torch.add,
        "Sub": torch.sub,
        "Mul": torch.mul,
        "Div": _divide,
        "Pow": _power,
        "Exp": torch.exp,
        "Log": torch.log,
        "Sqrt": torch.sqrt,
        "Abs": torch.abs,
        "Neg": torch.neg,
        "Sign": torch.sign,
        "Reciprocal": torch.reciprocal,
        "Floor": torch.floor,
        "Ceil": torch.ceil,
        "Round": torch.round,
        "Sin": torch.sin,
        "Cos": torch.cos,
        "Equal": torch.eq,
        "Less": torch.lt,
        "LessOrEqual": torch.le,
        "Greater": torch.gt,
        "GreaterOrEqual": torch.ge,
        "And": torch.logical_and,
        "Or": torch.logical_or,
        "Xor": torch.logical_xor,
        "Not": torch.logical_not,
        "Where": torch.where,
    }
)


@operator("Min")
def minimum(attributes: Attributes, *inputs: Tensor) -> Tensor:
    """Element-wise minimum of one or more tensors."""
    return reduce(torch.minimum, inputs)


@operator("Max")
def maximum(attributes: Attributes, *inputs: Tensor) -> Tensor:
    """Element-wise maximum of one or more tensors."""
    return reduce(torch.maximum, inputs)


@operator("Sum")
def total(attributes: Attributes, *inputs: Tensor) -> Tensor:
    """Element-wise sum of one or more tensors."""
    return reduce(torch.add, inputs)


@operator("Mean")
def mean(attributes: Attributes, *inputs: Tensor) -> Tensor:
    """Element-wise mean of one or more tensors."""
    return reduce(torch.add, inputs) / len(inputs)


@operator("Mod")
def modulo(attributes: Attributes, x: Tensor, y: Tensor) -> Tensor:
    """Remainder with the divisor's sign, or with the dividend's when `fmod` is set."""
    return torch.fmod(x, y) if attributes.get("fmod", 0) else torch.remainder(x, y)
