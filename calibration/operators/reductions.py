"""Reductions over axes given as attribute (before opset 18; ReduceSum 13) or as input."""

from collections.abc import Callable

import torch
from torch import Tensor

from onnxmerge.calibration.operators.registry import OPERATORS, Attributes, Operator, integers, operator


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(dim=axis, keepdim=keep)
    return x


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceMean": lambda x, axes, keep: x.mean(dim=axes, keepdim=keep),
    "ReduceSum": lambda x, axes, keep: x.sum(dim=axes, keepdim=keep, dtype=x.dtype),
    "ReduceMax": lambda x, axes, keep: x.amax(dim=axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(dim=axes, keepdim=keep),
    "ReduceProd": _product,
    "ReduceL1": lambda x, axes, keep: x.abs().sum(dim=axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep),
    "ReduceSumSquare": lambda x, axes, keep: (x * x).sum(dim=axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(dim=axes, keepdim=keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: x.logsumexp(dim=axes, keepdim=keep),
}


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def reduce(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = integers(axes) if axes is not None else list(attributes.get("axes") or [])
        if not chosen and attributes.get("noop_with_empty_axes", 0):
            return x
        return function(x, chosen or list(range(x.dim())), bool(attributes.get("keepdims", 1)))

    return reduce


OPERATORS.update({name: _reduction(function) for name, function in _REDUCTIONS.items()})


@operator("ArgMax")
def argmax(attributes: Attributes, x: Tensor) -> Tensor:
    """Index of the largest entry along one axis: the first such index, or the last with `select_last_index`."""
    axis, keep = attributes.get("axis", 0), bool(attributes.get("keepdims", 1))
    if attributes.get("select_last_index", 0):
        return x.shape[axis] - 1 - x.flip(axis).argmax(dim=axis, keepdim=keep)
    return x.argmax(dim=axis, keepdim=keep)


@operator("ArgMin")
def argmin(attributes: Attributes, x: Tensor) -> Tensor:
    """Index of the smallest entry along one axis."""
    return argmax(attributes, -x)
