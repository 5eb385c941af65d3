"""The geometry that convolution and pooling share: padding and output sizes of sliding windows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from onnxmerge.calibration.operators.registry import Attributes


@dataclass(frozen=True)
class Windows:
    """Sliding windows over the spatial axes; each list has one entry for each of them.

    `extra` is what `ceil_mode` adds behind the end padding so that the last window fits.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begins: list[int]
    ends: list[int]
    extra: list[int]

    @property
    def symmetric(self) -> bool:
        """Whether both ends are padded alike and nothing is added."""
        return self.begins == self.ends and not any(self.extra)


def windows(attributes: Attributes, spatial: Sequence[int], kernel: Sequence[int]) -> Windows:
    """Resolve `strides`, `dilations`, `pads`, `auto_pad` and `ceil_mode` for an input of the given spatial size."""
    rank = len(spatial)
    strides = list(attributes.get("strides") or [1] * rank)
    dilations = list(attributes.get("dilations") or [1] * rank)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    auto = attributes.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        totals = [max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(spatial, strides, reach, strict=True)]
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        begins, ends = (small, large) if auto == "SAME_UPPER" else (large, small)
    elif auto == "VALID":
        begins, ends = [0] * rank, [0] * rank
    else:
        pads = list(attributes.get("pads") or [0] * 2 * rank)
        begins, ends = pads[:rank], pads[rank:]
    extra = [0] * rank
    if attributes.get("ceil_mode", 0):
        for axis, (n, s, r) in enumerate(zip(spatial, strides, reach, strict=True)):
            steps = -(-(n + begins[axis] + ends[axis] - r) // s)
            if steps * s >= n + begins[axis]:  # a window must begin inside the input or its begin padding
                steps -= 1
            extra[axis] = max(steps * s + r - (n + begins[axis] + ends[axis]), 0)
    return Windows(list(kernel), strides, dilations, begins, ends, extra)


def pad_spatial(x: Tensor, begins: Sequence[int], ends: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad (or crop, where negative) the trailing axes with a constant."""
    pairs = [(begin, end) for begin, end in zip(begins, ends, strict=True)]
    return F.pad(x, [amount for pair in reversed(pairs) for amount in pair], value=value)
