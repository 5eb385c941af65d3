"""Calibrate a merged model with its originals as teachers: which outputs, inputs and feature taps belong together."""

import time
from collections.abc import Mapping, Sequence

import onnx_ir as oir

from onnxmerge.calibration.distillation import calibrate
from onnxmerge.calibration.engine import Done, Outcome
from onnxmerge.calibration.objective import FeatureTap
from onnxmerge.calibration.settings import Checkpoint, Settings
from onnxmerge.errors import UsageError
from onnxmerge.ir.units import find_units
from onnxmerge.methods.progress import Progress
from onnxmerge.methods.task import Task, merged_inputs


def calibrate_merged(
    merged: oir.Model,
    tasks: Sequence[Task],
    outputs: Mapping[str, Sequence[str]],
    settings: Settings,
    progress: Progress,
    checkpoint: Checkpoint | None = None,
    weights: Sequence[float] | None = None,
) -> Outcome:
    """Train `merged` in place; it keeps the weights with the least held-out loss, the start included.

    Args:
        merged: the merged model.
        tasks: the originals, its teachers.
        outputs: what `merged` calls each task's outputs, in order; tasks may have the same (see `calibrate`).
        settings: how long, how fast, and with which losses.
        progress: told of each step.
        checkpoint: where the run is kept while it is under way.
        weights: how much each task counts; None: all alike.

    Raises:
        KeyboardInterrupt: the user stopped it.
        ModelError, UsageError: see `calibrate`.
    """
    names = [value.name or "" for value in merged.graph.inputs]

    outcome = calibrate(
        merged,
        {task.name: task.model for task in tasks},
        {task.name: dict(zip(outputs[task.name], task.outputs, strict=True)) for task in tasks},
        {task.name: dict(zip(merged_inputs(task, names), task.inputs, strict=True)) for task in tasks},
        feature_taps(merged, tasks),
        {task.name: task.data.calibration for task in tasks},
        {task.name: task.data.held_out for task in tasks},
        settings,
        Told(progress),
        checkpoint,
        None if weights is None else {task.name: weight for task, weight in zip(tasks, weights, strict=True)},
    )
    if outcome.interrupted:
        raise KeyboardInterrupt
    return outcome


def require_learning(outcome: Outcome) -> None:
    """Refuse what failed before anything was gained.

    Raises:
        UsageError: with the reason.
    """
    if outcome.failure is not None and outcome.best_step == 0:
        raise UsageError(f"nothing was learned, so nothing was written: {outcome.failure}. A lower --rate may help")


SLOW_READING = 0.25
"""Share of the time spent on waiting for samples that is worth a note."""


def remarks(name: str, outcome: Outcome) -> list[str]:
    """What a report must say of the calibration of `name`: why it ended before its last step, what held it up."""
    found = []
    if outcome.failure is not None:
        found.append(f"The calibration of {name} ended early: {outcome.failure}.")
    if outcome.stopped is not None:
        found.append(
            f"The calibration of {name} ended after step {outcome.stopped}, for the held-out loss had not fallen since "
            f"step {outcome.best_step}."
        )
    if outcome.waited > SLOW_READING:
        found.append(
            f"The calibration of {name} waited for samples {outcome.waited:.0%} of its time; an .npz that is ready to "
            "feed is read faster than images."
        )
    return found


class Told:
    """Tells `progress` of every step: its loss, the last held-out loss, steps in a second."""

    def __init__(self, progress: Progress):
        self._progress, self._held_out = progress, ""
        self._begun = time.perf_counter()
        self._before: int | None = None

    def __call__(self, done: Done) -> None:
        """See `engine.Progress`."""
        if self._before is None:
            self._before = done.step - 1  # taken before the run went on from its checkpoint
            for _ in range(self._before):
                self._progress.advance()
        if done.held_out is not None:
            self._held_out = f"held-out loss {done.held_out:.4f}, "
        rate = (done.step - self._before) / max(time.perf_counter() - self._begun, 1e-9)
        self._progress.measured(done.step, done.scalars)
        self._progress.advance(f"loss {done.loss:.4f}, {self._held_out}{rate:.3g} steps/s")


def feature_taps(merged: oir.Model, tasks: Sequence[Task]) -> list[FeatureTap]:
    """Every cut that a task's tail still has: the adapter's output, then the end of each unit behind it."""
    computed = {value.name for node in merged.graph for value in node.outputs}
    return [
        FeatureTap(task.name, f"{task.name}/{unit.cut}", unit.cut)
        for task in tasks
        for unit in find_units(task.model)
        if f"{task.name}/{unit.cut}" in computed
    ]
