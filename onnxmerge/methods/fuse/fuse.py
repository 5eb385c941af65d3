"""fuse: networks of one task become one network of the size of one.

Each network's layers are mapped to the reference's across depth, its channels across width, and a fuse rule makes one
set of weights: CLAFusion (Nguyen et al. 2023) with a least-squares rule, or with the rules it is compared to. Labels
are never needed: of several candidates the one that agrees best with the ensemble of the originals is chosen.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.files import claim_folder, write_text
from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.stages import find_steps
from onnxmerge.methods.candidates import Interrupted, Shelf
from onnxmerge.methods.fuse.choices import Rule, Start, Targets
from onnxmerge.methods.fuse.counterparts import Counterpart, FuseOptions
from onnxmerge.methods.fuse.fusing import find_counterparts, fuse_counterparts, kept_network, refit_heads
from onnxmerge.methods.fuse.plan import FusePlan, Planned, make_fuse_plan
from onnxmerge.methods.fuse.settings import FuseSettings
from onnxmerge.methods.one_task import OneTask
from onnxmerge.methods.progress import Progress, Silent
from onnxmerge.methods.recipe import Recipe, recipe_of
from onnxmerge.methods.task import Network, Task, load_networks, sources_of, with_data
from onnxmerge.passes.reinitialise import Reinitialise
from onnxmerge.report.provenance import hardware, library_versions
from onnxmerge.report.recipe import as_recipe
from onnxmerge.report.schema import LayerLink, LayerLinks, Result
from onnxmerge.report.write import write_report
from onnxmerge.scratch import scratch

FITS = 0.999
"""A network that is taken over as it is must agree with itself on this share of samples, or to the rest in error."""


def fuse_models(
    models: Sequence[str | os.PathLike[str]],
    data: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    settings: FuseSettings | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Fuse networks of one task into one and write everything to the folder `output`.

    Args:
        models: the ONNX files, at least two.
        data: one source for all networks, or one for each (see `onnxmerge.data`); labels are optional.
        output: gets merged.onnx, one model for each candidate, plan.json, report.json and report.html.
        settings: see `FuseSettings`.
        overwrite: replace the files of an earlier run.
        resume: keep the candidates of an earlier run with the same recipe and go on.
        progress: told what is going on.

    Returns:
        What report.json holds; nothing is chosen when no candidate stays within `max_drop`.

    Raises:
        UsageError: settings, data or the output folder do not fit.
        ModelError: the networks do not have one task, or cannot be brought to one architecture.
        KeyboardInterrupt: after the candidates finished so far have been reported.
    """
    settings, progress = settings or FuseSettings(), progress or Silent()
    tasks = _load(models, data, settings, progress)
    planned = make_fuse_plan(tasks, settings, progress)
    weights = _in_order(tasks, planned, settings)
    recipe = recipe_of("fuse", planned.tasks, {"models": models, "data": sources_of(data, tasks)}, settings)
    claimed = claim_folder(output, overwrite=overwrite or resume)
    with claimed as folder, scratch() as temporary:
        shelf = Shelf(folder, recipe, resume=resume)
        run = _Run(planned, weights, settings, temporary, shelf, recipe, progress)
        interrupted = run.make_candidates()
        result = run.result()
        shelf.choose(result.chosen)
        write_text(folder / "plan.json", planned.plan.to_json())
        write_report(result, folder)
        if interrupted:
            raise Interrupted(result)
        return result


def plan_fuse(
    models: Sequence[str | os.PathLike[str]],
    data: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    *,
    settings: FuseSettings | None = None,
    progress: Progress | None = None,
) -> FusePlan:
    """The reference and the layer maps that `fuse_models` would take."""
    settings, progress = settings or FuseSettings(), progress or Silent()
    return make_fuse_plan(_load(models, data, settings, progress), settings, progress).plan


def _load(
    models: Sequence[str | os.PathLike[str]],
    data: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    settings: FuseSettings,
    progress: Progress,
) -> list[Task]:
    progress.stage("load")
    networks: list[Network] = load_networks(models)
    return with_data(networks, sources_of(data, networks), seed=settings.seed)


def _in_order(tasks: Sequence[Task], planned: Planned, settings: FuseSettings) -> list[float]:
    """The weight of each network in the order of the plan.

    Raises:
        UsageError: there are not as many weights as networks.
    """
    given = settings.weights_of(len(tasks))
    by_name = {task.name: weight for task, weight in zip(tasks, given, strict=True)}
    return [by_name[task.name] for task in planned.tasks]


@dataclass(frozen=True)
class _Attempt:
    """One way to make the result."""

    name: str
    start: str
    make: Callable[[], oir.Model | None]
    """None where it is not possible."""


