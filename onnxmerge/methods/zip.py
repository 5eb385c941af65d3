"""zip: networks with different tasks become one multi-task network that computes their first layers once.

For each candidate of the plan: fuse the first units into one stem, fit each task's tail behind it, calibrate, validate.
The one that saves most among those that keep the bounds is chosen. Sources: Zippering (Chou et al. 2019) for
the sequence over k, MTZ (He et al. 2018) for sharing across tasks, PLeaS and RegMean for the least-squares fusion.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as oir

from onnxmerge.calibration.settings import Settings
from onnxmerge.files import claim_folder, whole_file, write_text
from onnxmerge.ir.labels import dims
from onnxmerge.ir.layers import find_layers, parameter_count
from onnxmerge.ir.save import save, stored_bytes
from onnxmerge.methods.alignment import Aligned, Sharable, align, find_sharable
from onnxmerge.methods.bounds import Bounds
from onnxmerge.methods.candidates import Interrupted, Shelf
from onnxmerge.methods.fictive import find_sharable_of_any_width, sized_for, with_fictive, with_own_inputs
from onnxmerge.methods.fitting import Fitting
from onnxmerge.methods.measure import Bench, Judge
from onnxmerge.methods.pictures import held_out_pictures
from onnxmerge.methods.plan import Plan, PlannedCandidate, as_made, make_plan
from onnxmerge.methods.progress import Progress, Silent
from onnxmerge.methods.stem import Stems
from onnxmerge.methods.structure import Widths, merged_structure, size_of
from onnxmerge.methods.tails import fit_tails
from onnxmerge.methods.task import Task, load_networks, task_outputs, with_data
from onnxmerge.methods.weights_begun import LOST_NAMES, Begun, lost_names, read_candidate
from onnxmerge.methods.weights_mode import Merged, share_weights
from onnxmerge.methods.weights_settings import WeightSharing
from onnxmerge.methods.zip_choices import Mode, Pairing, Start
from onnxmerge.methods.zip_settings import ZipSettings
from onnxmerge.report.provenance import hardware, library_versions, sha256
from onnxmerge.report.schema import Candidate, LayerSimilarity, Result, worst_drop
from onnxmerge.report.write import write_report

_CHOOSING = 2000
"""Held-out samples that decide which start is calibrated."""


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
    settings.check(len(models))
    progress = progress or Silent()
    progress.stage("load")
    networks = load_networks(models, same_inputs=settings.mode is Mode.COMPUTE)
    sources = data if isinstance(data, Mapping) else {network.name: data for network in networks}
    tasks = with_data(networks, sources, seed=settings.seed)
    sharable = (find_sharable_of_any_width if settings.mode is Mode.WEIGHTS else find_sharable)(tasks)
    plan = make_plan(tasks, sharable, settings.share, settings.widths, settings.sharing, settings.mode)
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
        result.pictures = held_out_pictures(tasks, folder / "merged.onnx", threads=settings.threads)
    write_text(folder / "plan.json", as_made(plan, result, tasks, sharable).to_json())
    write_report(result, folder)
    if interrupted:
        raise Interrupted(result)
    return result


def plan_zip(
    models: Sequence[str | os.PathLike[str]],
    share: str = "auto",
    widths: Sequence[float] = (1.0,),
    sharing: Sequence[float] = (1.0,),
    mode: Mode = Mode.COMPUTE,
) -> Plan:
    """What `zip_models` would share, before any weight is touched; needs no data."""
    networks = load_networks(models, same_inputs=mode is Mode.COMPUTE)
    sharable = (find_sharable_of_any_width if mode is Mode.WEIGHTS else find_sharable)(networks)
    return make_plan(networks, sharable, share, widths, sharing, mode)


def _recipe(tasks: Sequence[Task], settings: ZipSettings, plan: Plan) -> dict[str, Any]:
    """Everything that decides what the output is, as plain JSON; paths as given."""
    return {
        "method": "zip",
        "mode": plan.mode,
        "candidates": [candidate.model_dump(exclude={"predicted"}) for candidate in plan.candidates],
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
        self.fitting = Fitting(settings.samples, settings.seed, settings.threads, temporary, progress, settings.weights)
        self.judge = Judge(tasks, temporary, settings.threads)
        self.chooser = Judge(tasks, temporary / "chooser", settings.threads, samples=_CHOOSING, seed=settings.seed)
        own = {tuple(dims(value) for value in task.model.graph.inputs) for task in tasks}
        names = tasks[0].inputs if len(own) == 1 else [f"{task.name}/{name}" for task in tasks for name in task.inputs]
        self.bench = Bench(tasks, names, settings.threads, settings.providers)
        self.aligned: dict[str, Aligned] = {}
        self.stems = Stems(sharable, self.aligned, tasks, self.fitting)
        self.candidates: list[Candidate] = []
        self.bounds = Bounds(settings.max_drop, settings.max_bytes, settings.min_speedup, plan.originals.macs)
        self.notes = [f"At most {len(plan.units)} units can be shared: {plan.limit}."]

    def make_candidates(self) -> bool:
        """Make every candidate of the plan; whether an interrupt stopped it."""
        try:
            for planned in self.plan.candidates:
                too_big = self.bounds.why_not(planned)
                if too_big:
                    self.notes.append(f"{planned.name} was not made: {too_big}.")
                else:
                    self.candidates.append(self.shelf.get(planned.name) or self._make(planned))
        except KeyboardInterrupt:
            finished = ", ".join(c.name for c in self.candidates) or "none"
            self.notes.append(f"Interrupted: these candidates were finished and are kept: {finished}.")
            return True
        return False

    def _make(self, planned: PlannedCandidate) -> Candidate:
        name, k = planned.name, planned.units
        begun = time.perf_counter()
        if k > 0 and (self.settings.mode is Mode.COMPUTE or self.settings.pairing is Pairing.CORRELATION):
            self._align()
        self.progress.stage(f"{name}: fit", None)
        start, merged, channels = self._closed_form(planned)
        losses: list[tuple[int, float]] = []
        if self.settings.steps and k > 0:
            teachers, _ = sized_for(self.tasks, self.sharable, k)
            losses = self._calibrate(name, merged, teachers, self.settings.steps)
        path = self.shelf.model_path(name)
        metadata = {"onnxmerge.method": "zip", "onnxmerge.recipe": json.dumps(self.recipe, sort_keys=True)}
        if self.settings.mode is Mode.WEIGHTS:
            metadata[LOST_NAMES] = json.dumps(lost_names(merged))
        save(merged, path, metadata | {"onnxmerge.share": str(k)})
        candidate = Candidate(
            name=name,
            share=k,
            path=str(path),
            parameters=parameter_count(merged),
            bytes=stored_bytes(path),
            macs=size_of([merged]).macs if self.settings.mode is Mode.COMPUTE else self.plan.originals.macs,
            tasks=self.judge.score(merged),
            steps=self.settings.steps if losses else 0,
            seconds=time.perf_counter() - begun,
            start=None if start is None else start.value,
            shared_layers=sum(len(unit.layers) for unit in self.plan.units[:k]),
            total_layers=len(find_layers(self.sharable.reference.model)),
            channels=channels,
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
            tasks = with_fictive(self.tasks) if self.sharable.fictive else self.tasks
            for task in tasks[1:]:
                self.aligned[task.name] = align(
                    self.sharable,
                    task,
                    tasks,
                    samples=self.settings.samples,
                    seed=self.settings.seed,
                    threads=self.settings.threads,
                )
                self.progress.advance(task.name)

    def _closed_form(self, planned: PlannedCandidate) -> tuple[Start | None, oir.Model, dict[str, int]]:
        """The best of the settings' starts by its worst task on some held-out samples, and what was decided."""
        if not planned.units:
            return None, merged_structure(self.sharable, self.tasks, None, Widths()), {}
        if self.settings.mode is Mode.WEIGHTS:
            merged = self._shared_weights(planned)
            return None, merged.model, {} if self.settings.max_difference is None else dict(merged.counts)
        cut = self.sharable.cuts[planned.units - 1]
        tried = []
        own = bool(planned.channels or planned.private)
        for start in (Start.SUBSPACE,) if own else self.settings.starts:
            stem = self.stems.up_to(cut, start, planned.widths)
            tails = fit_tails(self.sharable, self.tasks, stem, cut, self.fitting)
            tried.append((start, stem.attach(tails)))
        if len(tried) == 1:
            return *tried[0], {}
        return *min(tried, key=lambda candidate: worst_drop(self.chooser.score(candidate[1])) or 0.0), {}

    def _shared_weights(self, planned: PlannedCandidate) -> Merged:
        tasks, sharable = sized_for(self.tasks, self.sharable, planned.units)

        def after(merged: oir.Model, layer: str) -> None:
            self._calibrate(f"{planned.name}, {layer}", merged, tasks, self.settings.retrain)

        return share_weights(
            sharable,
            self.aligned,
            tasks,
            planned.channels or planned.units,
            WeightSharing(
                rule=self.settings.rule,
                pairing=self.settings.pairing,
                samples=self.settings.samples,
                seed=self.settings.seed,
                threads=self.settings.threads,
                weights=self.settings.weights,
                max_difference=self.settings.max_difference,
            ),
            begun=self._begun(planned),
            after=after if self.settings.retrain else None,
            progress=self.progress,
        )

    def _begun(self, planned: PlannedCandidate) -> Begun | None:
        """The finished candidate that this one goes on from: of those that share fewer units the last."""
        units = {own.name: own.units for own in self.plan.candidates if not own.channels and own.units < planned.units}
        finished = [own for own in self.candidates if units.get(own.name)]
        if planned.channels or not finished:
            return None
        last = max(finished, key=lambda own: own.share)
        model = read_candidate(self.shelf.model_path(last.name))
        return Begun(last.share, last.channels, model, *sized_for(self.tasks, self.sharable, last.share))

    def _calibrate(self, name: str, merged: oir.Model, tasks: Sequence[Task], steps: int) -> list[tuple[int, float]]:
        """Train `merged` in place with `tasks` as teachers; the held-out losses."""
        from onnxmerge.methods.calibrating import calibrate_merged  # torch is loaded only when it is needed

        self.progress.stage(f"{name}: calibrate", steps)
        settings = Settings(
            steps=steps,
            rate=self.settings.rate,
            label_weight=float(self.settings.labels),
            seed=self.settings.seed,
            threads=self.settings.threads,
        )
        teachers = [with_own_inputs(task) for task in tasks]
        return calibrate_merged(merged, teachers, task_outputs(teachers), settings, self.progress)

    def _measure(self, candidate: Candidate, path: Path) -> None:
        self.progress.stage(f"{candidate.name}: measure", None)
        candidate.latency_ms, reliable = self.bench.latency(path)
        candidate.memory_mb = self.bench.memory(path)
        if not reliable:
            self.notes.append(f"The latency of {candidate.name} was measured on a busy machine and is not reliable.")

    def result(self, interrupted: bool) -> Result:
        """What was made, and which of it is chosen."""
        chosen = self.bounds.choose(self.candidates)
        if chosen is None:
            self.notes.append(self.bounds.closest(self.candidates))
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


def _mean_similarity(records: Sequence[Sequence[LayerSimilarity]]) -> list[LayerSimilarity]:
    """One record for each layer: the mean over all tasks that were aligned with the first."""
    measured = ("correlation", "correlation_unaligned", "cka")
    return [
        same[0].model_copy(update={name: sum(getattr(r, name) for r in same) / len(same) for name in measured})
        for same in zip(*records, strict=True)
    ]
