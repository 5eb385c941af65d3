"""Convolutions over one, two or three spatial axes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxmerge.calibration.operators.registry import Attributes, operator
from onnxmerge.calibration.operators.windows import pad_spatial, windows

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@operator("Conv")
def convolution(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` is [N, C, *spatial], `weight` [M, C / group, *kernel]."""
    rank = _spatial_rank(x)
    w = windows(attributes, x.shape[2:], weight.shape[2:])
    padding = w.begins
    if not w.symmetric:
        x, padding = pad_spatial(x, w.begins, w.ends), [0] * rank
    settings = w.strides, padding, w.dilations, attributes.get("group", 1)
    if x.is_cpu and weight.shape[1] == 1 < len(weight):  # depthwise in bfloat16 is many times slower backwards on CPU
        with torch.autocast("cpu", enabled=False):
            return CONVOLUTIONS[rank](x.float(), weight.float(), None if bias is None else bias.float(), *settings)
    return CONVOLUTIONS[rank](x, weight, bias, *settings)


@operator("ConvTranspose")
def transposed_convolution(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` is [N, C, *spatial], `weight` [C, M / group, *kernel].

    The full output, `stride (size - 1) + reach` long, is cropped by `pads` and lengthened by `output_padding`.
    """
    rank = _spatial_rank(x)
    strides = list(attributes.get("strides") or [1] * rank)
    dilations = list(attributes.get("dilations") or [1] * rank)
    added = list(attributes.get("output_padding") or [0] * rank)
    group = attributes.get("group", 1)
    full = [
        s * (n - 1) + (k - 1) * d + 1
        for n, s, k, d in zip(x.shape[2:], strides, weight.shape[2:], dilations, strict=True)
    ]
    begins, ends = _crops(attributes, full, added, [n * s for n, s in zip(x.shape[2:], strides, strict=True)])
    if begins == ends and min(begins) >= 0 and not any(added):
        return _TRANSPOSED[rank](x, weight, bias, strides, begins, 0, group, dilations)
    y = _TRANSPOSED[rank](x, weight, None, strides, 0, 0, group, dilations)
    y = pad_spatial(y, [-begin for begin in begins], [a - end for a, end in zip(added, ends, strict=True)])
    return y if bias is None else y + bias.reshape(-1, *[1] * rank)


def _crops(attributes: Attributes, full: list[int], added: list[int], same: list[int]) -> tuple[list[int], list[int]]:
    rank, auto = len(full), attributes.get("auto_pad", "NOTSET")
    wanted = attributes.get("output_shape")
    if wanted is None and auto.startswith("SAME"):
        wanted = [min(n, f + a) for n, f, a in zip(same, full, added, strict=True)]
    if wanted is None:
        pads = list(attributes.get("pads") or [0] * 2 * rank)
        return (pads[:rank], pads[rank:]) if auto != "VALID" else ([0] * rank, [0] * rank)
    # Where more is wanted than there is, the total is negative and zeros are added at the end.
    totals = [f + a - w for f, a, w in zip(full, added, list(wanted)[-rank:], strict=True)]
    small = [max(t, 0) // 2 for t in totals]
    large = [max(t, 0) - s for t, s in zip(totals, small, strict=True)]
    begins = small if auto == "SAME_UPPER" else large
    return begins, [t - b for t, b in zip(totals, begins, strict=True)]


def _spatial_rank(x: Tensor) -> int:
    rank = x.dim() - 2
    if rank not in CONVOLUTIONS:
        raise NotImplementedError(f"{rank} spatial axes are not supported")
    return rank
