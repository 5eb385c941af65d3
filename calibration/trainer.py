"""Fine-tune a merged network with its originals as teachers."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir
import torch
from onnxmerge.calibration.module import GraphModule
from onnxmerge.calibration.objective import FeatureTap, Objective
from onnxmerge.calibration.streams import Batches, Stream, group
from torch import Tensor

from onnxmerge.data import Split

HELD_OUT_SAMPLES = 1000
"""At most this many held-out samples of each task judge the weights."""

Progress = Callable[[int, int, float | None], None]
"""Called with (steps done, steps in all, held-out loss if it was just measured)."""


@dataclass(frozen=True)
class Settings:
    """How to calibrate.

    Attributes:
        steps: optimiser steps; 0 leaves the model as it is.
        batch: samples of each task in a step.
        rate: the highest learning rate of the one-cycle schedule.
        temperature: softens the logits under the KL loss.
        feature_weight: weight of the mean feature loss over a task's taps; 0 ignores taps.
        use_labels: add cross-entropy with the data's labels.
        seed: order of the samples and choice of those held out.
        evaluations: how often the held-out loss is measured, the start not counted.
        threads: CPU threads; None leaves torch's choice.
    """

    steps: int
    batch: int = 64
    rate: float = 5e-4
    temperature: float = 2.0
    feature_weight: float = 1.0
    use_labels: bool = False
    seed: int = 0
    evaluations: int = 10
    threads: int | None = None


@dataclass
class Outcome:
    """What calibration did.

    Attributes:
        best_step: the step whose weights were kept; 0 is the start.
        losses: (step, held-out loss) in the order of measurement, step 0 first.
        interrupted: the user stopped it; the best weights until then were kept.
    """

    best_step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    interrupted: bool = False


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
) -> Outcome:
    """Train the weights and norm scales of `merged`; it keeps those with the least held-out loss, the start included.

    Each step sums the tasks' losses (`Objective`): KL and logit error towards the teacher's outputs, the error of
    feature maps at `taps`, cross-entropy if labels are used. The held-out loss is the same without feature maps, so it
    compares runs with and without taps. The optimiser is AdamW with a one-cycle schedule. Tasks whose `data` and
    `held_out` are the very same objects share one pass through the merged network.

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

    Raises:
        ModelError: an operator has no gradient implementation, or the merged and the original shapes differ.
        UsageError: the data lack an input or labels that are needed, or a name is no value of its model.
    """
    objectives = [
        Objective(
            task,
            merged,
            teacher,
            outputs[task],
            inputs[task],
            taps,
            temperature=settings.temperature,
            feature_weight=settings.feature_weight,
            use_labels=settings.use_labels,
        )
        for task, teacher in teachers.items()
    ]
    student = GraphModule(merged, [name for o in objectives for name in o.outputs])
    streams = group(student, objectives, data, held_out)
    with _threads(settings.threads):
        judge = _Judge(student, streams, held_out, settings)
        outcome = _train(student, streams, data, judge, settings, progress)
    if outcome.best_step > 0:
        student.write_back(merged)
    return outcome


def _train(
    student: GraphModule,
    streams: Sequence[Stream],
    data: Mapping[str, Split],
    judge: "_Judge",
    settings: Settings,
    progress: Progress | None,
) -> Outcome:
    """Run the optimiser; `student` ends with its best weights. A loss that is no longer finite ends the run."""
    parameters = student.trainable()
    outcome, best = Outcome(), _Best(parameters)
    evaluations = {round(i * settings.steps / settings.evaluations) for i in range(1, settings.evaluations + 1)}
    try:
        outcome.losses.append((0, best.offer(0, judge.loss())))
        sources = [stream.shuffled(data, settings.batch, settings.seed) for stream in streams]
        optimiser = torch.optim.AdamW(parameters, lr=settings.rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings.rate, total_steps=max(settings.steps, 1))
        for step in range(1, settings.steps + 1):
            finite = _step(student, streams, sources, optimiser)
            schedule.step()
            held_out_loss = None
            if step in evaluations:
                held_out_loss = best.offer(step, judge.loss())
                outcome.losses.append((step, held_out_loss))
            if progress is not None:
                progress(step, settings.steps, held_out_loss)
            if not finite:
                break
    except KeyboardInterrupt:
        outcome.interrupted = True
    best.restore()
    outcome.best_step = best.step
    return outcome


def _step(
    student: GraphModule,
    streams: Sequence[Stream],
    sources: Sequence[Iterator[Batches]],
    optimiser: torch.optim.Optimizer,
) -> bool:
    """One optimiser step on a batch of every stream; whether all losses were finite."""
    optimiser.zero_grad(set_to_none=True)
    finite = True
    for stream, source in zip(streams, sources, strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=BF):
            loss = stream.loss(student, next(source))
        loss.backward()
        finite = finite and math.isfinite(loss.item())
    optimiser.step()
    return finite


class _Best:
    """A copy of the weights with the least held-out loss so far."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]):
        self._parameters, self._least = parameters, math.inf
        self._keep(0)

    def offer(self, step: int, loss: float) -> float:
        """Keep the current weights if `loss` is the least so far; returns `loss`."""
        if loss < self._least:
            self._least = loss
            self._keep(step)
        return loss

    def restore(self) -> None:
        with torch.no_grad():
            for parameter, copy in zip(self._parameters, self._copies, strict=True):
                parameter.copy_(copy)

    def _keep(self, step: int) -> None:
        self.step = step
        self._copies = [parameter.detach().clone() for parameter in self._parameters]


class _Judge:
    """The held-out loss on a fixed choice of samples; the teachers' outputs are computed once."""

    def __init__(
        self, student: GraphModule, streams: Sequence[Stream], held_out: Mapping[str, Split], settings: Settings
    ):
        self._student, self._streams, self._held_out, self._settings = student, streams, held_out, settings
        self._targets: dict[str, list[list[Tensor]]] = {}
        for stream in streams:
            for objective in stream.objectives:
                targets = [objective.output_targets(batches[objective.task]) for batches in self._batches(stream)]
                objective.scale(targets)
                self._targets[objective.task] = targets

    def loss(self) -> float:
        """Mean over the samples of the sum of all tasks' output losses."""
        with torch.no_grad():
            return sum(self._stream_loss(stream) for stream in self._streams)

    def _batches(self, stream: Stream) -> Iterator[Batches]:
        return stream.subset(self._held_out, HELD_OUT_SAMPLES, self._settings.batch, self._settings.seed)

    def _stream_loss(self, stream: Stream) -> float:
        total, samples = 0.0, 0
        for number, batches in enumerate(self._batches(stream)):
            values = stream.run(self._student, batches, taps=False)
            count = len(next(iter(values.values())))
            for o in stream.objectives:
                total += count * float(o.output_loss(values, self._targets[o.task][number], batches[o.task]))
            samples += count
        return total / samples


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)
