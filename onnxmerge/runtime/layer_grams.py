"""How layers see samples: Gram matrices of their activations, for linear CKA between layers of any two networks.

With X [samples, channels * positions] a layer's values and H = 1 - 11'/n, the centred Gram matrix is K = H X X' H, and
linear CKA is |Y'HX|^2 / (|X'HX| |Y'HY|) = <K, L> / (|K| |L|) in Frobenius norms (Kornblith et al. 2019). Two layers
need nothing in common but the samples.
"""

import math
import shutil
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.compose import cut_out
from onnxmerge.runtime.activations import BATCH, OnDisk, Samples, lockstep, store, stream
from onnxmerge.scratch import scratch

ENTRIES = 4_000_000
"""Activations of a layer that are in memory at a time."""
_CONSTANT = 1e-12
"""A layer whose values vary by less than this share of their squares is constant: the rest is rounding."""


def layer_grams(
    model: oir.Model, samples: Samples, names: Sequence[str], *, threads: int | None = None
) -> dict[str, np.ndarray]:
    """The centred Gram matrix [samples, samples] of each value in float64; zeros for a value that is constant.

    Every sample meets every other in every layer, so activations of all samples are needed at once: the network is
    walked from value to value, what arrives at the last two is kept on disk, and is read by features.

    Args:
        model: a normalised model.
        samples: its feeds.
        names: computed values, each of which can be computed from the one before, with the samples on their first axis
            (several places of it for one sample, as the windows of an image, are fine).
        threads: for onnxruntime.

    Raises:
        ModelError: a value is not finite, or its first axis is not that of the samples.
        UsageError: the disk is full.
    """
    fed = model.graph.inputs[0].name or ""
    count = sum(len(batch[fed]) for batch in samples.batches(BATCH))
    at, arriving = [value.name or "" for value in model.graph.inputs], samples
    grams: dict[str, np.ndarray] = {}
    with scratch() as folder:
        for number, name in enumerate(names):
            piece = cut_out(model, at, [name])
            one = next(stream(piece, arriving, [name], threads=threads, size=1))
            stored = store(piece, arriving, [name], folder / str(number), threads=threads)
            grams[name] = _centred(name, _rows(name, stored.arrays[name], count, one[name].shape[:1]))
            if number:
                shutil.rmtree(folder / str(number - 1))
            at, arriving = [name], stored
    return grams


def _rows(name: str, array: np.ndarray | OnDisk, count: int, places: tuple[int, ...]) -> OnDisk:
    """[samples, features]."""
    assert isinstance(array, OnDisk)
    if array.shape[:1] != tuple(place * count for place in places) or not places:
        raise ModelError(f"the first axis of the value {name!r} {array.shape} is not that of the {count} samples")
    return array.reshaped((count, math.prod(array.shape) // count))


def _centred(name: str, rows: OnDisk) -> np.ndarray:
    """H X X' H from the activations X [samples, features].

    Each feature is centred before it is multiplied: then products in float32 of some thousand features at a time,
    summed in float64, lose nothing.
    """
    count, features = rows.shape
    gram, squares = np.zeros((count, count)), 0.0
    width = max(ENTRIES // count, 1)
    for start in range(0, features, width):
        chunk = rows[:, start : start + width]
        chunk = chunk.astype(np.result_type(chunk, np.float32), copy=False)
        squares += float(np.vdot(chunk, chunk))
        chunk -= chunk.mean(0, dtype=np.float64).astype(chunk.dtype)
        gram += chunk @ chunk.T
    if not np.isfinite(gram).all():
        raise ModelError(f"the value {name!r} is NaN or infinite on these samples")
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
    for (batch,) in lockstep((model, samples, [*axes, fed]), threads=threads):
        for name, axis in axes.items():
            moved = np.moveaxis(batch[name], axis, -1)
            count = len(batch[fed])
            if len(moved) % count:
                raise ModelError(f"the first axis of the value {name!r} {batch[name].shape} is not that of the samples")
            found[name].append(moved.reshape(count, -1, moved.shape[-1]).mean(1, dtype=np.float64))
    return {name: np.concatenate(means) for name, means in found.items()}
