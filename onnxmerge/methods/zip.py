"""zip: networks with different tasks become one multi-task network that computes their first layers once.

For k = 0..L: align the channels, fuse the first k units into one stem, fit each task's tail behind it, calibrate,
validate. The largest k whose worst task stays within `max_drop` is chosen. Sources: Zippering (Chou et al. 2019) for
the sequence over k, MTZ (He et al. 2018) for sharing across tasks, PLeaS and RegMean for the least-squares fusion.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as oir

from onnxmerge.calibration.settings import Settings
from onnxmerge.files import claim_folder, whole_file, write_text
from onnxmerge.ir.compose import cut_out
from onnxmerge.ir.layers import find_layers, parameter_count
from onnxmerge.ir.save import save, stored_bytes
from onnxmerge.methods.alignment import Aligned, Sharable, align, find_sharable
from onnxmerge.methods.candidates import Interrupted, Shelf
from onnxmerge.methods.measure import Bench, Judge
from onnxmerge.methods.plan import Plan, make_plan
from onnxmerge.methods.progress import Progress, Silent
from onnxmerge.methods.stem import Fitting, Start, fit_split, fit_tails, fuse_stem
from onnxmerge.methods.task import Task, load_networks, task_outputs, with_data
from onnxmerge.passes.attach_tails import AttachTails, bare_stem
from onnxmerge.report.provenance import hardware, library_versions, sha256
from onnxmerge.report.schema import Candidate, LayerSimilarity, Result, TaskScore
from onnxmerge.report.write import write_report


@dataclass(frozen=True)
class ZipSettings:
    """What can be set; everything here goes into the recipe.

    Attributes:
        share: "auto" (all k), a number k, a fraction of the units, or the path of an edited plan.
        max_drop: largest loss of the worst task (see `TaskScore.drop`); None: no bound, the largest k is chosen.
        steps: calibration steps of each candidate; 0 leaves the closed form.
        rate: peak learning rate of calibration, as a share of each array's root mean square.
        samples: unlabelled samples of each task for the closed form.
        starts: stems to try at each k; the one with the better worst task on held-out samples is calibrated.
        labels: use the labels of the calibration samples.
        seed: of everything drawn at random.
        threads: for onnxruntime and torch; None leaves the choice to them.
        providers: where latency is measured.
        measure: whether latency and memory are measured.
    """

    share: str = "auto"
    max_drop: float | None = 0.01
    steps: int = 300
    rate: float = 1e-2
    samples: int = 2000
    starts: tuple[Start, ...] = (Start.LEAST_SQUARES, Start.KEEP)
    labels: bool = False
    seed: int = 0
    threads: int | None = None
    providers: tuple[str, ...] = ("cpu",)
    measure: bool = True


def zip_models(
    models: Sequence[str | os.PathLike[str]],
    data: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    settings: ZipSettings | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Zip networks of different tasks into one and write everything to the folder `output`.

    Args:
        models: the ONNX files, at least two; the first gives the stem its channel order.
        data: one source for all tasks, or one for each (see `onnxmerge.data`); labels are optional.
        output: gets merged.onnx, one model for each candidate, plan.json, report.json and report.html.
        settings: see `ZipSettings`.
        overwrite: replace the files of an earlier run.
        resume: keep the candidates of an earlier run with the same recipe and go on.
        progress: told what is going on.

    Returns:
        What report.json holds.

    Raises:
        UsageError: settings, data or the output folder do not fit, or the networks cannot share their inputs.
        ModelError: a network cannot be read or holds an operator that cannot be handled.
        KeyboardInterrupt: after the candidates finished so far have been reported.
    """
    settings = settings or ZipSettings()
    progress = progress or Silent()
    progress.stage("load")
    networks = load_networks(models)
    sources = data if isinstance(data, Mapping) else {network.name: data for network in networks}
    tasks = with_data(networks, sources, seed=settings.seed)
    sharable = find_sharable(tasks)
    plan = make_plan(tasks, sharable, settings.share)
    folder = claim_folder(output, overwrite=overwrite or resume)
    recipe = _recipe(tasks, settings, plan)
    with tempfile.TemporaryDirectory(prefix="onnxmerge-") as temporary:
        shelf = Shelf(folder, recipe, resume=resume)
        run = _Run(tasks, sharable, plan, settings, Path(temporary), shelf, recipe, progress)
        interrupted = run.make_candidates()
    result = run.result(interrupted)
    (folder / "merged.onnx").unlink(missing_ok=True)
    if result.chosen is not None:
        with whole_file(folder / "merged.onnx") as temporary_file:
            shutil.copyfile(shelf.model_path(result.chosen), temporary_file)
    write_text(folder / "plan.json", plan.to_json())
    write_report(result, folder)
    if interrupted:
        raise Interrupted(result)
    return result


