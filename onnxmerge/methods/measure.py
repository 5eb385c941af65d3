"""Measure a merged model against its originals: scores on held-out samples, latency and memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.methods.scoring import Tally, compare
from onnxmerge.methods.task import Task, merged_inputs, task_outputs
from onnxmerge.methods.tolerance import Gap, Tolerance
from onnxmerge.report.schema import LatencyRecord, MemoryRecord, TaskScore
from onnxmerge.runtime.activations import BATCH, CPU, Stored, store
from onnxmerge.runtime.latency import latency
from onnxmerge.runtime.memory import Memory, measure_memory
from onnxmerge.runtime.session import fixed_batch, node_providers, open_session


class Judge:
    """Scores merged models; the originals' outputs are computed once and kept on disk.

    Args:
        tasks: the originals.
        folder: for temporary files.
        threads: for onnxruntime.
        samples: at most this many held-out samples of each task; None: all.
        seed: of the choice of samples.
        outputs: what a merged model calls each task's outputs, in order; None: `TASK/output`.
        providers: where merged models and originals run.
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
        providers: Sequence[str] = CPU,
    ):
        self.tasks = tasks
        self._names = task_outputs(tasks) if outputs is None else outputs
        self.threads = threads
        self._providers = providers
        self._folder = folder
        self._splits = {
            task.name: task.data.held_out if samples is None else task.data.held_out.take(samples, seed)
            for task in tasks
        }
        self._expected: dict[str, Stored] = {}

    def score(self, merged: oir.Model) -> dict[str, TaskScore]:
        """How each task fares in `merged`."""
        return {task.name: self.tally(task, merged, {}).score() for task in self.tasks}

    def tally(self, task: Task, merged: oir.Model, tolerances: Mapping[str, Tolerance]) -> Tally:
        """The sums behind a task's score; also the gap of each output that has a tolerance under its merged name."""
        names, split = self._names[task.name], self._splits[task.name]
        return compare(
            merged,
            names,
            task.merged_feeds(split, merged),
            self._outputs(task).batches(BATCH),
            task.outputs,
            split,
            Tally(gaps=[Gap(tolerances[name]) if name in tolerances else None for name in names]),
            threads=self.threads,
            providers=self._providers,
        )

    def _outputs(self, task: Task) -> Stored:
        if task.name not in self._expected:
            split = self._splits[task.name]
            folder = self._folder / f"originals-{task.name}"
            try:
                self._expected[task.name] = store(
                    task.model,
                    task.feeds(split, task),
                    task.outputs,
                    folder,
                    threads=self.threads,
                    providers=self._providers,
                )
            except ModelError as error:
                raise ModelError(f"{task.path}: {str(error).removeprefix('the model: ')}") from error
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
        self._separate_memory: Memory | None = None
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

    def nodes(self, path: Path) -> dict[str, dict[str, int]]:
        """Which provider ran which of the merged model's nodes (see `node_providers`)."""
        session = open_session(path, providers=self.providers, threads=self.threads)
        feeds = {name: sample.repeat(fixed_batch(session) or 1, axis=0) for name, sample in self.feeds.items()}
        del session
        return node_providers(path, feeds, providers=self.providers, threads=self.threads)

    def memory(self, path: Path) -> MemoryRecord:
        """Unique set size of the merged model and of all originals together, each in a fresh process."""
        merged = measure_memory([path], [self.feeds], providers=self.providers, threads=self.threads)
        if self._separate_memory is None:
            self._separate_memory = measure_memory(
                self.paths, self.separate_feeds, providers=self.providers, threads=self.threads
            )
        return memory_record(merged, self._separate_memory)


def memory_record(merged: Memory | None, separate: Memory | None) -> MemoryRecord:
    """What the merged model and all originals together take, as far as it was measured."""
    return MemoryRecord(
        merged=None if merged is None else merged.unique_mb,
        separate=None if separate is None else separate.unique_mb,
        device_merged=None if merged is None else merged.device_mb,
        device_separate=None if separate is None else separate.device_mb,
    )


def nodes_note(path: Path, nodes: Mapping[str, Mapping[str, int]]) -> str:
    """How many nodes each provider ran, in a sentence; of all but the first, which operators these are."""
    parts = []
    for number, (provider, operators) in enumerate(nodes.items()):
        named = f" ({', '.join(operators)})" if number else ""
        parts.append(f"{sum(operators.values())} nodes on {provider}{named}")
    return f"{path.name}: {', '.join(parts)}."


def graph_note(path: Path, cuda_graphs: bool | None, at: str = "") -> list[str]:
    """How a GPU was timed, in a sentence; none on the CPU."""
    if cuda_graphs is None:
        return []
    if cuda_graphs:
        return [f"{path.name}{at and f' at {at}'} and what it is compared with were timed as CUDA graphs."]
    return [
        f"{path.name}{at and f' at {at}'}, or a model that it is compared with, cannot be a CUDA graph: the times hold "
        "the host's launching of kernels."
    ]


def unreliable_note(path: Path, at: str = "") -> str:
    """What to say of a latency that wavers; `at` says at which batch size."""
    return f"The latency of {path.name}{at and f' at {at}'} was measured on a busy machine and is not reliable."
