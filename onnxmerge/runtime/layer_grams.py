"""How layers see samples: Gram matrices of their activations, for linear CKA between layers of any two networks.

With X [samples, channels * positions] a layer's values and H = 1 - 11'/n, the centred Gram matrix is K = H X X' H, and
linear CKA is |Y'HX|^2 / (|X'HX| |Y'HY|) = <K, L> / (|K| |L|) in Frobenius norms (Kornblith et al. 2019). Two layers
need nothing in common but the samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.runtime.activations import BATCH, Arrays, Samples, stream

MEMORY = 256_000_000
"""Bytes of activations, of all layers asked for together, that a block of samples may take."""
_FEWEST = 8
"""Samples of a block, however large their activations are."""
_FEATURES = 1 << 15
"""Features multiplied at once in float64."""
_CONSTANT = 1e-12
"""A layer whose values vary by less than this share of their squares is constant: the rest is rounding."""


class _From:
    """The samples from a batch on."""

    def __init__(self, samples: Samples, start: int):
        self._samples, self._start = samples, start

    def batches(self, size: int) -> Iterator[Mapping[str, np.ndarray]]:
        """See `Samples`."""
        return islice(self._samples.batches(size), self._start, None)


def layer_grams(
    model: oir.Model, samples: Samples, names: Sequence[str], *, threads: int | None = None
) -> dict[str, np.ndarray]:
    """The centred Gram matrix [samples, samples] of each value in float64; zeros for a value that is constant.

    Activations of all samples are never held together: one block of samples stays, those from there on are run against
    it block by block, then the next block stays. With b blocks each sample runs (b + 1) / 2 times on average.

    Args:
        model: a normalised model.
        samples: its feeds.
        names: computed values with the samples on their first axis (several places of it for one sample, as the windows
            of an image, are fine).
        threads: for onnxruntime.

    Raises:
        ModelError: a value is not finite, or its first axis is not that of the samples.
    """
    fed = model.graph.inputs[0].name or ""
    one = next(stream(model, samples, names, threads=threads, size=1))
    places = {name: array.shape[:1] for name, array in one.items()}
    size = int(np.clip(MEMORY // max(sum(array.nbytes for array in one.values()), 1), _FEWEST, BATCH))
    products: dict[str, list[list[np.ndarray]]] = {name: [] for name in names}
    start, blocks = 0, 1
    while start < blocks:
        kept: Arrays = {}
        batches = stream(model, _From(samples, start), [*names, fed], threads=threads, size=size)
        for number, batch in enumerate(batches, start):
            rows = {name: _rows(name, batch[name], len(batch[fed]), places[name]) for name in names}
            kept = kept or rows
            for name in names:
                if number == start:
                    products[name].append([])
                products[name][start].append(_product(kept[name], rows[name]))
            blocks = number + 1
        start += 1
    return {name: _centred(name, products[name]) for name in names}


def _rows(name: str, array: np.ndarray, count: int, places: tuple[int, ...]) -> np.ndarray:
    """[samples, features]."""
    if array.shape[:1] != tuple(place * count for place in places) or not places:
        raise ModelError(f"the first axis of the value {name!r} {array.shape} is not that of the {count} samples")
    return array.reshape(count, -1)


def _product(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[p, q] inner products of rows, summed in float64."""
    total = np.zeros((len(first), len(second)))
    for start in range(0, first.shape[1], _FEATURES):
        chunk = slice(start, start + _FEATURES)
        total += first[:, chunk].astype(np.float64) @ second[:, chunk].astype(np.float64).T
    return total


def _centred(name: str, upper: list[list[np.ndarray]]) -> np.ndarray:
    """The whole matrix, from the blocks on and above its diagonal, with rows and columns centred."""
    rows = [
        [*(upper[column][row - column].T for column in range(row)), *upper[row]]  # upper[i][j]: block (i, i + j)
        for row in range(len(upper))
    ]
    gram = np.block(rows)
    if not np.isfinite(gram).all():
        raise ModelError(f"the value {name!r} is NaN or infinite on these samples")
    squares = np.trace(gram)
    gram = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    return gram if np.trace(gram) > _CONSTANT * squares else np.zeros_like(gram)


def cka(first: np.ndarray, second: np.ndarray) -> float:
    """Linear CKA in 0..1 of two layers' centred Gram matrices [n, n] over the same samples; 0 for a constant layer."""
    scale = np.linalg.norm(first) * np.linalg.norm(second)
    return min(1.0, float(np.sum(first * second) / scale)) if scale > 0 else 0.0


def channel_means(
    model: oir.Model, samples: Samples, axes: Mapping[str, int], *, threads: int | None = None
) -> dict[str, np.ndarray]:
    """[samples, channels] of each value: the mean over positions; `axes` are the channel axes of the values by name.

    Raises:
        ModelError: a value's first axis is not that of the samples.
    """
    fed = model.graph.inputs[0].name or ""
    found: dict[str, list[np.ndarray]] = {name: [] for name in axes}
    for batch in stream(model, samples, [*axes, fed], threads=threads):
        for name, axis in axes.items():
            moved = np.moveaxis(batch[name], axis, -1)
            count = len(batch[fed])
            if len(moved) % count:
                raise ModelError(f"the first axis of the value {name!r} {batch[name].shape} is not that of the samples")
            found[name].append(moved.reshape(count, -1, moved.shape[-1]).mean(1, dtype=np.float64))
    return {name: np.concatenate(means) for name, means in found.items()}
