"""zip in compute mode: stems that are computed once, in a tree or for all tasks."""

import json
from pathlib import Path

import onnx_ir as oir

from onnxmerge.methods.measure import Judge
from onnxmerge.methods.zip.choices import Start
from onnxmerge.methods.zip.job import Fitted, Job
from onnxmerge.methods.zip.plan import PlannedCandidate
from onnxmerge.methods.zip.stems.fitted_tree import FittedLevel
from onnxmerge.methods.zip.stems.stem import Stems
from onnxmerge.methods.zip.stems.tree import Forest
from onnxmerge.methods.zip.structure import size_of
from onnxmerge.report.schema import worst_drop

_CHOOSING = 2000
"""Held-out samples that decide which start is calibrated."""


class ComputeMode:
    """See `Maker`.

    Args:
        job: the zip.
        forest: the trees of its tasks.
        temporary: a folder.
    """

    def __init__(self, job: Job, forest: Forest, temporary: Path):
        self._job, self._forest, own = job, forest, job.settings
        self._chooser = Judge(job.tasks, temporary / "chooser", own.threads, samples=_CHOOSING, seed=own.seed)
        self._stems = Stems(job.sharable, job.aligned, job.tasks, job.fitting)
        self._levels: dict[Start, FittedLevel] = {}

    def fit(self, planned: PlannedCandidate) -> Fitted:
        """The best of the settings' starts by its worst task on some held-out samples."""
        job = self._job
        if planned.units:
            job.align(job.tasks)
        job.progress.stage(f"{planned.name}: fit", None)
        tree = self._forest.tree(planned.units, planned.branches, planned.adapters)
        tried = [
            Fitted(self._level(start, planned).merged(tree), job.tasks, start)
            for start in ((Start.SUBSPACE,) if planned.channels or planned.private else job.settings.start)
        ]
        if len(tried) == 1:
            return tried[0]
        return min(tried, key=lambda fitted: worst_drop(self._chooser.score(fitted.model)) or 0.0)

    def _level(self, start: Start, planned: PlannedCandidate) -> FittedLevel:
        """Of all tasks; the same for all candidates whose stem has the first network's widths."""
        job = self._job
        if planned.channels or planned.private:
            return FittedLevel(job.tasks, job.sharable, self._stems, job.fitting, start, planned.widths)
        if start not in self._levels:
            self._levels[start] = FittedLevel(job.tasks, job.sharable, self._stems, job.fitting, start)
        return self._levels[start]

    def metadata(self, planned: PlannedCandidate, merged: oir.Model) -> dict[str, str]:
        """The groups that share further."""
        branches = [branch.model_dump() for branch in planned.branches]
        return {"onnxmerge.branches": json.dumps(branches)} if branches else {}

    def macs(self, merged: oir.Model) -> int | None:
        """See `size_of`."""
        return size_of([merged]).macs
