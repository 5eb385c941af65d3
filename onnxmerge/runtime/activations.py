"""Run a model over samples and hand out the values asked for, batch by batch; keep a cut's values on disk."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import UsageError
from onnxmerge.ir.compose import cut_out
from onnxmerge.runtime.session import open_session, run

BATCH = 128
"""Samples run at once when statistics are gathered."""

Arrays = dict[str, np.ndarray]


class Samples(Protocol):
    """Anything that yields feeds for a model: a dataset's split, or the stored values of a cut."""

    def batches(self, size: int) -> Iterator[Mapping[str, np.ndarray]]:
        """The samples in a fixed order, `size` at a time; the last batch may be shorter."""


class Stored:
    """Values of a cut for a set of samples, in memory-mapped files: one file for each value."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays

    def batches(self, size: int) -> Iterator[Arrays]:
        """See `Samples`."""
        count = len(next(iter(self._arrays.values())))
        for start in range(0, count, size):
            yield {name: np.asarray(array[start : start + size]) for name, array in self._arrays.items()}


class Renamed:
    """The same samples under other names: `names[old]` is what `old` is called now; others are left out."""

    def __init__(self, samples: Samples, names: Mapping[str, str]):
        self._samples, self._names = samples, names

    def batches(self, size: int) -> Iterator[Arrays]:
        """See `Samples`."""
        for batch in self._samples.batches(size):
            yield {new: batch[old] for old, new in self._names.items()}


def stream(
    model: oir.Model, samples: Samples, names: Sequence[str], *, threads: int | None = None, size: int = BATCH
) -> Iterator[Arrays]:
    """Values `names` (inputs, computed values or outputs) of `model` for each batch of `samples`."""
    inputs = [value.name or "" for value in model.graph.inputs]
    computed = [name for name in dict.fromkeys(names) if name not in inputs]
    session = None
    if computed:
        part = cut_out(model, _needed(model, computed), computed)
        session = open_session(oir.to_proto(part).SerializeToString(), threads=threads, spinning=False)
    for batch in samples.batches(size):
        values = {} if session is None else run(session, batch, computed)
        yield {name: batch[name] if name in inputs else values[name] for name in names}


def _needed(model: oir.Model, names: Sequence[str]) -> list[str]:
    """The graph inputs that the values `names` depend on."""
    wanted = set(names)
    for node in reversed(model.graph):
        if any(o.name in wanted for o in node.outputs):
            wanted |= {v.name or "" for v in node.inputs if v is not None}
    return [v.name or "" for v in model.graph.inputs if v.name in wanted]


def store(
    model: oir.Model, samples: Samples, names: Sequence[str], folder: Path, *, threads: int | None = None
) -> Stored:
    """Run `model` over `samples` and keep the values `names` in files under `folder`.

    The files are written in the ordinary way and mapped afterwards: a full disk is then an error, not a crash.

    Raises:
        UsageError: the files cannot be written.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    kinds: dict[str, np.dtype] = {}
    paths = {name: folder / f"{number}.bin" for number, name in enumerate(names)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(path.open("wb")) for name, path in paths.items()}
            for batch in stream(model, samples, names, threads=threads):
                for name, array in batch.items():
                    files[name].write(np.ascontiguousarray(array).data)
                    rows = shapes[name][0] if name in shapes else 0
                    shapes[name], kinds[name] = (rows + len(array), *array.shape[1:]), array.dtype
    except OSError as error:
        raise UsageError(f"{folder}: cannot keep activations there: {error.strerror or error}") from error
    return Stored({name: np.memmap(paths[name], kinds[name], "r", shape=shapes[name]) for name in names})
