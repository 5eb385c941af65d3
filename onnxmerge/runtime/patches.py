"""What a linear layer multiplies with its weight: rows of patches (im2col), at sampled positions."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxmerge.ir.layers import Layer

ROWS_PER_UNKNOWN = 64
"""Rows gathered for each unknown of a regression; neighbouring positions are alike, so more add little."""
_FEWEST, _MOST = 8, 192
"""Bounds of the output positions taken from one sample."""


@dataclass(frozen=True)
class Positions:
    """Sampled output positions: flat indices into the spatial (or token) grid of a layer's output."""

    flat: np.ndarray

    @staticmethod
    def sample(generator: np.random.Generator, grid: tuple[int, ...], count: int = _FEWEST) -> "Positions":
        """`count` different positions of `grid`, or all when there are fewer."""
        total = int(np.prod(grid))
        flat = np.arange(total) if total <= count else np.sort(generator.choice(total, count, replace=False))
        return Positions(flat)


def positions_needed(unknowns: int, samples: int) -> int:
    """Positions to take from each of `samples` samples for a regression with that many unknowns."""
    return int(np.clip(-(-ROWS_PER_UNKNOWN * unknowns // samples), _FEWEST, _MOST))


def grid_of(array: np.ndarray, axis: int) -> tuple[int, ...]:
    """Sizes of all axes of a value but the batch (0) and the channel axis."""
    return tuple(size for a, size in enumerate(array.shape) if a not in (0, axis % array.ndim))


def output_rows(array: np.ndarray, axis: int, positions: Positions) -> np.ndarray:
    """[samples * positions, channels]: the channels of a value at `positions`."""
    moved = np.moveaxis(array, axis, -1)
    return moved.reshape(len(array), -1, moved.shape[-1])[:, positions.flat].reshape(-1, moved.shape[-1])


def input_rows(layer: Layer, array: np.ndarray, positions: Positions) -> np.ndarray:
    """[groups, samples * positions, fan in]: what the layer's weight is multiplied with at `positions`.

    The fan-in order is that of `weight_matrix`.
    """
    if layer.op != "Conv":
        return output_rows(array, -1, positions)[None]
    patches = _patches(layer, array, positions)  # [samples, channels, positions, *kernel]
    samples, channels, count = patches.shape[:3]
    grouped = patches.reshape(samples, layer.groups, channels // layer.groups, count, -1)
    return grouped.transpose(1, 0, 3, 2, 4).reshape(layer.groups, samples * count, -1)


def _patches(layer: Layer, array: np.ndarray, positions: Positions) -> np.ndarray:
    kernel = layer.weight_shape[2:]
    dimensions = len(kernel)
    strides = _ints(layer, "strides", (1,) * dimensions)
    dilations = _ints(layer, "dilations", (1,) * dimensions)
    before, after = _pads(layer, array.shape[2:], kernel, strides, dilations)
    padded = np.pad(array, [(0, 0), (0, 0), *zip(before, after, strict=True)])
    extent = tuple(d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(padded, extent, tuple(range(2, 2 + dimensions)))
    strided: tuple[Any, ...] = (..., *(slice(None, None, step) for step in (*strides, *dilations)))
    windows = windows[strided]
    where = np.unravel_index(positions.flat, windows.shape[2 : 2 + dimensions])
    chosen: tuple[Any, ...] = (slice(None), slice(None), *where)
    return windows[chosen]


def _pads(
    layer: Layer, sizes: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Zeros before and after each spatial axis, as the ONNX operator defines `pads` and `auto_pad`."""
    attribute = layer.node.attributes.get("auto_pad")
    mode = "NOTSET" if attribute is None else attribute.as_string()
    if mode in ("NOTSET", "VALID"):
        pads = _ints(layer, "pads", (0,) * (2 * len(kernel))) if mode == "NOTSET" else (0,) * (2 * len(kernel))
        return pads[: len(kernel)], pads[len(kernel) :]
    totals = [
        max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    small, large = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
    return (small, large) if mode == "SAME_UPPER" else (large, small)


def _ints(layer: Layer, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    attribute = layer.node.attributes.get(name)
    return default if attribute is None else tuple(attribute.as_ints())


def weight_matrix(layer: Layer, weight: np.ndarray) -> np.ndarray:
    """[groups, fan in, outputs of a group]: the weight as the matrix that `input_rows` multiplies."""
    if layer.op == "Conv":
        return weight.reshape(layer.groups, weight.shape[0] // layer.groups, -1).transpose(0, 2, 1)
    return (weight.T if layer.op == "Gemm" and layer.transposed else weight)[None]


def weight_array(layer: Layer, matrix: np.ndarray) -> np.ndarray:
    """The inverse of `weight_matrix`."""
    if layer.op == "Conv":
        return matrix.transpose(0, 2, 1).reshape(layer.weight_shape)
    return matrix[0].T if layer.op == "Gemm" and layer.transposed else matrix[0]


def channel_axis(layer: Layer) -> int:
    """The axis of the layer's output that holds its channels."""
    return 1 if layer.op in ("Conv", "ConvTranspose") else -1
