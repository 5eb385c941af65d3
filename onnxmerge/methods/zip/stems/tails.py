"""What follows a stem: for each task an adapter and its own layers, refitted behind it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.compose import chain, cut_out, rename_value, value_names
from onnxmerge.ir.units import find_units
from onnxmerge.methods.task import Network, Task
from onnxmerge.methods.zip.alignment import Cut, Sharable
from onnxmerge.methods.zip.fitting import Fitting, least_squares
from onnxmerge.passes.attach_tails import SHARED, AttachTails
from onnxmerge.passes.fold_adapter import FoldAdapter
from onnxmerge.passes.insert_adapter import InsertAdapter
from onnxmerge.passes.refit import Refit, Solve, Teacher
from onnxmerge.passes.split_off import STEM
from onnxmerge.runtime.activations import Renamed, store

ARRIVING = "stem"
"""Name of a tail's input."""


@dataclass(frozen=True)
class Stem:
    """What is computed once, up to a cut, and how the tasks begin to read it."""

    model: oir.Model
    adapters: Mapping[str, np.ndarray | None]
    """By task [own channels, arriving channels], or None where the stem is the task's own and its tail stays."""
    sides: Mapping[str, oir.Model] = field(default_factory=dict)
    """By task what computes its private channels beside the stem (see `SplitOff`), where it has some."""

    def attach(
        self, tails: Mapping[str, oir.Model], *, merged: Collection[str] = (), shared: str = SHARED
    ) -> oir.Model:
        """The stem, the sides and behind them the tails as one model; see `AttachTails`."""
        sides = self.sides
        pieces = {t: chain(sides[t], tail, "private/") if t in sides else tail for t, tail in tails.items()}
        return self._compose(pieces, merged, shared)

    def beside(self, tasks: Sequence[str]) -> oir.Model:
        """The stem and the sides of some tasks; outputs are what their tails read."""
        return self._compose({task: self.sides[task] for task in tasks}) if self.sides else self.model

    def _compose(
        self, pieces: Mapping[str, oir.Model], merged: Collection[str] = (), shared: str = SHARED
    ) -> oir.Model:
        inputs = [value.name or "" for value in self.model.graph.inputs]
        (last,) = (value.name or "" for value in self.model.graph.outputs)
        reads = {
            task: [(v.name or "").removeprefix(STEM) for v in piece.graph.inputs] if task in self.sides else [last]
            for task, piece in pieces.items()
        }
        read = dict.fromkeys(name for own in reads.values() for name in own if name not in inputs)
        stem = cut_out(self.model, inputs, list(read))
        return AttachTails(pieces, reads, merged=merged, shared=shared)(stem).model


def fit_tails(
    sharable: Sharable, tasks: Sequence[Task], stem: Stem, cut: Cut, fitting: Fitting
) -> dict[str, oir.Model]:
    """For each task what follows the cut: its adapter, if any, and its own layers, all refitted behind this stem."""
    return {
        task.name: own_tail(task, cut)
        if stem.adapters[task.name] is None
        else _fit_tail(sharable, task, stem, cut, fitting)
        for task in tasks
    }


def own_tail(task: Network, cut: Cut) -> oir.Model:
    """The task's own layers behind the cut, as they are."""
    return cut_out(task.model, [cut.names[task.name]], task.outputs)


def adapted_tail(task: Network, cut: Cut, matrix: np.ndarray) -> oir.Model:
    """The task's own layers behind an adapter [own channels, arriving channels]; the input is called `ARRIVING`."""
    theirs = cut.names[task.name]
    tail = own_tail(task, cut).clone()
    rename_value(tail, theirs, ARRIVING)
    InsertAdapter(cut.axis, matrix, theirs)(tail)
    return tail if cut.adapted else FoldAdapter(theirs)(tail).model


def _fit_tail(sharable: Sharable, task: Task, stem: Stem, cut: Cut, fitting: Fitting) -> oir.Model:
    matrix = stem.adapters[task.name]
    assert matrix is not None
    tail = adapted_tail(task, cut, matrix)
    refit_tail(tail, task, cut, stem.beside([task.name]), sharable.reference, least_squares(1), fitting)
    return tail


def refit_tail(
    tail: oir.Model, task: Task, cut: Cut, before: oir.Model, reader: Network, solve: Solve, fitting: Fitting
) -> None:
    """Refit a task's tail to what arrives there, in place.

    Args:
        tail: its only input is called `ARRIVING`; what it then reads has the task's own name of the cut.
        task: the original and its samples.
        cut: where the tail begins.
        before: what it stands behind; its only output arrives.
        reader: the network whose input names `before` has.
        solve: the rule.
        fitting: samples, seed, threads.
    """
    theirs, teacher = cut.names[task.name], own_tail(task, cut)
    split = task.data.calibration.take(fitting.samples, fitting.seed)
    folder = fitting.folder / f"cut-{task.name}"
    (read,) = (value.name or "" for value in before.graph.outputs)
    arriving = store(before, task.feeds(split, reader), [read], folder / "student", threads=fitting.threads)
    wanted = store(task.model, task.feeds(split, task), [theirs], folder / "teacher", threads=fitting.threads)
    values = {name: name for name in value_names(teacher)} | {ARRIVING: theirs}
    cuts = [unit.cut for unit in find_units(task.model) if unit.cut in values and unit.cut != theirs]
    Refit(
        {task.name: Teacher(teacher, wanted, Renamed(arriving, {read: ARRIVING}), len(split), values)},
        cuts,
        solve,
        seed=fitting.seed,
        threads=fitting.threads,
        progress=fitting.progress.advance,
    )(tail)
