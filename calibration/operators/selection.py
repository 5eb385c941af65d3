"""Operators that pick entries: slice and gather."""

import torch
from torch import Tensor

from onnxmerge.calibration.operators.registry import Attributes, integers, operator


@operator("Slice")
def slice_axes(
    attributes: Attributes,
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """`x[start:end:step]` on each given axis."""
    begins, stops = integers(starts), integers(ends)
    chosen = integers(axes) if axes is not None else list(range(len(begins)))
    strides = integers(steps) if steps is not None else [1] * len(begins)
    for axis, begin, stop, step in zip(chosen, begins, stops, strides, strict=True):
        positions = _positions(x.shape[axis], begin, stop, step)
        if step > 0:
            x = x[(slice(None),) * (axis % x.dim()) + (slice(positions.start, positions.stop, step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(positions), dtype=torch.int64, device=x.device))
    return x


def _positions(size: int, begin: int, stop: int, step: int) -> range:
    """The chosen indices of an axis; bounds count from the end when negative and are clamped, as the standard says."""
    first, last = (0, size) if step > 0 else (-1, size - 1)
    begin, stop = (bound + size if bound < 0 else bound for bound in (begin, stop))
    return range(min(max(begin, 0), last), min(max(stop, first), last), step)


@operator("Gather")
def gather(attributes: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    """Rows of one axis by index; the axes of `indices` take that axis's place."""
    axis = attributes.get("axis", 0) % x.dim()
    flat = indices.reshape(-1)
    flat = torch.where(flat < 0, flat + x.shape[axis], flat)
    return x.index_select(axis, flat).reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


@operator("GatherElements")
def gather_elements(attributes: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    """One entry along an axis for each entry of `indices`."""
    axis = attributes.get("axis", 0)
    return x.gather(axis, torch.where(indices < 0, indices + x.shape[axis], indices).to(torch.int64))
