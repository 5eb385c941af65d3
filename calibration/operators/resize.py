"""Resize: nearest, linear and cubic interpolation, one axis after the other.

Coordinates are computed in float32 as onnxruntime does, so that ties of `nearest` fall the same way.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxmerge.calibration.operators.registry import Attributes, integers, operator

_NEAREST: dict[str, Callable[[Tensor], Tensor]] = {
    "round_prefer_floor": lambda x: torch.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: torch.floor(x + 0.5),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


@operator("Resize")
def resize(
    attributes: Attributes,
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """Resize by `scales` or to `sizes`; `roi` belongs to tf_crop_and_resize, which is not supported."""
    if attributes.get("antialias", 0):
        raise NotImplementedError("antialias is not supported")
    lengths, factors = _target(attributes, x, scales, sizes)
    native = _native(attributes, x, lengths, factors)
    if native is not None:
        return native
    for axis, (length, factor) in enumerate(zip(lengths, factors, strict=True)):
        if length != x.shape[axis] or factor != 1.0:
            x = _resize_axis(attributes, x, axis, length, factor)
    return x


def _target(
    attributes: Attributes, x: Tensor, scales: Tensor | None, sizes: Tensor | None
) -> tuple[list[int], list[float]]:
    """Length and scale factor for every axis."""
    lengths, factors = list(x.shape), [1.0] * x.dim()
    axes = [axis % x.dim() for axis in attributes.get("axes") or range(x.dim())]
    if scales is not None and scales.numel():
        for axis, factor in zip(axes, scales.tolist(), strict=True):
            lengths[axis], factors[axis] = int(x.shape[axis] * factor), factor
        return lengths, factors
    if sizes is None:
        raise NotImplementedError("neither scales nor sizes are given")
    wanted = dict(zip(axes, integers(sizes), strict=True))
    policy = attributes.get("keep_aspect_ratio_policy", "stretch")
    ratios = [size / x.shape[axis] for axis, size in wanted.items()]
    for axis, size in wanted.items():
        if policy == "stretch":
            lengths[axis], factors[axis] = size, size / x.shape[axis]
        else:
            factors[axis] = min(ratios) if policy == "not_larger" else max(ratios)
            lengths[axis] = int(factors[axis] * x.shape[axis] + 0.5)
    return lengths, factors


def _native(attributes: Attributes, x: Tensor, lengths: list[int], factors: list[float]) -> Tensor | None:
    """The same in one torch call for the usual cases on [N, C, *spatial]; None for all others."""
    if not 3 <= x.dim() <= 5 or lengths[:2] != list(x.shape[:2]):
        return None
    if any(length != size * factor for length, size, factor in zip(lengths, x.shape, factors, strict=True)):
        return None
    mode = attributes.get("mode", "nearest")
    place = attributes.get("coordinate_transformation_mode", "half_pixel")
    if mode == "nearest" and place == "asymmetric" and attributes.get("nearest_mode") == "floor":
        return F.interpolate(x, size=lengths[2:], mode="nearest")
    if mode == "linear" and place in ("half_pixel", "align_corners"):
        torch_mode = ("linear", "bilinear", "trilinear")[x.dim() - 3]
        return F.interpolate(x, size=lengths[2:], mode=torch_mode, align_corners=place == "align_corners")
    return None


def _resize_axis(attributes: Attributes, x: Tensor, axis: int, length: int, factor: float) -> Tensor:
    size = x.shape[axis]
    kind = attributes.get("coordinate_transformation_mode", "half_pixel")
    place = _coordinates(kind, size, length, torch.tensor(factor, device=x.device))
    mode = attributes.get("mode", "nearest")
    if mode == "nearest":
        chosen = _NEAREST[attributes.get("nearest_mode", "round_prefer_floor")](place)
        return x.index_select(axis, chosen.to(torch.int64).clamp(0, size - 1))
    low = place.floor()
    if mode == "linear":
        offsets, weights = [0, 1], [1 - (place - low), place - low]
    elif mode == "cubic":
        offsets, weights = [-1, 0, 1, 2], _cubic(place - low, attributes.get("cubic_coeff_a", -0.75))
    else:
        raise NotImplementedError(f"the mode {mode!r} is not supported")
    taps = [low.to(torch.int64) + offset for offset in offsets]
    if attributes.get("exclude_outside", 0):
        weights = [weight * ((tap >= 0) & (tap < size)) for weight, tap in zip(weights, taps, strict=True)]
        total = torch.stack(weights).sum(0)
        weights = [weight / total for weight in weights]
    along = [-1 if other == axis else 1 for other in range(x.dim())]
    parts = [
        x.index_select(axis, tap.clamp(0, size - 1)) * weight.to(x.dtype).reshape(along)
        for tap, weight in zip(taps, weights, strict=True)
    ]
    return torch.stack(parts).sum(0)


def _coordinates(mode: str, size: int, length: int, factor: Tensor) -> Tensor:
    """Where each of the `length` output positions lies on the input axis of the given size."""
    out = torch.arange(length, dtype=torch.float32, device=factor.device)
    if mode == "half_pixel" or (mode == "pytorch_half_pixel" and length > 1):
        return (out + 0.5) / factor - 0.5
    if mode == "half_pixel_symmetric":
        offset = size / 2 * (1 - length / (factor * size))
        return offset + (out + 0.5) / factor - 0.5
    if mode == "asymmetric":
        return out / factor
    if mode == "align_corners" and length > 1:
        return out * (size - 1) / (length - 1)
    if mode in ("align_corners", "pytorch_half_pixel"):
        return torch.zeros_like(out)
    raise NotImplementedError(f"the coordinate transformation {mode!r} is not supported")


def _cubic(t: Tensor, a: float) -> list[Tensor]:
    """Keys' kernel at distances 1 + t, t, 1 - t and 2 - t."""

    def far(d: Tensor) -> Tensor:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    def near(d: Tensor) -> Tensor:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    return [far(1 + t), near(t), near(1 - t), far(2 - t)]
