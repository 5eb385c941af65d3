"""What a frozen network gives for each sample, computed once and kept in a file."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from onnxmerge.data import Batch, Split
from onnxmerge.errors import UsageError

Compute = Callable[[Batch], list[Tensor]]
"""What the network gives for a batch, in float32."""


@dataclass(frozen=True)
class _Layout:
    """How one sample of a value lies in memory."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    """The axes of the value, that of the samples first, the one with the largest stride next."""

    @classmethod
    def of(cls, value: Tensor) -> "_Layout":
        order = (0, *sorted(range(1, value.dim()), key=value.stride, reverse=True))
        return cls(tuple(value.shape[axis] for axis in order[1:]), order)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def flat(self, value: Tensor) -> np.ndarray:
        return value.permute(self.order).reshape(len(value), self.size).cpu().numpy()

    def value(self, flat: np.ndarray) -> Tensor:
        dense = torch.from_numpy(np.ascontiguousarray(flat)).reshape(len(flat), *self.shape)
        return dense.permute(*np.argsort(self.order).tolist())


class Remembered:
    """The values for every sample of a split, in a file without a name that goes with this object.

    They are computed for the samples in the split's own order. So they do not depend on where a run that goes on was
    stopped; but a sample's values depend on those it is computed with, in the last bits.

    Attributes:
        bytes: size of the file.
    """

    def __init__(self, compute: Compute, split: Split, batch: int, limit: int):
        """Compute all, `batch` samples at a time.

        Raises:
            UsageError: they take more than `limit` bytes, or the disk is full.
        """
        self._file: BinaryIO = tempfile.TemporaryFile(prefix="onnxmerge-", buffering=0)  # noqa: SIM115 (closed with it)
        self._layouts: list[_Layout] = []
        for samples in split.batches(batch):
            values = compute(samples)
            if not self._layouts:
                self._layouts = [_Layout.of(value) for value in values]
                self._check(len(split), limit)
            flat = [own.flat(value) for own, value in zip(self._layouts, values, strict=True)]
            self._write(np.ascontiguousarray(np.concatenate(flat, axis=1)))
        self.bytes = len(split) * self._record

    def __call__(self, numbers: np.ndarray) -> list[Tensor]:
        """The values for the samples with these numbers in the split, as `compute` would give them, on the CPU."""
        flat = np.empty((len(numbers), self._record // 4), np.float32)
        for row, number in zip(flat, numbers, strict=True):
            self._file.seek(int(number) * self._record)
            self._file.readinto(row.data)  # type: ignore[attr-defined]  # a file without a buffer has it
        ends = np.cumsum([own.size for own in self._layouts])[:-1]
        return [own.value(part) for own, part in zip(self._layouts, np.split(flat, ends, axis=1), strict=True)]

    @property
    def _record(self) -> int:
        """Bytes of one sample."""
        return 4 * sum(own.size for own in self._layouts)

    def _check(self, samples: int, limit: int) -> None:
        needed = samples * self._record
        if needed > limit:
            raise UsageError(
                f"what the teachers give for {samples} samples takes {needed:,} bytes, more than are left of "
                f"--cache-bytes ({limit:,}); allow more, or leave it out"
            )

    def _write(self, flat: np.ndarray) -> None:
        try:
            written = self._file.write(flat.data)
            if written < flat.nbytes:
                self._file.write(flat.reshape(-1).view(np.uint8)[written:].data)  # says why the rest was not
        except OSError as error:
            raise UsageError(
                f"{tempfile.gettempdir()}: cannot keep what the teachers give: {error.strerror or error}"
            ) from error
