"""What a dataset is: two splits of samples that are read from disk batch by batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from onnxmerge.errors import UsageError

HELD_OUT_SHARE = 10
"""One sample in this many is held out where the source has no test samples of its own."""


@dataclass(frozen=True)
class InputSpec:
    """One input of a model: its name, shape and element type. Axis 0 is the batch; None means any size."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype

    @property
    def sample_shape(self) -> tuple[int | None, ...]:
        """The shape of one sample: `shape` without its batch axis."""
        return self.shape[1:]

    def accepts(self, sample_shape: tuple[int, ...]) -> bool:
        """Whether samples of this shape can be fed."""
        return len(sample_shape) == len(self.sample_shape) and all(
            expected is None or size == expected for size, expected in zip(sample_shape, self.sample_shape, strict=True)
        )


class Batch(NamedTuple):
    """Some samples: each input's array (samples first) and, where known, labels.

    Labels are class numbers (samples,) int64, or what the model's first output should be (samples, ...) float32.
    Numbers (samples,) say which of their split's samples these are, where they were drawn at random.
    """

    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None
    numbers: np.ndarray | None = None

    @property
    def classes(self) -> np.ndarray | None:
        """The labels where they are class numbers."""
        return self.labels if self.labels is not None and self.labels.dtype.kind == "i" else None


class Samples(Protocol):
    """Samples on disk, read by their numbers."""

    @property
    def has_labels(self) -> bool:
        """Whether every sample has a label."""

    def __len__(self) -> int: ...

    def read(self, rows: np.ndarray) -> Batch:
        """The samples numbered `rows` (count,) in that order, ready to feed.

        Raises:
            UsageError: a sample cannot be read, or holds NaN or infinity.
        """


class Split:
    """One part of a dataset: a choice of samples, of which only one batch at a time is in memory."""

    def __init__(self, samples: Samples, rows: np.ndarray | None = None) -> None:
        self._samples = samples
        self._rows = np.arange(len(samples)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def has_labels(self) -> bool:
        """Whether batches carry labels."""
        return self._samples.has_labels

    def batches(self, size: int) -> Iterator[Batch]:
        """Every sample once, in the source's order, `size` at a time; the last batch may be shorter."""
        _check_batch_size(size)
        for start in range(0, len(self), size):
            yield self._samples.read(self._rows[start : start + size])

    def shuffled(self, size: int, seed: int, skip: int = 0, part: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Full batches without end, reshuffled each epoch; `size` is clipped to the number of samples.

        What is left over at the end of an epoch waits for a later one. The first `skip` batches are left out, unread.
        Of each batch only part number `part[0]`, from 0, of `part[1]` nearly equal ones is read.
        """
        _check_batch_size(size)
        generator = np.random.default_rng(seed)
        size = min(size, len(self))
        while True:
            order = generator.permutation(len(self))
            for start in range(0, len(order) - size + 1, size):
                if skip:
                    skip -= 1
                    continue
                numbers = np.array_split(order[start : start + size], part[1])[part[0]]
                yield self._samples.read(self._rows[numbers])._replace(numbers=numbers)

    def take(self, samples: int, seed: int) -> "Split":
        """A random subset of `samples` samples in the source's order, or all of them when there are no more.

        With one seed, a smaller subset is part of a larger one.

        Raises:
            UsageError: `samples` is less than 1.
        """
        if samples < 1:
            raise UsageError(f"the number of samples must be at least 1, not {samples}")
        if samples >= len(self):
            return self
        chosen = np.random.default_rng(seed).permutation(len(self))[:samples]
        return Split(self._samples, self._rows[np.sort(chosen)])


@dataclass(frozen=True)
class Dataset:
    """The samples of one source: those to calibrate with, and those held out to judge by."""

    source: str
    calibration: Split
    held_out: Split
    stand_in: bool = False
    """Whether the samples are made up: figures measured on them say little about real data."""


def hold_out(source: str, samples: Samples, seed: int) -> Dataset:
    """Split `samples` at random: a tenth (at least one) is held out, the rest calibrates.

    Raises:
        UsageError: there are fewer than two samples.
    """
    count = len(samples)
    if count < 2:
        raise UsageError(
            f"{source}: holds {count} sample{'' if count == 1 else 's'}, "
            "but at least 2 are needed: one to calibrate with and one to hold out"
        )
    order = np.random.default_rng(seed).permutation(count)
    boundary = count - max(1, count // HELD_OUT_SHARE)
    calibration, held_out = np.sort(order[:boundary]), np.sort(order[boundary:])
    return Dataset(source, Split(samples, calibration), Split(samples, held_out))


def _check_batch_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"a batch holds at least 1 sample, not {size}")
