"""Candidates that stand for several networks of one architecture: how they are scored, measured and kept."""

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx_ir as oir

from onnxmerge.ir.layers import find_layers, parameter_count
from onnxmerge.ir.load import load
from onnxmerge.ir.save import stored_bytes
from onnxmerge.methods.candidates import Shelf
from onnxmerge.methods.ensemble import Ensemble
from onnxmerge.methods.fuse.settings import FuseSettings
from onnxmerge.methods.gate.settings import GateSettings
from onnxmerge.methods.measure import Bench, Judge
from onnxmerge.methods.progress import Progress
from onnxmerge.methods.task import Task
from onnxmerge.report.schema import Candidate, TaskScore


class OneTask:
    """The candidates of one run so far, and what they are compared by.

    Args:
        tasks: the originals.
        weights: of each original in the ensemble.
        temporary: a folder for temporary files.
        shelf: where candidates are kept.
        settings: of the method.
        progress: told of stages.
        outputs: what candidates call each task's outputs, in order. None: the networks have one task, candidates have
            the outputs of the first and are held against the ensemble too.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        weights: Sequence[float],
        temporary: Path,
        shelf: Shelf,
        settings: FuseSettings | GateSettings,
        progress: Progress,
        outputs: Mapping[str, Sequence[str]] | None = None,
    ):
        self.tasks, self._weights, self._temporary = tasks, weights, temporary
        self._outputs = outputs
        self.shelf, self._progress = shelf, progress
        self._threads = settings.threads
        self._bench = Bench(tasks, tasks[0].inputs, self._threads, settings.providers) if settings.measure else None
        self.candidates: list[Candidate] = []
        self._models: dict[str, oir.Model] = {}
        self.notes: list[str] = []

    @cached_property
    def ensemble(self) -> Ensemble:
        """What candidates are compared by."""
        self._progress.stage("ensemble")
        return Ensemble(self.tasks, self._weights, self._temporary / "ensemble", self._threads)

    @cached_property
    def judge(self) -> Judge:
        """Holds candidates against each original."""
        outputs = self._outputs or {task.name: self.tasks[0].outputs for task in self.tasks}
        return Judge(self.tasks, self._temporary, self._threads, outputs=outputs)

    @cached_property
    def originals(self) -> dict[str, TaskScore]:
        """Each original against the ensemble; none where each has a task of its own."""
        if self._outputs is not None:
            return {}
        return {task.name: self.ensemble.score(task.model) for task in self.tasks}

    def model(self, name: str) -> oir.Model:
        """A copy of the candidate `name`."""
        return self._models[name].clone() if name in self._models else load(self.shelf.model_path(name))

    def find(self, name: str) -> bool:
        """Whether an earlier run finished the candidate `name`, which is taken over then."""
        candidate = self.shelf.get(name)
        if candidate is not None:
            self.candidates.append(candidate)
        return candidate is not None

    def add(
        self,
        name: str,
        model: oir.Model,
        *,
        start: str,
        steps: int,
        losses: Sequence[tuple[int, float]],
        begun: float,
        **more: Any,
    ) -> None:
        """Write `model` as a finished candidate, score and measure it.

        Args:
            name: the candidate's name.
            model: kept; callers do not change it afterwards.
            start: where its weights came from.
            steps: of training since then.
            losses: (step, held-out loss).
            begun: `time.perf_counter()` when work on it began.
            more: other fields of `Candidate`.
        """
        path = self.shelf.write(name, model)
        self._progress.stage(f"{name}: measure")
        layers = len(find_layers(model))
        candidate = Candidate(
            name=name,
            share=layers,
            path=str(path),
            parameters=parameter_count(model),
            bytes=stored_bytes(path),
            tasks=self.judge.score(model),
            ensemble=None if self._outputs is not None else self.ensemble.score(model),
            steps=steps,
            seconds=time.perf_counter() - begun,
            start=start,
            total_layers=layers,
            losses=list(losses),
            **more,
        )
        if self._bench is not None:
            self._measure(candidate, path, self._bench)
        self._models[name] = model
        self.shelf.put(candidate)
        self.candidates.append(candidate)

    def _measure(self, candidate: Candidate, path: Path, bench: Bench) -> None:
        if self.candidates:  # all have one architecture
            candidate.latency_ms, candidate.memory_mb = self.candidates[0].latency_ms, self.candidates[0].memory_mb
            return
        candidate.latency_ms, reliable = bench.latency(path)
        candidate.memory_mb = bench.memory(path)
        if not reliable:
            self.notes.append("The latency was measured on a busy machine and is not reliable.")

    def best(self) -> Candidate:
        """The candidate that agrees best with the ensemble; the first of several."""
        return max(self.candidates, key=nearness)

    def chosen(self, max_drop: float | None) -> Candidate | None:
        """What was trained longest of those that lose at most `max_drop`, and of these the one nearest."""
        within = [c for c in self.candidates if max_drop is None or c.worst_drop is None or c.worst_drop <= max_drop]
        return max(within, key=lambda c: (c.steps, nearness(c)), default=None)

    def interrupted(self) -> None:
        """Note that the run was stopped here."""
        finished = ", ".join(c.name for c in self.candidates) or "none"
        self.notes.append(f"Interrupted: these candidates were finished and are kept: {finished}.")


def nearness(candidate: Candidate) -> float:
    """How near a candidate is to the ensemble, or where there is none to the original it fares worst against."""
    return -(candidate.worst_drop or 0.0) if candidate.ensemble is None else candidate.ensemble.closeness
