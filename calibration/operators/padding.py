"""Pad."""

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxmerge.calibration.operators.registry import Attributes, integers, operator
from onnxmerge.calibration.operators.windows import pad_spatial

_TORCH_MODES = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@operator("Pad")
def pad(
    attributes: Attributes, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    """Lengthen (or crop, where negative) both ends of each axis."""
    amounts = integers(pads)
    chosen = [axis % x.dim() for axis in integers(axes)] if axes is not None else list(range(x.dim()))
    begins, ends = [0] * x.dim(), [0] * x.dim()
    for position, axis in enumerate(chosen):
        begins[axis], ends[axis] = amounts[position], amounts[len(chosen) + position]
    mode = attributes.get("mode", "constant")
    if mode == "constant":
        return pad_spatial(x, begins, ends, value.item() if value is not None else 0.0)
    if mode not in _TORCH_MODES:
        raise NotImplementedError(f"the mode {mode!r} is not supported")
    x = pad_spatial(x, [min(begin, 0) for begin in begins], [min(end, 0) for end in ends])
    begins, ends = [max(begin, 0) for begin in begins], [max(end, 0) for end in ends]
    if _native(x, begins, ends):
        sides = [side for axis in reversed(range(2, x.dim())) for side in (begins[axis], ends[axis])]
        return F.pad(x, sides, mode=_TORCH_MODES[mode])
    for axis, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        if begin or end:
            x = x.index_select(axis, _sources(mode, x.shape[axis], begin, end, x.device))
    return x


def _native(x: Tensor, begins: list[int], ends: list[int]) -> bool:
    """Whether torch can do it in one call: spatial axes of [N, C, *spatial] only, by less than their size."""
    spatial = range(2, x.dim())
    return (
        3 <= x.dim() <= 5
        and x.is_floating_point()
        and not any(begins[:2] + ends[:2])
        and all(side[axis] < x.shape[axis] for axis in spatial for side in (begins, ends))
    )


def _sources(mode: str, size: int, begin: int, end: int, device: torch.device) -> Tensor:
    """For each position of the padded axis, the position of the input that it copies."""
    positions = torch.arange(-begin, size + end, device=device)
    if mode == "edge":
        return positions.clamp(0, size - 1)
    if mode == "wrap":
        return positions % size
    period = max(2 * (size - 1), 1)
    positions = positions % period
    return torch.minimum(positions, period - positions) if size > 1 else torch.zeros_like(positions)
