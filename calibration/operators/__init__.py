"""ONNX operators in torch, one file for each family; `OPERATORS` maps the operator's name to its function."""

from onnxmerge.calibration.operators import (
    activations,
    arithmetic,
    constants,
    convolution,
    dense,
    layout,
    normalisation,
    padding,
    pooling,
    reductions,
    resize,
    selection,
)
from onnxmerge.calibration.operators.registry import OPERATORS, Attributes

__all__ = [
    "OPERATORS",
    "Attributes",
    "activations",
    "arithmetic",
    "constants",
    "convolution",
    "dense",
    "layout",
    "normalisation",
    "padding",
    "pooling",
    "reductions",
    "resize",
    "selection",
]
