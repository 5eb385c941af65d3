"""Pooling over one, two or three spatial axes; `x` is [N, C, *spatial]."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxmerge.calibration.operators.convolution import CONVOLUTIONS
from onnxmerge.calibration.operators.registry import Attributes, operator
from onnxmerge.calibration.operators.windows import Windows, pad_spatial, windows

_AVERAGE_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


@operator("MaxPool")
def max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    """The largest value in each window; padding never wins."""
    w = windows(attributes, x.shape[2:], attributes["kernel_shape"])
    padding = w.begins
    if not w.symmetric or any(2 * p > k for p, k in zip(w.begins, w.kernel, strict=True)):
        x, padding = pad_spatial(x, w.begins, _behind(w), -math.inf), [0] * len(w.kernel)
    return _MAX_POOLS[len(w.kernel)](x, w.kernel, w.strides, padding, w.dilations)


@operator("AveragePool")
def average_pool(attributes: Attributes, x: Tensor) -> Tensor:
    """The mean of each window; padding counts only with `count_include_pad`, what `ceil_mode` adds never does."""
    w = windows(attributes, x.shape[2:], attributes["kernel_shape"])
    rank, include = len(w.kernel), bool(attributes.get("count_include_pad", 0))
    plain = w.symmetric and all(d == 1 for d in w.dilations)
    if plain and all(2 * p <= k for p, k in zip(w.begins, w.kernel, strict=True)):
        return _AVERAGE_POOLS[rank](x, w.kernel, w.strides, w.begins, False, include)
    counted = x.new_ones(1, 1, *x.shape[2:])
    counted = pad_spatial(counted, w.begins, w.ends, float(include))
    counted = pad_spatial(counted, [0] * rank, w.extra)
    sums = _window_sums(pad_spatial(x, w.begins, _behind(w)), w)
    return sums / _window_sums(counted, w)


@operator("GlobalAveragePool")
def global_average_pool(attributes: Attributes, x: Tensor) -> Tensor:
    """The mean over all spatial axes, which stay as size 1."""
    return x.mean(dim=tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    """The maximum over all spatial axes, which stay as size 1."""
    return x.amax(dim=tuple(range(2, x.dim())), keepdim=True)


def _behind(w: Windows) -> list[int]:
    return [end + extra for end, extra in zip(w.ends, w.extra, strict=True)]


def _window_sums(x: Tensor, w: Windows) -> Tensor:
    """Sum of each window, by a convolution with ones that treats channels as samples: it knows dilations."""
    ones = torch.ones(1, 1, *w.kernel, dtype=x.dtype, device=x.device)
    sums = CONVOLUTIONS[len(w.kernel)](x.reshape(-1, 1, *x.shape[2:]), ones, None, w.strides, 0, w.dilations)
    return sums.reshape(*x.shape[:2], *sums.shape[2:])
