"""Measure a merged model against its originals: scores on held-out samples, latency and memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as oir

from onnxmerge.methods.scoring import Tally, compare
from onnxmerge.methods.task import Task, merged_inputs, task_outputs
from onnxmerge.report.schema import LatencyRecord, MemoryRecord, TaskScore
from onnxmerge.runtime.activations import BATCH, Stored, store
from onnxmerge.runtime.latency import latency
from onnxmerge.runtime.memory import measure_memory


class Judge:
    """Scores merged models; the originals' outputs are computed once and kept on disk.

    Args:
        tasks: the originals.
        folder: for temporary files.
        threads: for onnxruntime.
        samples: at most this many held-out samples of each task; None: all.
        seed: of the choice of samples.
        outputs: what a merged model calls each task's outputs, in order; None: `TASK/output`.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        folder: Path,
        threads: int | None,
        *,
        samples: int | None = None,
        seed: int = 0,
        outputs: Mapping[str, Sequence[str]] | None = None,
    ):
        self.tasks = tasks
        self._names = task_outputs(tasks) if outputs is None else outputs
        self.threads = threads
        self._folder = folder
        self._splits = {
            task.name: task.data.held_out if samples is None else task.data.held_out.take(samples, seed)
            for task in tasks
        }
        self._expected: dict[str, Stored] = {}

    def score(self, merged: oir.Model) -> dict[str, TaskScore]:
        """How each task fares in `merged`."""
        return {task: tally.score() for task, tally in self.tally(merged).items()}

    def tally(self, merged: oir.Model, atol: float | None = None, rtol: float | None = None) -> dict[str, Tally]:
        """The sums behind the scores; with a tolerance, also how many values exceed it."""
        return {
            task.name: compare(
                merged,
                self._names[task.name],
                task.merged_feeds(self._splits[task.name], merged),
                self._outputs(task).batches(BATCH),
                task.outputs,
                self._splits[task.name],
                Tally(atol=atol, rtol=rtol),
                threads=self.threads,
            )
            for task in self.tasks
        }

    def _outputs(self, task: Task) -> Stored:
        if task.name not in self._expected:
            split = self._splits[task.name]
            folder = self._folder / f"originals-{task.name}"
            self._expected[task.name] = store(
                task.model, task.feeds(split, task), task.outputs, folder, threads=self.threads
            )
        return self._expected[task.name]


class Bench:
    """Latency and memory of merged model files against the original files.

    Args:
        tasks: the originals.
        inputs: the merged model's input names.
        threads: for onnxruntime.
        providers: where to run.
    """

    def __init__(self, tasks: Sequence[Task], inputs: Sequence[str], threads: int | None, providers: Sequence[str]):
        self.paths = [task.path for task in tasks]
        self.threads = threads
        self.providers = providers
        self._separate_memory: float | None = None
        first = [next(task.data.held_out.batches(1)).inputs for task in tasks]
        self.separate_feeds: list[dict[str, np.ndarray]] = first
        self.feeds = {
            name: sample[theirs]
            for task, sample in reversed(list(zip(tasks, first, strict=True)))  # what all read is the first task's
            for name, theirs in zip(merged_inputs(task, inputs), task.inputs, strict=True)
        }

    def latency(self, path: Path) -> tuple[LatencyRecord, bool]:
        """Medians for one sample, and whether they are reliable (see `onnxmerge.runtime.latency`)."""
        found = latency(
            path, self.paths, self.feeds, self.separate_feeds, threads=self.threads, providers=self.providers
        )
        record = LatencyRecord(
            merged=found.merged,
            separate=found.separate,
            separate_default=found.separate_default,
            speedup=found.speedup,
        )
        return record, found.reliable

    def memory(self, path: Path) -> MemoryRecord:
        """Unique set size of the merged model and of all originals together, each in a fresh process."""
        merged = measure_memory([path], [self.feeds], providers=self.providers, threads=self.threads)
        if self._separate_memory is None:
            separate = measure_memory(self.paths, self.separate_feeds, providers=self.providers, threads=self.threads)
            self._separate_memory = None if separate is None else separate.unique_mb
        return MemoryRecord(merged=None if merged is None else merged.unique_mb, separate=self._separate_memory)
