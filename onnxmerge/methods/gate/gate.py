"""gate: networks of one task and architecture, trained from different seeds, become one of the same size.

Side by side they are a network of their widths together that gives their mean prediction. Gates, one for each channel,
learn which channels it needs while its weights learn to connect what the networks made apart; the best 1/N of each
channel space stay, and what is left is fine-tuned.

Source: Pašen and Boža, Merging of neural networks.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import UsageError
from onnxmerge.files import claim_folder, write_text
from onnxmerge.methods.candidates import Interrupted, Shelf
from onnxmerge.methods.gate.layerwise import choose_layerwise, make_layerwise_plan
from onnxmerge.methods.gate.plan import GatePlan, Planned, make_gate_plan
from onnxmerge.methods.gate.settings import GateSettings
from onnxmerge.methods.one_task import OneTask
from onnxmerge.methods.progress import Progress, Silent
from onnxmerge.methods.recipe import Recipe, recipe_of
from onnxmerge.methods.task import Network, Task, load_networks, sources_of, task_outputs, with_data
from onnxmerge.passes.fold_gates import FoldGates
from onnxmerge.passes.prune import Prune
from onnxmerge.report.provenance import hardware, library_versions
from onnxmerge.report.recipe import as_recipe
from onnxmerge.report.schema import GatedSpace, Result
from onnxmerge.report.write import write_report
from onnxmerge.scratch import scratch

if TYPE_CHECKING:
    from onnxmerge.calibration.engine import Outcome
    from onnxmerge.calibration.gating import Source


def gate_models(
    models: Sequence[str | os.PathLike[str]],
    data: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    settings: GateSettings | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Make one network out of several of one task and architecture and write everything to the folder `output`.

    Args:
        models: the ONNX files, at least two.
        data: one source for all networks, or one for each (see `onnxmerge.data`).
        output: gets merged.onnx, one model for each candidate, plan.json, report.json and report.html.
        settings: see `GateSettings`.
        overwrite: replace the files of an earlier run.
        resume: keep the candidates of an earlier run with the same recipe and go on.
        progress: told what is going on.

    Returns:
        What report.json holds; nothing is chosen when no candidate stays within `max_drop`.

    Raises:
        UsageError: settings, data or the output folder do not fit.
        ModelError: the networks are not of one architecture, or cannot be put side by side.
        KeyboardInterrupt: after the candidates finished so far have been reported.
    """
    settings, progress = settings or GateSettings(), progress or Silent()
    progress.stage("load")
    networks = load_networks(models, folded=settings.layerwise)
    progress.stage("plan")
    plan, planned = _plan(networks, settings)
    sources = sources_of(data, networks)
    tasks = with_data(networks, sources, seed=settings.seed)
    labels = _use_labels(tasks, settings, plan)
    recipe = recipe_of("gate", tasks, {"models": models, "data": sources}, settings)
    claimed = claim_folder(output, overwrite=overwrite or resume)
    with claimed as folder, scratch() as temporary:
        shelf = Shelf(folder, recipe, resume=resume)
        run = _Run(plan, planned, tasks, settings, labels, temporary, shelf, recipe, progress)
        interrupted = run.make_candidates()
        result = run.result()
        shelf.choose(result.chosen)
        write_text(folder / "plan.json", run.plan().to_json())
        write_report(result, folder)
        if interrupted:
            raise Interrupted(result)
        return result


def plan_gate(models: Sequence[str | os.PathLike[str]], *, settings: GateSettings | None = None) -> GatePlan:
    """What `gate_models` would gate and keep; needs no data.

    Raises:
        UsageError, ModelError: see `gate_models`.
    """
    settings = settings or GateSettings()
    return _plan(load_networks(models, folded=settings.layerwise), settings)[0]


def _plan(networks: Sequence[Network], settings: GateSettings) -> tuple[GatePlan, Planned | None]:
    """The plan, and but for `layerwise` the networks side by side."""
    if settings.layerwise:
        return make_layerwise_plan(networks, settings), None
    planned = make_gate_plan(networks, settings)
    return planned.plan, planned


def _use_labels(tasks: Sequence[Task], settings: GateSettings, plan: GatePlan) -> bool:
    """Whether labels teach.

    Raises:
        UsageError: they are asked for and missing, or it is not known whose they are.
    """
    missing = [task for task in tasks if not (task.data.calibration.has_labels and task.data.held_out.has_labels)]
    shared = plan.apart and len({id(task.data) for task in tasks}) < len(tasks)
    if settings.labels and missing:
        raise UsageError(
            f"{missing[0].data.source}: has no labels for the task {missing[0].name!r}, both to learn from and held "
            f"out; with --no-labels {plan.teacher} teaches"
        )
    if settings.labels and shared:
        raise UsageError(
            "--labels: networks with heads of their own would learn from one source's labels; give each network its "
            "own data (--data TASK=D), or --no-labels"
        )
    return not missing and not shared if settings.labels is None else settings.labels


def _kept_whole(plan: GatePlan) -> list[str]:
    """A note for each reason why channels are all kept."""
    spaces: dict[str, list[str]] = {}
    for space in plan.whole:
        spaces.setdefault(space.reason or "", []).append(space.name)
    return [f"The channels of {', '.join(names)} are all kept: {reason}." for reason, names in spaces.items()]


