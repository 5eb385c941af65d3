"""Fine-tune a merged network with its originals as teachers."""

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir
import torch
from torch import Tensor

from onnxmerge.calibration import ranks
from onnxmerge.calibration.ahead import Ahead
from onnxmerge.calibration.devices import chosen_device, computing, mixed
from onnxmerge.calibration.engine import Outcome, Progress, train
from onnxmerge.calibration.judge import Judge
from onnxmerge.calibration.module import GraphModule
from onnxmerge.calibration.objective import FeatureTap, Objective
from onnxmerge.calibration.settings import Checkpoint, Settings, Training
from onnxmerge.calibration.sparsity import Absent
from onnxmerge.calibration.streams import Batches, Stream, group
from onnxmerge.data import Split

MEMORY = 2_000_000_000
"""Bytes that the values of all tasks together may take in a step; gradients and teachers take about as much again."""


def calibrate(
    merged: onnx_ir.Model,
    teachers: Mapping[str, onnx_ir.Model],
    outputs: Mapping[str, Mapping[str, str]],
    inputs: Mapping[str, Mapping[str, str]],
    taps: Sequence[FeatureTap],
    data: Mapping[str, Split],
    held_out: Mapping[str, Split],
    settings: Settings,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    weights: Mapping[str, float] | None = None,
) -> Outcome:
    """Train the weights and norm scales of `merged`; it keeps those with the least held-out loss, the start included.

    A weight of which at least half is zero is taken for a pruned one, and its zeros stay (see `sparsity`).

    Each step sums the tasks' losses (`Objective`), each with the weights of `settings`. Where K tasks have the same
    outputs of the merged network, each counts 1/K: the loss is the mean over their teachers, labels count once, and
    neither the balance between teachers and labels nor the size of a step depends on K. `weights` changes what each
    task counts, and leaves what all count together. The held-out loss is the same
    without feature maps, so it compares runs with and without taps. Tasks whose `data` and `held_out` are the very same
    objects share one pass through the merged network.

    Args:
        merged: the merged network; its initializers are replaced.
        teachers: each task's original.
        outputs: for each task, the original's output name for each of the merged model's.
        inputs: for each task, the original's input name for each of the merged model's.
        taps: values of the merged model that should equal the originals'.
        data: each task's samples to train with.
        held_out: each task's samples to choose the best weights with.
        settings: see `Settings`.
        progress: told of every step.
        checkpoint: where the run is kept while it is under way.
        weights: how much each task counts beside the others; None: all alike.

    Raises:
        ModelError: an operator has no gradient implementation, or the merged and the original shapes differ.
        UsageError: the data lack an input or labels that are needed, a label is no class, a name is no value of its
            model, none of the losses with a weight applies to a task, or there is no GPU that was asked for, or one
            with too little memory.
    """
    teachers_of = Counter(frozenset(names) for names in outputs.values())
    counts = weights or dict.fromkeys(teachers, 1.0)
    mean = sum(counts.values()) / len(counts)
    objectives = [
        Objective(
            task,
            merged,
            teacher,
            outputs[task],
            inputs[task],
            taps,
            settings,
            counts[task] / mean / teachers_of[frozenset(outputs[task])],
        )
        for task, teacher in teachers.items()
    ]
    student = GraphModule(merged, [name for o in objectives for name in o.outputs])
    with computing(settings.threads):
        student.to(chosen_device(settings.device))
        streams = group(student, objectives, data, held_out)
        outcome = solve(Distillation(student, streams, data, held_out, settings), settings, progress, checkpoint)
    if outcome.best_step > 0:
        student.write_back(merged)
    return outcome


class Distillation:
    """The problem (`engine.Problem`) of matching several teachers, each on its own samples."""

    def __init__(
        self,
        student: GraphModule,
        streams: Sequence[Stream],
        data: Mapping[str, Split],
        held_out: Mapping[str, Split],
        settings: Settings,
    ):
        """Run the teachers on the held-out samples."""
        self._begun = time.perf_counter()
        self._student, self._streams = student, streams
        self._absent = Absent(student)
        self._updates = settings.norm_statistics == "updating"
        self._data, self._seed = data, settings.seed
        self._batch = fitting_batch(student, streams, held_out, settings)
        self._judge = Judge(student, streams, held_out, self._batch, settings.seed)
        self._rounds = settings.steps * settings.accumulate
        self._sources: list[Ahead[Batches]] = []
        self._weights = [stream.weight(data, self._batch) for stream in streams]
        self.samples = sum(stream.size(data, self._batch) for stream in streams)
        self._remember(settings)
        self.skip(0)

    @property
    def trained(self) -> Mapping[str, Tensor]:
        """The student's weights and norm scales, and the running statistics of its batch norms if they are updated."""
        return self._student.trainable_by_name() | (self._student.statistics() if self._updates else {})

    def losses(self) -> Iterator[Tensor]:
        """A batch of every stream."""
        self._student.batch_statistics = self._updates
        for stream, source, weight in zip(self._streams, self._sources, self._weights, strict=True):
            yield stream.loss(self._student, next(source), weight)

    @property
    def terms(self) -> Mapping[str, float]:
        """The losses by task and name."""
        objectives = [objective for stream in self._streams for objective in stream.objectives]
        return {f"{own.task}/{name}": term for own in objectives for name, term in own.terms.items()}

    def skip(self, rounds: int) -> None:
        """Start behind so many batches of every stream."""
        self.close()
        endless = [stream.shuffled(self._data, self._batch, self._seed, rounds) for stream in self._streams]
        self._sources = [Ahead(itertools.islice(source, max(self._rounds - rounds, 0))) for source in endless]

    def _remember(self, settings: Settings) -> None:
        """Have teachers keep what they give, where that is wanted and pays."""
        left = settings.cache_bytes
        for stream in self._streams if left else ():
            own = self._rounds * stream.size(self._data, self._batch) // ranks.count()
            for objective in stream.objectives:
                split = self._data[objective.task]
                if own > len(split):
                    with mixed(settings, self._student.device):
                        left -= objective.remember(split, self._batch, left)

    @property
    def waited(self) -> float:
        """Share of the time since it was made that was spent on waiting for samples."""
        return sum(source.waited for source in self._sources) / (time.perf_counter() - self._begun)

    def close(self) -> None:
        """Stop reading samples."""
        for source in self._sources:
            source.close()

    def judge(self) -> float:
        """The sum of the tasks' output losses on held-out samples."""
        self._student.batch_statistics = False
        return self._judge.loss()

    def settle(self, step: int) -> None:
        """What was pruned stays absent."""
        self._absent.restore()


def solve(
    problem: Distillation, settings: Training, progress: Progress | None, checkpoint: Checkpoint | None
) -> Outcome:
    """Train, then stop reading samples."""
    with contextlib.closing(problem):
        outcome = train(problem, settings, progress, checkpoint)
    outcome.waited = problem.waited
    return outcome


def fitting_batch(
    student: GraphModule, streams: Sequence[Stream], held_out: Mapping[str, Split], settings: Training
) -> int:
    """The batch size of `settings`, halved until the values of a step fit into `MEMORY`."""
    with torch.no_grad():
        one = sum(stream.bytes_of_one(student, held_out) for stream in streams)
    size = settings.batch
    while size > 1 and size * one > MEMORY:
        size //= 2
    return size
