"""One zip under way: candidate after candidate is fitted, calibrated, scored, measured and kept."""

import time
from collections.abc import Sequence
from pathlib import Path

from onnxmerge.ir.layers import find_layers, parameter_count
from onnxmerge.ir.save import stored_bytes
from onnxmerge.methods.measure import Bench, Judge
from onnxmerge.methods.recipe import Recipe
from onnxmerge.methods.task import all_inputs
from onnxmerge.methods.zip.bounds import Bounds
from onnxmerge.methods.zip.choices import TREE, Mode
from onnxmerge.methods.zip.compute import ComputeMode
from onnxmerge.methods.zip.job import Fitted, Job, Maker
from onnxmerge.methods.zip.plan import PlannedCandidate, adapters_pay, predicted_size
from onnxmerge.methods.zip.stems.grow_tree import Kept, grow_tree
from onnxmerge.methods.zip.stems.tree import Branch, Forest
from onnxmerge.methods.zip.weights_mode import WeightsMode
from onnxmerge.passes.attach_tails import unshared
from onnxmerge.report.provenance import hardware, library_versions
from onnxmerge.report.recipe import as_recipe
from onnxmerge.report.schema import Candidate, LayerSimilarity, Result


class Run:
    """Makes a zip's candidates one after the other and keeps what is finished.

    Args:
        job: the zip.
        recipe: what decides its output.
        temporary: a folder.
    """

    def __init__(self, job: Job, recipe: Recipe, temporary: Path):
        tasks, settings = job.tasks, job.settings
        self.job, self.recipe = job, recipe
        self.forest = Forest(tasks, job.sharable)
        compute = settings.mode is Mode.COMPUTE
        self.maker: Maker = ComputeMode(job, self.forest, temporary) if compute else WeightsMode(job)
        self.judge = Judge(tasks, temporary, settings.threads)
        self.bench = Bench(tasks, all_inputs(tasks), settings.threads, settings.providers)
        self.bounds = Bounds(settings.max_drop, settings.max_bytes, settings.min_speedup, job.plan.originals.macs)
        self.notes = job.notes
        self.notes += [f"At most {len(job.plan.units)} units can be shared: {job.plan.limit}."]

    def make_candidates(self) -> bool:
        """Make every candidate of the plan; whether an interrupt stopped it."""
        try:
            for planned in self.job.plan.candidates:
                self._get(planned)
            if self.job.settings.share == TREE:
                self._grow()
        except KeyboardInterrupt:
            finished = ", ".join(c.name for c in self.job.finished) or "none"
            self.notes.append(f"Interrupted: these candidates were finished and are kept: {finished}.")
            return True
        return False

    def _get(self, planned: PlannedCandidate) -> Candidate | None:
        """Make a candidate, or take it from the shelf; None where it would be too big or too slow."""
        too_big = self.bounds.why_not(planned)
        if too_big:
            self.notes.append(f"{planned.name} was not made: {too_big}.")
            return None
        self.job.finished.append(self.job.shelf.get(planned.name) or self._make(planned))
        return self.job.finished[-1]

    def _grow(self) -> None:
        """Let groups of tasks share further, as long as all keep the bound."""
        bound, names = self.bounds.max_drop, [task.name for task in self.job.tasks]
        if bound is None or len(names) < 3:
            reason = "two tasks have no smaller groups" if len(names) < 3 else "there is no --max-drop to keep"
            self.notes.append(f"No tree was made: {reason}.")
            return
        count = len(self.job.plan.candidates)

        def attempt(units: int, branches: Sequence[Branch]) -> Kept:
            number = len(self.job.plan.candidates) - count + 1
            planned = PlannedCandidate(
                name=f"{TREE}{number:02d}",
                units=units,
                adapters=adapters_pay(self.job.sharable, self.job.plan, units),
                branches=list(branches),
            )
            planned.predicted = predicted_size(self.job.tasks, self.job.sharable, self.forest, planned)
            self.job.plan.candidates.append(planned)
            made = self._get(planned)
            return frozenset() if made is None else made.within(bound)

        if not grow_tree(names, self.forest, {c.share: c.within(bound) for c in self.job.finished}, attempt):
            self.notes.append("No group of tasks can share further than all tasks within --max-drop.")

    def _make(self, planned: PlannedCandidate) -> Candidate:
        job, name, k = self.job, planned.name, planned.units
        begun = time.perf_counter()
        losses: list[tuple[int, float]] = []
        if planned.shares:
            fitted = self.maker.fit(planned)
            if job.settings.steps:
                checkpoint = job.shelf.checkpoint(name)
                losses = job.calibrate(name, fitted.model, fitted.teachers, job.settings.steps, checkpoint)
        else:
            fitted = Fitted(unshared({task.name: task.model for task in job.tasks}), job.tasks)
        merged = fitted.model
        path = job.shelf.write(name, merged, {"onnxmerge.share": str(k)} | self.maker.metadata(planned, merged))
        candidate = Candidate(
            name=name,
            share=k,
            path=str(path),
            parameters=parameter_count(merged),
            bytes=stored_bytes(path),
            macs=self.maker.macs(merged),
            tasks=self.judge.score(merged),
            steps=job.settings.steps if losses else 0,
            seconds=time.perf_counter() - begun,
            start=None if fitted.start is None else fitted.start.value,
            shared_layers=sum(len(unit.layers) for unit in job.plan.units[:k]),
            total_layers=len(find_layers(job.sharable.reference.model)),
            branches={branch.name: branch.units for branch in planned.branches},
            channels=fitted.channels,
            losses=losses,
        )
        if job.settings.measure:
            self._measure(candidate, path)
        job.shelf.put(candidate)
        return candidate

    def _measure(self, candidate: Candidate, path: Path) -> None:
        self.job.progress.stage(f"{candidate.name}: measure", None)
        candidate.latency_ms, reliable = self.bench.latency(path)
        candidate.memory_mb = self.bench.memory(path)
        if not reliable:
            self.notes.append(f"The latency of {candidate.name} was measured on a busy machine and is not reliable.")

    def result(self) -> Result:
        """What was made, and which of it is chosen."""
        chosen = self.bounds.choose(self.job.finished)
        if chosen is None:
            self.notes.append(self.bounds.closest(self.job.finished))
        return Result(
            method="zip",
            versions=library_versions(),
            inputs=[task.record() for task in self.job.tasks],
            candidates=self.job.finished,
            chosen=None if chosen is None else chosen.name,
            recipe=as_recipe([self.recipe.step], self.job.shelf.model_path("merged")),
            hardware=hardware(),
            similarity=_mean_similarity([a.similarity for a in self.job.aligned.values()]),
            units=[unit.name for unit in self.job.plan.units],
            notes=self.notes,
        )


def _mean_similarity(records: Sequence[Sequence[LayerSimilarity]]) -> list[LayerSimilarity]:
    """One record for each layer: the mean over all tasks that were aligned with the first."""
    measured = ("correlation", "correlation_unaligned", "cka")
    return [
        same[0].model_copy(update={name: sum(getattr(r, name) for r in same) / len(same) for name in measured})
        for same in zip(*records, strict=True)
    ]
