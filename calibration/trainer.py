"""Fine-tune a merged network with its originals as teachers."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir
import torch
from torch import Tensor

from onnxmerge.calibration.judge import BestWeights, Judge
from onnxmerge.calibration.module import GraphModule
from onnxmerge.calibration.objective import FeatureTap, Objective
from onnxmerge.calibration.settings import Settings
from onnxmerge.calibration.streams import Batches, Stream, group
from onnxmerge.data import Split

Progress = Callable[[int, int, float | None], None]
"""Called with (steps done, steps in all, held-out loss if it was just measured)."""


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
        Objective(task, merged, teacher, outputs[task], inputs[task], taps, settings)
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
    parameters = student.trainable()
    bfloat16 = native_bfloat16() if settings.bfloat16 is None else settings.bfloat16
    outcome, best = Outcome(), BestWeights(parameters)
    evaluations = {round(i * settings.steps / settings.evaluations) for i in range(1, settings.evaluations + 1)}
    try:
        judge = Judge(student, streams, held_out, settings.batch, settings.seed)
        outcome.losses.append((0, best.offer(0, judge.loss())))
        sources = [stream.shuffled(data, settings.batch, settings.seed) for stream in streams]
        rates = [settings.rate * _magnitude(parameter) for parameter in parameters]
        optimiser = torch.optim.AdamW([{"params": [p], "lr": r} for p, r in zip(parameters, rates, strict=True)])
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rates, total_steps=max(settings.steps, 1))
        for step in range(1, settings.steps + 1):
            finite = _step(student, streams, sources, optimiser, bfloat16)
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
