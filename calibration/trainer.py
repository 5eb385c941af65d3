"""Fine-tune a merged network with its originals as teachers."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir
import torch
from torch import Tensor

from onnxmerge.calibration.judge import BestWeights, Judge
from onnxmerge.calibration.module import GraphModule
from onnxmerge.calibration.objective import FeatureTap, Objective
from onnxmerge.calibration.settings import Settings
from onnxmerge.calibration.sparsity import Absent
from onnxmerge.calibration.streams import Batches, Stream, group
from onnxmerge.data import Split

Progress = Callable[[int, int, float | None], None]
"""Called with (steps done, steps in all, held-out loss if it was just measured)."""


MEMORY = 2_000_000_000
"""Bytes that the values of all tasks together may take in a step; gradients and teachers take about as much again."""


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

    A weight of which at least half is zero is taken for a pruned one, and its zeros stay (see `sparsity`).

    Each step sums the tasks' losses (`Objective`), each with the weights of `settings`. Where K tasks have the same
    outputs of the merged network, each counts 1/K: the loss is the mean over their teachers, labels count once, and
    neither the balance between teachers and labels nor the size of a step depends on K. The held-out loss is the same
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

    Raises:
        ModelError: an operator has no gradient implementation, or the merged and the original shapes differ.
        UsageError: the data lack an input or labels that are needed, a label is no class, a name is no value of its
            model, or none of the losses with a weight applies to a task.
    """
    teachers_of = Counter(frozenset(names) for names in outputs.values())
    objectives = [
        Objective(
            task,
            merged,
            teacher,
            outputs[task],
            inputs[task],
            taps,
            settings,
            1 / teachers_of[frozenset(outputs[task])],
        )
        for task, teacher in teachers.items()
    ]
    student = GraphModule(merged, [name for o in objectives for name in o.outputs])
    streams = group(student, objectives, data, held_out)
    with _threads(settings.threads):
        outcome = _train(student, streams, data, held_out, settings, progress)
    if outcome.best_step > 0:
        student.write_back(merged)
    return outcome


def _train(
    student: GraphModule,
    streams: Sequence[Stream],
    data: Mapping[str, Split],
    held_out: Mapping[str, Split],
    settings: Settings,
    progress: Progress | None,
) -> Outcome:
    """Run the optimiser; `student` ends with its best weights. A loss that is no longer finite ends the run."""
    parameters, absent = student.trainable(), Absent(student)
    bfloat16 = native_bfloat16() if settings.bfloat16 is None else settings.bfloat16
    outcome, best = Outcome(), BestWeights(parameters)
    evaluations = {round(i * settings.steps / settings.evaluations) for i in range(1, settings.evaluations + 1)}
    batch = _fitting(student, streams, held_out, settings)
    try:
        judge = Judge(student, streams, held_out, batch, settings.seed)
        outcome.losses.append((0, best.offer(0, judge.loss())))
        sources = [stream.shuffled(data, batch, settings.seed) for stream in streams]
        optimiser, schedule = _optimiser(parameters, settings)
        for step in range(1, settings.steps + 1):
            finite = _step(student, streams, sources, optimiser, bfloat16)
            absent.restore()
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


def _fitting(student: GraphModule, streams: Sequence[Stream], held_out: Mapping[str, Split], settings: Settings) -> int:
    """The batch size of `settings`, halved until the values of a step fit into `MEMORY`."""
    with torch.no_grad():
        one = sum(stream.bytes_of_one(student, held_out) for stream in streams)
    size = settings.batch
    while size > 1 and size * one > MEMORY:
        size //= 2
    return size


def _optimiser(
    parameters: Sequence[torch.nn.Parameter], settings: Settings
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimiser that `settings` name, and its learning rate over the steps."""
    if settings.optimiser == "sgd":
        sgd = torch.optim.SGD(parameters, settings.rate, momentum=0.9, weight_decay=5e-4)
        sixth = max(round(settings.steps / 6), 1)
        return sgd, torch.optim.lr_scheduler.StepLR(sgd, sixth, gamma=0.5)
    rates = [settings.rate * _magnitude(parameter) for parameter in parameters]
    adamw = torch.optim.AdamW([{"params": [p], "lr": r} for p, r in zip(parameters, rates, strict=True)])
    return adamw, torch.optim.lr_scheduler.OneCycleLR(adamw, rates, total_steps=max(settings.steps, 1))


def _magnitude(parameter: Tensor) -> float:
    """Root mean square of an array, at least 1e-3: Adam's steps are taken relative to it.

    Folded batch norms leave neighbouring layers with weights of very different size (0.007 and 0.6 in one block of a
    ResNet-20); one absolute rate would wreck the one before it moved the other. Adafactor (Shazeer and Stern 2018)
    scales its steps alike.
    """
    return max(float(parameter.detach().square().mean().sqrt()), 1e-3)


def _step(
    student: GraphModule,
    streams: Sequence[Stream],
    sources: Sequence[Iterator[Batches]],
    optimiser: torch.optim.Optimizer,
    bfloat16: bool,
) -> bool:
    """One optimiser step on a batch of every stream; whether all losses were finite."""
    optimiser.zero_grad(set_to_none=True)
    finite = True
    for stream, source in zip(streams, sources, strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = stream.loss(student, next(source))
        loss.backward()
        finite = finite and math.isfinite(loss.item())
    optimiser.step()
    return finite


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 numbers in hardware."""
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch has no public name for it
    return bool(probe and probe())