class _Run:
    """One run under way."""

    def __init__(
        self,
        plan: GatePlan,
        planned: Planned | None,
        tasks: Sequence[Task],
        settings: GateSettings,
        labels: bool,
        temporary: Path,
        shelf: Shelf,
        recipe: Recipe,
        progress: Progress,
    ):
        self._plan, self.planned, self.tasks = plan, planned, tasks
        self.settings, self.labels = settings, labels
        self.recipe, self.progress = recipe, progress
        outputs = task_outputs(tasks) if plan.apart else None
        self.made = OneTask(tasks, [1.0] * len(tasks), temporary, shelf, settings, progress, outputs)
        self.made.notes += _kept_whole(plan)
        taught = f"{plan.teacher[0].upper()}{plan.teacher[1:]} taught: no labels were used."
        self.made.notes.append("Labels taught." if labels else taught)

    def make_candidates(self) -> bool:
        """Make every candidate; whether an interrupt stopped it."""
        try:
            if not self.made.find("pruned"):
                self._prune()
            if self.settings.steps and not self.made.find("student"):
                self._fine_tune()
        except KeyboardInterrupt:
            self.made.interrupted()
            return True
        return False

    def _prune(self) -> None:
        """Learn the gates and keep the best channels."""
        begun = time.perf_counter()
        if self.planned is None:
            pruned, gates = choose_layerwise(self.tasks, self.settings, self.progress)
            losses: list[tuple[int, float]] = []
        else:
            pruned, gates, losses = self._choose(self.planned)
        self.made.add("pruned", pruned, start="gates", steps=0, losses=losses, begun=begun, gates=gates)

    def _choose(self, planned: Planned) -> tuple[oir.Model, list[GatedSpace], list[tuple[int, float]]]:
        """What gates leave of the networks side by side, what they said, and the held-out losses."""
        from onnxmerge.calibration.gating import learn_gates  # torch is loaded only when it is needed
        from onnxmerge.methods.calibrating import Told, require_learning

        places, widened = planned.places, planned.widened.clone()
        self.progress.stage("learn the gates", self.settings.gate_steps)
        training, told = self.settings.learning(labels=self.labels), Told(self.progress)
        checkpoint = self.made.shelf.checkpoint("pruned")
        learned = learn_gates(widened, places, self._sources(), training, told, checkpoint)
        require_learning(learned.outcome)
        self._finished("pruned", learned.outcome)
        kept = places.kept(learned.log_alpha)
        closed = np.where(places.closed(kept), 0.0, learned.gates)
        pruned = Prune(kept, places.all_spaces)(FoldGates(places, closed)(widened).model).model
        gates = [
            GatedSpace(
                name=own.space.name,
                probability=[round(float(p), 4) for p in learned.probability[own.gates]],
                kept=kept[own.space.name].tolist(),
            )
            for own in places.spaces
        ]
        return pruned, gates, learned.outcome.losses

    def _fine_tune(self) -> None:
        from onnxmerge.calibration.gating import fine_tune
        from onnxmerge.methods.calibrating import Told

        begun, student = time.perf_counter(), self.made.model("pruned")
        self.progress.stage("fine-tune", self.settings.steps)
        training = self.settings.tuning(labels=self.labels)
        outcome = fine_tune(
            student, self._sources(), training, Told(self.progress), self.made.shelf.checkpoint("student")
        )
        self._finished("student", outcome)
        self.made.add("student", student, start="pruned", steps=self.settings.steps, losses=outcome.losses, begun=begun)

    def _sources(self) -> list["Source"]:
        """The samples of each network, taught by itself; where all have one task, each set once, taught by their mean.

        Layer by layer there is no network whose output is the mean: then each teaches the same outputs.
        """
        from onnxmerge.calibration.gating import Source

        teachers, names = self.tasks, task_outputs(self.tasks)
        if self.planned is not None and not self._plan.apart:
            teachers = list({id(task.data): task for task in self.tasks}.values())
        return [
            Source(
                task.name,
                self._teacher(task),
                task.data.calibration,
                task.data.held_out,
                dict(zip(names[task.name], task.outputs, strict=True)) if self._plan.apart else None,
            )
            for task in teachers
        ]

    def _teacher(self, task: Task) -> oir.Model:
        """The networks' mean with its inputs called as the task's data are; else the network itself."""
        if self.planned is None or self._plan.apart:
            return task.model
        teacher = self.planned.widened.clone()
        for value, name in zip(teacher.graph.inputs, task.inputs, strict=True):
            value.name = name
        return teacher

    def _finished(self, name: str, outcome: "Outcome") -> None:
        """Note what ended training early; an interrupt ends the run."""
        from onnxmerge.methods.calibrating import remarks

        if outcome.interrupted:
            raise KeyboardInterrupt
        self.made.notes += remarks(name, outcome)

    def plan(self) -> GatePlan:
        """The plan, with what was kept as far as that is known."""
        plan, networks = self._plan.model_copy(deep=True), len(self.tasks)
        for candidate in self.made.candidates[:1]:
            found = {gated.name: np.array(gated.kept) for gated in candidate.gates}
            for space in plan.spaces:
                if space.name in found:
                    size, kept = space.channels // networks, found[space.name]
                    space.kept = {
                        task.name: (kept[kept // size == number] % size).tolist()
                        for number, task in enumerate(self.tasks)
                    }
        return plan

    def result(self) -> Result:
        """What was made, and which of it is chosen: what was trained longest."""
        chosen = self.made.chosen(self.settings.max_drop)
        return Result(
            method="gate",
            versions=library_versions(),
            inputs=[task.record() for task in self.tasks],
            candidates=self.made.candidates,
            chosen=None if chosen is None else chosen.name,
            recipe=as_recipe([self.recipe.step], self.made.shelf.model_path("merged")),
            hardware=hardware(),
            notes=self.made.notes,
            originals=self.made.originals if self.made.candidates else {},
        )