class _Run:
    """One fuse under way: what is worked out once, and the candidates finished so far."""

    def __init__(
        self,
        planned: Planned,
        weights: list[float],
        settings: FuseSettings,
        temporary: Path,
        shelf: Shelf,
        recipe: Recipe,
        progress: Progress,
    ):
        self.planned, self.tasks, self.weights, self.settings = planned, planned.tasks, weights, settings
        self.recipe, self.progress = recipe, progress
        self.made = OneTask(self.tasks, weights, temporary, shelf, settings, progress)
        self.made.notes += planned.notes

    @cached_property
    def counterparts(self) -> list[Counterpart]:
        """The others as the reference sees them."""
        self.progress.stage("match channels")
        own = self.planned
        return find_counterparts(own.reference, own.others, own.maps, self.settings.options)

    @cached_property
    def ranking(self) -> list[int]:
        """The numbers of the networks, the one that agrees best with the ensemble first."""
        closeness = [self.made.originals[task.name].closeness for task in self.tasks]
        return sorted(range(len(self.tasks)), key=lambda number: -closeness[number])

    # --- candidates

    def make_candidates(self) -> bool:
        """Make every candidate; whether an interrupt stopped it."""
        try:
            for attempt in self._attempts():
                self._add(attempt, 0)
            if self.settings.steps:
                start = self.made.best().name
                self._add(_Attempt("calibrated", start, partial(self.made.model, start)), self.settings.steps)
        except KeyboardInterrupt:
            self.made.interrupted()
            return True
        return False

    def _attempts(self) -> list[_Attempt]:
        settings, rule = self.settings, self.settings.rule.value
        if settings.start == Start.KEEP:
            return [_Attempt("keep", "keep", self.planned.reference.model.clone)]
        if settings.start == Start.RANDOM:
            return [_Attempt("random", "random", self._random)]
        if settings.rule != Rule.LEAST_SQUARES:
            return [_Attempt(rule, rule, partial(self._fuse, settings.options))]
        attempts = [
            _Attempt(f"{rule}-{kind.value}", rule, partial(self._fuse, replace(settings.options, targets=kind)))
            for kind in ([settings.targets] if settings.targets else Targets)
        ]
        if settings.start is None and settings.targets is None:
            attempts.append(_Attempt("heads", "heads", self._heads))
        return attempts

    def _fuse(self, options: FuseOptions) -> oir.Model:
        self.progress.stage("fuse", len(find_layers(self.planned.reference.model)))
        return fuse_counterparts(self.planned.reference, self.counterparts, self.weights, options, self.progress)

    def _random(self) -> oir.Model:
        return Reinitialise(self.settings.seed)(self.planned.reference.model.clone()).model

    def _heads(self) -> oir.Model | None:
        """The best network that fits into the reference, its output layers fitted towards all."""
        maps = [[], *self.planned.maps]
        for number in self.ranking:
            task = self.tasks[number]
            try:
                kept = kept_network(self.planned.reference, task, maps[number])
            except ModelError:
                continue  # it does not fit; the reference does
            if self._is(kept, task):
                self.progress.stage("fit the heads")
                refit_heads(
                    kept, self.planned.reference, self.counterparts, self.weights, self.settings.options, self.progress
                )
                self.made.notes.append(f"The candidate heads has the hidden layers of {task.name}.")
                return kept
        return None

    def _is(self, model: oir.Model, task: Task) -> bool:
        score = self.made.judge.score(model)[task.name]
        if score.agreement is not None:
            return score.agreement >= FITS
        return score.relative_error is not None and score.relative_error <= 1 - FITS

    def _add(self, attempt: _Attempt, steps: int) -> None:
        if self.made.find(attempt.name):
            return
        begun = time.perf_counter()
        model = attempt.make()
        if model is not None:
            losses = self._calibrate(attempt.name, model) if steps else []
            self.made.add(attempt.name, model, start=attempt.start, steps=steps, losses=losses, begun=begun)

    def _calibrate(self, name: str, model: oir.Model) -> list[tuple[int, float]]:
        """Train `model` in place towards all originals; the held-out losses."""
        from onnxmerge.methods.calibrating import calibrate_merged, remarks  # torch is loaded only when it is needed

        self.progress.stage("calibrate", self.settings.steps)
        names = [value.name or "" for value in model.graph.outputs]
        outputs = {task.name: names for task in self.tasks}
        outcome = calibrate_merged(
            model,
            self.tasks,
            outputs,
            self.settings.calibration,
            self.progress,
            self.made.shelf.checkpoint(name),
            self.weights,
        )
        self.made.notes += remarks(name, outcome)
        return outcome.losses

    def result(self) -> Result:
        """What was made, and which of it is chosen: what was calibrated, else what agrees best with the ensemble."""
        chosen = self.made.chosen(self.settings.max_drop)
        return Result(
            method="fuse",
            versions=library_versions(),
            inputs=[task.record() for task in self.tasks],
            candidates=self.made.candidates,
            chosen=None if chosen is None else chosen.name,
            recipe=as_recipe([self.recipe.step], self.made.shelf.model_path("merged")),
            hardware=hardware(),
            notes=self.made.notes,
            originals=self.made.originals if self.made.candidates else {},
            layer_maps=_layer_links(self.planned),
        )


def _layer_links(planned: Planned) -> dict[str, LayerLinks]:
    """The layer maps as the report shows them."""
    steps = [{step.name: step.width for step in find_steps(task.model)} for task in planned.tasks]
    return {
        task.name: LayerLinks(
            fused=steps[0],
            original=own,
            links=[
                LayerLink(
                    fused=pair.first.name, original=pair.second.name, cka=pair.cka if math.isfinite(pair.cka) else None
                )
                for pair in pairs
            ],
        )
        for task, own, pairs in zip(planned.others, steps[1:], planned.maps, strict=True)
    }
