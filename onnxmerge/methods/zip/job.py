"""What one zip works with, in either mode."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import onnx_ir as oir

from onnxmerge.calibration.settings import Checkpoint, Settings
from onnxmerge.methods.candidates import Shelf
from onnxmerge.methods.progress import Progress
from onnxmerge.methods.task import Task, task_outputs
from onnxmerge.methods.zip.alignment import Aligned, Sharable, align_all
from onnxmerge.methods.zip.choices import Start
from onnxmerge.methods.zip.fictive import with_own_inputs
from onnxmerge.methods.zip.fitting import Fitting
from onnxmerge.methods.zip.plan import Plan, PlannedCandidate
from onnxmerge.methods.zip.settings import ZipSettings
from onnxmerge.report.schema import Candidate


@dataclass
class Job:
    """One zip under way.

    Attributes:
        tasks: the originals with their samples.
        sharable: what they have in common.
        plan: what is to be made; trees are added while they grow.
        settings: of the run.
        fitting: samples, seed, weights of the tasks.
        shelf: the output folder.
        progress: told what is going on.
        finished: candidates, in the order in which they were made.
        notes: what a reader of the report must know.
        aligned: for each task but the first its alignment with the first, once that has been asked for.
    """

    tasks: list[Task]
    sharable: Sharable
    plan: Plan
    settings: ZipSettings
    fitting: Fitting
    shelf: Shelf
    progress: Progress
    finished: list[Candidate] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    aligned: dict[str, Aligned] = field(default_factory=dict)

    def align(self, tasks: Sequence[Task]) -> None:
        """Align every one of the tasks with the first, once."""
        if not self.aligned:
            self.aligned.update(align_all(self.sharable, tasks, self.fitting))

    def calibrate(
        self,
        name: str,
        merged: oir.Model,
        teachers: Sequence[Task],
        steps: int,
        checkpoint: Checkpoint | None = None,
    ) -> list[tuple[int, float]]:
        """Train `merged` in place; the held-out losses."""
        from onnxmerge.methods.calibrating import calibrate_merged, remarks  # torch is loaded only when it is needed

        self.progress.stage(f"{name}: calibrate", steps)
        settings = Settings(
            steps=steps,
            rate=self.settings.rate,
            label_weight=float(self.settings.labels),
            seed=self.settings.seed,
            threads=self.settings.threads,
            device=self.settings.device,
        )
        teachers = [with_own_inputs(task) for task in teachers]
        outcome = calibrate_merged(
            merged, teachers, task_outputs(teachers), settings, self.progress, checkpoint, self.settings.weights
        )
        self.notes += remarks(name, outcome)
        return outcome.losses


@dataclass(frozen=True)
class Fitted:
    """A candidate before it is calibrated.

    Attributes:
        model: the merged model.
        teachers: the originals, as calibration compares them with it.
        start: what its stem started from, where there was a choice.
        channels: how many neurons of each space are shared, where that was decided now.
    """

    model: oir.Model
    teachers: Sequence[Task]
    start: Start | None = None
    channels: dict[str, int] = field(default_factory=dict)


class Maker(Protocol):
    """Makes the candidates of one mode."""

    def fit(self, planned: PlannedCandidate) -> Fitted:
        """The closed form of a candidate that shares something."""

    def metadata(self, planned: PlannedCandidate, merged: oir.Model) -> dict[str, str]:
        """What the file says of itself besides its recipe."""

    def macs(self, merged: oir.Model) -> int | None:
        """Multiply-accumulates of one sample for all tasks."""
