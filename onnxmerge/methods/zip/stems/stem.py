"""Fuse the networks' first layers into one stem, computed once for all tasks."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.compose import cut_out, value_names
from onnxmerge.ir.layers import Layer
from onnxmerge.methods.task import Task
from onnxmerge.methods.zip.alignment import Aligned, Cut, Sharable
from onnxmerge.methods.zip.choices import Start
from onnxmerge.methods.zip.fitting import Fitting, least_squares
from onnxmerge.methods.zip.stems.shared_subspace import fuse_subspace
from onnxmerge.methods.zip.stems.subspaces import Choice, SharedSpace
from onnxmerge.methods.zip.stems.tails import Stem
from onnxmerge.methods.zip.structure import Widths
from onnxmerge.passes.average import Average, Partner
from onnxmerge.passes.fit_split import FitSplit
from onnxmerge.passes.least_squares import solve_repair
from onnxmerge.passes.refit import Refit, Teacher
from onnxmerge.runtime.statistics import Regression


class Stems:
    """The stems of one zip, whatever they start from.

    Args:
        sharable: what the networks have in common.
        aligned: the channel alignment of all tasks but the first.
        tasks: the networks with their samples.
        fitting: samples, seed, threads.
    """

    def __init__(self, sharable: Sharable, aligned: Mapping[str, Aligned], tasks: Sequence[Task], fitting: Fitting):
        self._sharable, self._aligned, self._tasks, self._fitting = sharable, aligned, tasks, fitting
        self._deepest: dict[Start, oir.Model] = {}
        self._known: dict[Choice, SharedSpace] = {}

    def up_to(self, cut: Cut, start: Start, widths: Widths) -> Stem:
        """The stem that ends at `cut`; in the subspace it may have other widths."""
        if start is Start.SUBSPACE:
            return fuse_subspace(self._sharable, self._aligned, self._tasks, cut, widths, self._known, self._fitting)
        if start not in self._deepest:
            self._deepest[start] = self._fused(start)
        model = cut_out(self._deepest[start], self._tasks[0].inputs, [cut.value])
        if start is Start.LEAST_SQUARES and cut.adapted:  # the last layer spans what all tasks read behind the cut
            teachers = {task.name: self._teacher(task, cut) for task in self._tasks}
            FitSplit(teachers, seed=self._fitting.seed, threads=self._fitting.threads)(model)
        adapters = {task.name: self._adapter(task, cut) for task in self._tasks}
        return Stem(model, adapters | ({self._sharable.reference.name: None} if start is Start.KEEP else {}))

    def _adapter(self, task: Task, cut: Cut) -> np.ndarray:
        """[own channels, arriving channels]: the task's channels in the reference's order and scale."""
        aligned = self._aligned.get(task.name)
        matrix = np.zeros((cut.size, cut.size), np.float32)
        order = np.arange(cut.size) if aligned is None else aligned.orders[cut.unit.cut]
        matrix[order, np.arange(cut.size)] = 1 if aligned is None else 1 / aligned.scales.get(cut.unit.cut, 1.0)
        return matrix

    def _fused(self, start: Start) -> oir.Model:
        """The deepest stem, with the reference's graph and names; shallower stems are its beginnings."""
        assert self._sharable.stem is not None
        deepest = self._sharable.cuts[-1]
        stem = self._sharable.up_to(deepest.direct or deepest).clone()
        if start is Start.KEEP:
            return stem
        others = {task.name: task.model for task in self._tasks[1:]}
        partners = [
            Partner(model, self._sharable.partners[name].constants, self._aligned[name].alignment)
            for name, model in others.items()
        ]
        Average(partners, self._sharable.spaces)(stem)
        if start is Start.AVERAGE:
            return stem
        Refit(
            {task.name: self._teacher(task, deepest) for task in self._tasks},
            [cut.unit.cut for cut in self._sharable.cuts[:-1]],
            _repair if start is Start.REPAIR else least_squares(len(self._tasks)),
            compensate=start is Start.LEAST_SQUARES,
            seed=self._fitting.seed,
            threads=self._fitting.threads,
            progress=self._fitting.progress.advance,
        )(stem)
        return stem

    def _teacher(self, task: Task, last: Cut) -> Teacher:
        assert self._sharable.stem is not None
        split = task.data.calibration.take(self._fitting.samples, self._fitting.seed)
        reference = task is self._sharable.reference
        return Teacher(
            model=cut_out(task.model, task.inputs, [last.names[task.name]]),
            samples=task.feeds(split, task),
            student_samples=task.feeds(split, self._sharable.reference),
            count=len(split),
            values={name: name for name in value_names(self._sharable.stem)}
            if reference
            else self._sharable.partners[task.name].values,
            orders={} if reference else self._aligned[task.name].orders,
            scales={} if reference else self._aligned[task.name].scales,
        )


def _repair(layer: Layer, statistics: Sequence[Regression], current: np.ndarray) -> np.ndarray:
    return solve_repair(statistics, current)
