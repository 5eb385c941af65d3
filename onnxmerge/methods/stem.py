"""Fuse the networks' first layers into one stem, and fit each task's tail behind it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.compose import cut_out, rename_value
from onnxmerge.ir.layers import Layer
from onnxmerge.ir.units import find_units
from onnxmerge.methods.alignment import Aligned, Cut, Sharable
from onnxmerge.methods.progress import Progress
from onnxmerge.methods.task import Task
from onnxmerge.passes.average import Average, Partner
from onnxmerge.passes.fit_split import FitSplit
from onnxmerge.passes.insert_adapter import InsertAdapter
from onnxmerge.passes.least_squares import RIDGE, solve_least_squares, solve_repair
from onnxmerge.passes.refit import Refit, Solve, Teacher
from onnxmerge.runtime.activations import Renamed, store
from onnxmerge.runtime.statistics import Regression

_ARRIVING = "stem"
"""Name of a tail's input."""


class Start(StrEnum):
    """Where a stem's weights come from, before calibration."""

    LEAST_SQUARES = "least-squares"
    AVERAGE = "average"
    REPAIR = "repair"
    KEEP = "keep"
    """The reference's own stem, as it is: its task stays exact."""


@dataclass(frozen=True)
class Fitting:
    """What every fit of one run shares."""

    samples: int
    seed: int
    threads: int | None
    folder: Path
    """Temporary files go here."""
    progress: Progress


def least_squares(tasks: int, ridge: float = RIDGE) -> Solve:
    """Least squares towards all tasks alike, pulled to the current weights."""

    def solve(layer: Layer, statistics: Sequence[Regression], current: np.ndarray) -> np.ndarray:
        return solve_least_squares(statistics, current, [1.0] * tasks, ridge)

    return solve


def repair(layer: Layer, statistics: Sequence[Regression], current: np.ndarray) -> np.ndarray:
    """REPAIR of the current weights."""
    return solve_repair(statistics, current)


def fuse_stem(
    sharable: Sharable, aligned: Mapping[str, Aligned], tasks: Sequence[Task], start: Start, fitting: Fitting
) -> oir.Model:
    """The deepest stem, with the reference's graph and names; shallower stems are its beginnings."""
    assert sharable.stem is not None
    stem = sharable.stem.clone()
    if start == Start.KEEP:
        return stem
    partners = [
        Partner(task.model, sharable.partners[task.name].constants, aligned[task.name].alignment) for task in tasks[1:]
    ]
    Average(partners, sharable.spaces)(stem)
    if start == Start.AVERAGE:
        return stem
    last = sharable.cuts[-1]
    teachers = {task.name: _stem_teacher(sharable, aligned, task, last, fitting) for task in tasks}
    solve = repair if start == Start.REPAIR else least_squares(len(tasks))
    Refit(
        teachers,
        [cut.unit.cut for cut in sharable.cuts[:-1]],
        solve,
        compensate=start == Start.LEAST_SQUARES,
        seed=fitting.seed,
        threads=fitting.threads,
        progress=fitting.progress.advance,
    )(stem)
    return stem


def _stem_teacher(
    sharable: Sharable, aligned: Mapping[str, Aligned], task: Task, last: Cut, fitting: Fitting
) -> Teacher:
    assert sharable.stem is not None
    split = task.data.calibration.take(fitting.samples, fitting.seed)
    reference = task is sharable.reference
    same = {name: name for name in _computed(sharable.stem)}
    return Teacher(
        model=cut_out(task.model, task.inputs, [last.names[task.name]]),
        samples=task.feeds(split, task),
        student_samples=task.feeds(split, sharable.reference),
        count=len(split),
        values=same if reference else sharable.partners[task.name].values,
        orders={} if reference else aligned[task.name].orders,
        scales={} if reference else aligned[task.name].scales,
    )


def _computed(model: oir.Model) -> list[str]:
    return [v.name or "" for v in model.graph.inputs] + [o.name or "" for node in model.graph for o in node.outputs]


def fit_split(
    sharable: Sharable,
    aligned: Mapping[str, Aligned],
    tasks: Sequence[Task],
    stem: oir.Model,
    cut: Cut,
    fitting: Fitting,
) -> None:
    """Let the stem's last layer span what all tasks read behind the cut, in place (see `FitSplit`)."""
    teachers = {task.name: _stem_teacher(sharable, aligned, task, cut, fitting) for task in tasks}
    FitSplit(teachers, seed=fitting.seed, threads=fitting.threads)(stem)


def fit_tails(
    sharable: Sharable,
    aligned: Mapping[str, Aligned],
    tasks: Sequence[Task],
    stem: oir.Model,
    cut: Cut,
    start: Start,
    fitting: Fitting,
) -> dict[str, oir.Model]:
    """For each task what follows the cut: a 1x1 adapter and the task's own layers, all refitted behind this stem."""
    return {
        task.name: own_tail(task, cut)
        if start == Start.KEEP and task is sharable.reference
        else _fit_tail(sharable, aligned.get(task.name), task, stem, cut, fitting)
        for task in tasks
    }


def own_tail(task: Task, cut: Cut) -> oir.Model:
    """The task's own layers behind the cut, as they are."""
    return cut_out(task.model, [cut.names[task.name]], task.outputs)


def _fit_tail(
    sharable: Sharable, aligned: Aligned | None, task: Task, stem: oir.Model, cut: Cut, fitting: Fitting
) -> oir.Model:
    theirs = cut.names[task.name]
    teacher = own_tail(task, cut)
    tail = teacher.clone()
    rename_value(tail, theirs, _ARRIVING)
    order = np.arange(cut.size) if aligned is None else aligned.orders[cut.unit.cut]
    scale = np.ones(cut.size) if aligned is None else aligned.scales.get(cut.unit.cut, np.ones(cut.size))
    InsertAdapter(cut.axis, order, theirs, gain=1 / scale)(tail)
    split = task.data.calibration.take(fitting.samples, fitting.seed)
    folder = fitting.folder / f"cut-{task.name}"
    arriving = store(
        stem,
        task.feeds(split, sharable.reference),
        [cut.unit.cut],
        folder / "student",
        threads=fitting.threads,
    )
    wanted = store(task.model, task.feeds(split, task), [theirs], folder / "teacher", threads=fitting.threads)
    cuts = [unit.cut for unit in find_units(task.model)]
    values = {name: name for name in _computed(teacher)} | {_ARRIVING: theirs}
    Refit(
        {task.name: Teacher(teacher, wanted, Renamed(arriving, {cut.unit.cut: _ARRIVING}), len(split), values)},
        cuts[cuts.index(theirs) + 1 :] if theirs in cuts else [],
        least_squares(1),
        seed=fitting.seed,
        threads=fitting.threads,
        progress=fitting.progress.advance,
    )(tail)
    return tail
