"""Time models at several batch sizes on made-up inputs, alone or against the originals that they replace."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError, OnnxMergeError, UsageError
from onnxmerge.ir.light import read_light
from onnxmerge.ir.load import read
from onnxmerge.methods.pack.packing import unshared_graph
from onnxmerge.methods.task import task_names
from onnxmerge.report.schema import BatchLatency, Timing
from onnxmerge.runtime.latency import Latency, latency, measure_latency
from onnxmerge.runtime.session import fixed_batch, open_session, random_feeds, run
from onnxmerge.runtime.timed_run import TimedRun, timed_run

if TYPE_CHECKING:
    import onnxruntime

Feeds = Mapping[str, np.ndarray]

FEWEST = 20
"""Rounds at least, however large the batch; they go on for a second in any case."""


@dataclass(frozen=True)
class Timed:
    """One measurement: what it found, whether that is reliable (see `Latency`), how many seconds it took, and whether
    all models ran as CUDA graphs (None on the CPU)."""

    latency: BatchLatency
    reliable: bool = True
    seconds: float = 0.0
    cuda_graphs: bool | None = None


@dataclass
class Timer:
    """Times models on one kind of machine.

    Attributes:
        originals: what every timed model is held against; may be empty.
        folder: for a file with all originals.
        providers: short names in order of preference.
        threads: for onnxruntime; None leaves the choice to it.
        seed: of the inputs and of the order of runs.
        runs: timed rounds at least, of one sample; of larger batches as many samples, but `FEWEST` rounds.
    """

    originals: Sequence[Path]
    folder: Path
    providers: Sequence[str]
    threads: int | None
    seed: int
    runs: int
    notes: list[str] = field(default_factory=list, init=False)
    _fixed: dict[Path, int | None] = field(default_factory=dict, init=False)
    _feeds: dict[tuple[Path, int], Feeds] = field(default_factory=dict, init=False)
    _unshared: tuple[Path, dict[str, dict[str, str]]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if len(self.originals) > 1:
            self._put_into_one_graph()

    def sizes(self, path: Path, wanted: Sequence[int] | None) -> list[int]:
        """The batch sizes at which the model `path` is timed, ascending; None: 1, or what it, or an original, is fixed
        to.

        Raises:
            UsageError: a model cannot take one of them.
        """
        known = {own: size for own in [path, *self.originals] if (size := self._batch_of(own)) is not None}
        for own, size in known.items():
            for other in known.values() if wanted is None else wanted:
                if other != size:
                    raise UsageError(f"{own}: its batch size is fixed at {size}, so it cannot be timed at {other}")
        return sorted({*(known.values() or [1] if wanted is None else wanted)})

    def feeds(self, path: Path, size: int) -> Feeds:
        """Made-up inputs of `size` samples, on which the model has run once.

        Raises:
            UsageError: the model runs with other batch sizes only, as far as that can be seen.
            ModelError: it does not run.
        """
        if (path, size) not in self._feeds:
            session = self._open(path)
            feeds = random_feeds(session, batch=size, seed=self.seed)
            try:
                run(session, feeds)
            except OnnxMergeError as error:
                if size == 1 or size == self._batch_of(path):
                    raise
                raise UsageError(f"{path}: does not run with a batch of {size}: {error}") from error
            self._feeds[path, size] = feeds
        return self._feeds[path, size]

    def alone(self, asked: Sequence[tuple[Path, int]]) -> dict[tuple[Path, int], Timed]:
        """Each of the models at its batch sizes; those of one size are timed in turn with each other, spin-stopped."""
        found = {}
        for size in dict.fromkeys(size for _, size in asked):
            paths = [path for path, own in asked if own == size]
            feeds = [self.feeds(path, size) for path in paths]
            ready = {str(p): self._ready(p, own) for p, own in zip(paths, feeds, strict=True)}
            times = measure_latency(ready, runs=self._rounds(size), min_seconds=1.0, seed=self.seed)
            for path in paths:
                timing = BatchLatency(batch=size, merged=_timing(times[str(path)], size))
                found[path, size] = Timed(timing, cuda_graphs=ready[str(path)].cuda_graph)
        return found

    def against_originals(self, path: Path, size: int) -> Timed:
        """The model beside the originals at one batch size."""
        begun = time.perf_counter()
        separate = [self.feeds(original, size) for original in self.originals]
        found = latency(
            path,
            self.originals,
            self.feeds(path, size),
            separate,
            unshared=self._unshared_with(separate),
            threads=self.threads,
            providers=self.providers,
            runs=self._rounds(size),
            seed=self.seed,
        )
        return Timed(self._record(found, size), found.reliable, time.perf_counter() - begun, found.cuda_graphs)

    def _rounds(self, size: int) -> int:
        return max(min(self.runs, FEWEST), self.runs // size)

    def _record(self, found: Latency, size: int) -> BatchLatency:
        timings = {name: _timing(times, size) for name, times in found.times.items()}
        return BatchLatency(
            batch=size,
            merged=timings.pop("merged"),
            **timings,
            speedup=found.speedup,
            of_ideal=found.speedup / len(self.originals),
        )

    def _batch_of(self, path: Path) -> int | None:
        if path not in self._fixed:
            read(path)  # one clear sentence for a file that is no model
            self._fixed[path] = fixed_batch(self._open(path))
        return self._fixed[path]

    def _open(self, path: Path) -> "onnxruntime.InferenceSession":
        return open_session(path, providers=self.providers, threads=self.threads, spinning=False)

    def _ready(self, path: Path, feeds: Feeds) -> TimedRun:
        return timed_run(path, feeds, providers=self.providers, threads=self.threads, spinning=False)

    def _put_into_one_graph(self) -> None:
        """Write all originals into one file; equal weights stay apart in it."""
        names = task_names(self.originals)
        file = self.folder / "unshared.onnx"
        try:
            graphs = {name: read_light(path) for name, path in zip(names, self.originals, strict=True)}
            model, inputs = unshared_graph(graphs)
            oir.save(model, file, external_data=f"{file.name}.data")
        except (ModelError, OSError) as error:
            self.notes.append(f"The originals could not be put into one graph to compare with: {error}.")
        else:
            self._unshared = file, inputs

    def _unshared_with(self, separate: Sequence[Feeds]) -> tuple[Path, Feeds] | None:
        """The file with all originals, and what it is fed: each original's inputs under the names that they have."""
        if self._unshared is None:
            return None
        file, inputs = self._unshared
        called = {
            name: feeds[own]
            for feeds, names in zip(separate, inputs.values(), strict=True)
            for own, name in names.items()
        }
        return file, called


def _timing(times: Sequence[float], batch: int) -> Timing:
    p50, p90, p99 = (float(value) for value in np.percentile(times, [50, 90, 99]))
    throughput = 1e3 * batch * len(times) / sum(times)
    return Timing(p50=p50, p90=p90, p99=p99, throughput=throughput, rounds=len(times))
