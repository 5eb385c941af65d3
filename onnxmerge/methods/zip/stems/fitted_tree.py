"""A tree of stems whose weights are fitted: each group of tails is zipped on what arrives at them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as oir

from onnxmerge.data import Batch, Dataset, Split
from onnxmerge.methods.task import Task
from onnxmerge.methods.zip.alignment import Cut, Sharable, align_all, find_sharable
from onnxmerge.methods.zip.choices import Start
from onnxmerge.methods.zip.fitting import Fitting
from onnxmerge.methods.zip.stems.stem import Stems
from onnxmerge.methods.zip.stems.tails import Stem, adapted_tail, fit_tails
from onnxmerge.methods.zip.stems.tree import Fork, Level
from onnxmerge.methods.zip.structure import Widths
from onnxmerge.runtime.activations import OnDisk, store


class FittedLevel(Level):
    """Stems are fused and tails refitted.

    Args:
        tasks: the networks with their samples.
        sharable: what they have in common.
        stems: of these tasks.
        fitting: samples, seed, threads, weights of these tasks.
        start: what stems start from, here and below.
        widths: of this level's stem.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        sharable: Sharable,
        stems: Stems,
        fitting: Fitting,
        start: Start,
        widths: Widths | None = None,
    ):
        super().__init__(tasks, sharable)
        self._tasks, self._stems, self._fitting = tasks, stems, fitting
        self._start, self._widths = start, widths or Widths()
        self._last: tuple[Cut, Stem, dict[str, oir.Model]] | None = None

    def split(self, cut: Cut) -> tuple[Stem, dict[str, oir.Model]]:
        """See `Stems` and `fit_tails`; the last one made is kept, since several trees may grow from it."""
        if self._last is None or self._last[0] is not cut:
            stem = self._stems.up_to(cut, self._start, self._widths)
            self._last = cut, stem, fit_tails(self.sharable, self._tasks, stem, cut, self._fitting)
        return self._last[1:]

    def below(self, group: Fork, stem: Stem | None, cut: Cut | None, tails: Mapping[str, oir.Model]) -> Level:
        """The tails of the group as networks, aligned on the samples that arrive there."""
        numbers = [number for number, task in enumerate(self._tasks) if task.name in group.tasks]
        tasks = [self._tasks[number] for number in numbers]
        folder = self._fitting.folder / f"behind-{tasks[0].name}"
        if stem is not None and cut is not None:
            tasks = self._behind(tasks, stem, cut, tails, folder)
        weights = self._fitting.weights
        own = None if weights is None else tuple(weights[number] for number in numbers)
        fitting = replace(self._fitting, folder=folder, weights=own)
        sharable = find_sharable(tasks, group.cut)
        stems = Stems(sharable, align_all(sharable, tasks, fitting), tasks, fitting)
        return FittedLevel(tasks, sharable, stems, fitting, self._start)

    def _behind(
        self, tasks: Sequence[Task], stem: Stem, cut: Cut, tails: Mapping[str, oir.Model], folder: Path
    ) -> list[Task]:
        """The tails of some tasks, which all read the stem through an adapter when one does, with their samples."""
        adapted = any(stem.adapters[task.name] is not None for task in tasks)
        arriving: dict[tuple[int, str], Dataset] = {}
        found = []
        for task in tasks:
            tail = tails[task.name]
            if adapted and stem.adapters[task.name] is None:
                tail = adapted_tail(task, cut, np.eye(cut.size, dtype=np.float32))
            name = tail.graph.inputs[0].name or ""
            key = id(task.data), name
            if key not in arriving:  # tasks with the same data go on sharing them
                arriving[key] = self._arriving(task, stem, name, folder / f"samples-{len(arriving)}")
            found.append(replace(task, model=tail, data=arriving[key]))
        return found

    def _arriving(self, task: Task, stem: Stem, name: str, folder: Path) -> Dataset:
        split = task.data.calibration.take(self._fitting.samples, self._fitting.seed)
        (end,) = (value.name or "" for value in stem.model.graph.outputs)
        samples = task.feeds(split, self.sharable.reference)
        kept = _Kept(name, store(stem.model, samples, [end], folder, threads=self._fitting.threads).arrays[end])
        return Dataset(task.data.source, Split(kept), Split(kept, np.arange(0)), task.data.stand_in)


class _Kept:
    """Samples of one array for the input `name`, without labels; see `onnxmerge.data.dataset.Samples`."""

    has_labels = False

    def __init__(self, name: str, values: np.ndarray | OnDisk):
        self._name, self._values = name, values

    def __len__(self) -> int:
        return len(self._values)

    def read(self, rows: np.ndarray) -> Batch:
        return Batch({self._name: self._values[rows]}, None)
