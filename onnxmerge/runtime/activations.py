"""Run a model over samples and hand out the values asked for, batch by batch; keep a cut's values on disk."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import UsageError
from onnxmerge.ir.compose import cut_out
from onnxmerge.ir.labels import dims
from onnxmerge.runtime.session import open_session, run

BATCH = 128
"""Samples run at once when statistics are gathered, where their values fit into `MEMORY`."""
MEMORY = 64_000_000
"""Bytes that the values of one network may take while a batch runs."""

CPU = ("cpu",)
"""Where values are computed unless another provider is asked for."""

Arrays = dict[str, np.ndarray]


class Samples(Protocol):
    """Anything that yields feeds for a model: a dataset's split, or the stored values of a cut."""

    def batches(self, size: int) -> Iterator[Mapping[str, np.ndarray]]:
        """The samples in a fixed order, `size` at a time; the last batch may be shorter."""


@dataclass(frozen=True)
class OnDisk:
    """An array in a file of its own. What is indexed is copied, so that no page of the file stays mapped."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.array(np.memmap(self.path, self.dtype, "r", shape=self.shape)[index])

    def reshaped(self, shape: tuple[int, ...]) -> "OnDisk":
        """The same elements in another shape."""
        return OnDisk(self.path, self.dtype, shape)


class Stored:
    """Values for a set of samples: arrays in memory or on disk, whose first axis is that of the samples."""

    def __init__(self, arrays: Mapping[str, np.ndarray | OnDisk]):
        self.arrays = arrays

    def batches(self, size: int) -> Iterator[Arrays]:
        """See `Samples`."""
        count = len(next(iter(self.arrays.values())))
        for start in range(0, count, size):
            yield {name: array[start : start + size] for name, array in self.arrays.items()}


class Renamed:
    """The same samples under other names: `names[old]` is what `old` is called now; others are left out."""

    def __init__(self, samples: Samples, names: Mapping[str, str]):
        self._samples, self._names = samples, names

    def batches(self, size: int) -> Iterator[Arrays]:
        """See `Samples`."""
        for batch in self._samples.batches(size):
            yield {new: batch[old] for old, new in self._names.items()}


Source = tuple[oir.Model, Samples, Sequence[str]]
"""A model, its samples, and the values (inputs, computed values or outputs) that are asked for."""


def stream(
    model: oir.Model,
    samples: Samples,
    names: Sequence[str],
    *,
    threads: int | None = None,
    size: int = BATCH,
    providers: Sequence[str] = CPU,
) -> Iterator[Arrays]:
    """Values `names` (inputs, computed values or outputs) of `model` for each batch of `samples`."""
    yield from _Runner(model, samples, names, threads, providers).batches(size)


def lockstep(
    *sources: Source, threads: int | None = None, providers: Sequence[str] = CPU
) -> Iterator[tuple[Arrays, ...]]:
    """The values of several models for the same batches of their samples, which are equally many.

    A batch holds `BATCH` samples, or so many halves of it that the values of each model fit into `MEMORY`.
    """
    runners = [_Runner(*source, threads, providers) for source in sources]
    size = min(runner.fitting() for runner in runners)
    yield from zip(*(runner.batches(size) for runner in runners), strict=True)


class _Runner:
    """A model's values for samples."""

    def __init__(
        self,
        model: oir.Model,
        samples: Samples,
        names: Sequence[str],
        threads: int | None,
        providers: Sequence[str],
    ):
        self._samples, self._names = samples, names
        self._inputs = [value.name or "" for value in model.graph.inputs]
        self._computed = [name for name in dict.fromkeys(names) if name not in self._inputs]
        self._session, self._inside = None, 0
        if self._computed:
            part = cut_out(model, _needed(model, self._computed), self._computed)
            proto = oir.to_proto(part).SerializeToString()
            self._session = open_session(proto, providers=providers, threads=threads, spinning=False)
            self._inside = max(_bytes_around(node) for node in part.graph)

    def fitting(self) -> int:
        """The batch size at which the values fit into `MEMORY`: `BATCH` halved until they do."""
        one = next(self.batches(1))
        bytes_of_one = self._inside + sum(array.nbytes for array in one.values())
        size = BATCH
        while size > 1 and size * bytes_of_one > MEMORY:
            size //= 2
        return size

    def batches(self, size: int) -> Iterator[Arrays]:
        for batch in self._samples.batches(size):
            yield self._values(batch)

    def _values(self, batch: Mapping[str, np.ndarray]) -> Arrays:
        values = {} if self._session is None else run(self._session, batch, self._computed)
        return {name: batch[name] if name in self._inputs else values[name] for name in self._names}


def _bytes_around(node: oir.Node) -> int:
    """What a node reads and writes for one sample in float32, where its sizes are known."""
    values = [value for value in (*node.inputs, *node.outputs) if value is not None and value.const_value is None]
    return sum(4 * math.prod(size or 1 for size in dims(value)[1:]) for value in values)


def _needed(model: oir.Model, names: Sequence[str]) -> list[str]:
    """The graph inputs that the values `names` depend on."""
    wanted = set(names)
    for node in reversed(model.graph):
        if any(o.name in wanted for o in node.outputs):
            wanted |= {v.name or "" for v in node.inputs if v is not None}
    return [v.name or "" for v in model.graph.inputs if v.name in wanted]


def store(
    model: oir.Model,
    samples: Samples,
    names: Sequence[str],
    folder: Path,
    *,
    threads: int | None = None,
    providers: Sequence[str] = CPU,
) -> Stored:
    """Run `model` over `samples` and keep the values `names` in files under `folder`.

    Raises:
        UsageError: the files cannot be written.
    """
    return keep(
        (values for (values,) in lockstep((model, samples, names), threads=threads, providers=providers)), folder
    )


def keep(batches: Iterable[Mapping[str, np.ndarray]], folder: Path) -> Stored:
    """Write arrays batch by batch, each to a file under `folder`.

    The files are written in the ordinary way and mapped afterwards: a full disk is then an error, not a crash.

    Raises:
        UsageError: the files cannot be written.
    """
    found: dict[str, OnDisk] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            files: dict[str, BinaryIO] = {}
            for batch in batches:
                for name, array in batch.items():
                    if name not in files:
                        found[name] = OnDisk(folder / f"{len(files)}.bin", array.dtype, (0, *array.shape[1:]))
                        files[name] = stack.enter_context(found[name].path.open("wb"))
                    files[name].write(np.ascontiguousarray(array).data)
                    found[name] = found[name].reshaped((len(found[name]) + len(array), *array.shape[1:]))
    except OSError as error:
        raise UsageError(f"{folder}: cannot keep activations there: {error.strerror or error}") from error
    return Stored(found)