def plan_zip(models: Sequence[str | os.PathLike[str]], share: str = "auto") -> Plan:
    """What `zip_models` would share, before any weight is touched; needs no data."""
    networks = load_networks(models)
    return make_plan(networks, find_sharable(networks), share)


def _recipe(tasks: Sequence[Task], settings: ZipSettings, plan: Plan) -> dict[str, Any]:
    """Everything that decides what the output is, as plain JSON; paths as given."""
    return {
        "method": "zip",
        "mode": plan.mode,
        "share": plan.share,
        "models": {task.name: sha256(task.path) for task in tasks},
        "data": {task.name: task.data.source for task in tasks},
        "settings": {name: value for name, value in asdict(settings).items() if name != "share"},
    }


class _Run:
    """One zip under way: what is worked out once, and the candidates finished so far."""

    def __init__(
        self,
        tasks: list[Task],
        sharable: Sharable,
        plan: Plan,
        settings: ZipSettings,
        temporary: Path,
        shelf: Shelf,
        recipe: dict[str, Any],
        progress: Progress,
    ):
        self.tasks, self.sharable, self.plan, self.settings = tasks, sharable, plan, settings
        self.shelf, self.recipe, self.progress = shelf, json.loads(json.dumps(recipe)), progress
        self.fitting = Fitting(settings.samples, settings.seed, settings.threads, temporary, progress)
        self.judge = Judge(tasks, temporary, settings.threads)
        self.bench = Bench(tasks, tasks[0].inputs, settings.threads, settings.providers)
        self.aligned: dict[str, Aligned] = {}
        self.stems: dict[Start, oir.Model] = {}
        self.candidates: list[Candidate] = []
        self.notes = [f"At most {len(plan.units)} units can be shared: {plan.limit}."]

    def make_candidates(self) -> bool:
        """Make every candidate of the plan; whether an interrupt stopped it."""
        try:
            for k in self.plan.share:
                name = f"k{k:02d}"
                candidate = self.shelf.get(name) or self._make(name, k)
                self.candidates.append(candidate)
        except KeyboardInterrupt:
            finished = ", ".join(c.name for c in self.candidates) or "none"
            self.notes.append(f"Interrupted: these candidates were finished and are kept: {finished}.")
            return True
        return False

    def _make(self, name: str, k: int) -> Candidate:
        begun = time.perf_counter()
        if k > 0:
            self._align()
        self.progress.stage(f"{name}: fit", None)
        start, merged, scores = self._closed_form(k)
        losses: list[tuple[int, float]] = []
        if self.settings.steps and k > 0:
            losses = self._calibrate(name, merged)
            scores = self.judge.score(merged)
        path = self.shelf.model_path(name)
        metadata = {"onnxmerge.method": "zip", "onnxmerge.recipe": json.dumps(self.recipe, sort_keys=True)}
        save(merged, path, metadata | {"onnxmerge.share": str(k)})
        candidate = Candidate(
            name=name,
            share=k,
            path=str(path),
            parameters=parameter_count(merged),
            bytes=stored_bytes(path),
            tasks=scores,
            steps=self.settings.steps if losses else 0,
            seconds=time.perf_counter() - begun,
            start=None if start is None else start.value,
            shared_layers=sum(len(unit.layers) for unit in self.plan.units[:k]),
            total_layers=len(find_layers(self.sharable.reference.model)),
            losses=losses,
        )
        if self.settings.measure:
            self._measure(candidate, path)
        self.shelf.put(candidate)
        return candidate

    def _align(self) -> None:
        """Align every task with the first, once."""
        if not self.aligned:
            self.progress.stage("align", len(self.tasks) - 1)
            for task in self.tasks[1:]:
                self.aligned[task.name] = align(
                    self.sharable,
                    task,
                    self.tasks,
                    samples=self.settings.samples,
                    seed=self.settings.seed,
                    threads=self.settings.threads,
                )
                self.progress.advance(task.name)

    def _closed_form(self, k: int) -> tuple[Start | None, oir.Model, dict[str, TaskScore]]:
        """The best of the settings' starts by its worst task on held-out samples."""
        if k == 0:
            merged = AttachTails({task.name: task.model for task in self.tasks})(bare_stem(self.tasks[0].model)).model
            return None, merged, self.judge.score(merged)
        cut = self.sharable.cuts[k - 1]
        tried = []
        for start in self.settings.starts:
            if start not in self.stems:
                self.stems[start] = fuse_stem(self.sharable, self.aligned, self.tasks, start, self.fitting)
            stem = cut_out(self.stems[start], self.tasks[0].inputs, [cut.unit.cut])
            if start == Start.LEAST_SQUARES:
                fit_split(self.sharable, self.aligned, self.tasks, stem, cut, self.fitting)
            tails = fit_tails(self.sharable, self.aligned, self.tasks, stem, cut, start, self.fitting)
            merged = AttachTails(tails)(stem).model
            tried.append((start, merged, self.judge.score(merged)))
        return min(tried, key=lambda candidate: _worst(candidate[2]))

    def _calibrate(self, name: str, merged: oir.Model) -> list[tuple[int, float]]:
        """Train `merged` in place; the held-out losses."""
        from onnxmerge.methods.calibrating import calibrate_merged  # torch is loaded only when it is needed

        self.progress.stage(f"{name}: calibrate", self.settings.steps)
        settings = Settings(
            steps=self.settings.steps,
            rate=self.settings.rate,
            label_weight=float(self.settings.labels),
            seed=self.settings.seed,
            threads=self.settings.threads,
        )
        return calibrate_merged(merged, self.tasks, task_outputs(self.tasks), settings, self.progress)

    def _measure(self, candidate: Candidate, path: Path) -> None:
        self.progress.stage(f"{candidate.name}: measure", None)
        candidate.latency_ms, reliable = self.bench.latency(path)
        candidate.memory_mb = self.bench.memory(path)
        if not reliable:
            self.notes.append(f"The latency of {candidate.name} was measured on a busy machine and is not reliable.")

    def result(self, interrupted: bool) -> Result:
        """What was made, and which of it is chosen: the largest k whose worst task stays within `max_drop`."""
        bound = self.settings.max_drop
        within = [c for c in self.candidates if bound is None or _worst(c.tasks) <= bound]
        chosen = max(within, key=lambda c: c.share, default=None)
        return Result(
            method="zip",
            versions=library_versions(),
            inputs=[task.record() for task in self.tasks],
            candidates=self.candidates,
            chosen=None if chosen is None else chosen.name,
            recipe=self.recipe,
            hardware=hardware(),
            similarity=_mean_similarity([a.similarity for a in self.aligned.values()]),
            units=[unit.name for unit in self.plan.units],
            notes=self.notes,
        )


def _worst(scores: Mapping[str, TaskScore]) -> float:
    """The largest drop of any task."""
    return max((score.drop for score in scores.values() if score.drop is not None), default=0.0)


def _mean_similarity(records: Sequence[Sequence[LayerSimilarity]]) -> list[LayerSimilarity]:
    """One record for each layer: the mean over all tasks that were aligned with the first."""
    measured = ("correlation", "correlation_unaligned", "cka")
    return [
        same[0].model_copy(update={name: sum(getattr(r, name) for r in same) / len(same) for name in measured})
        for same in zip(*records, strict=True)
    ]
