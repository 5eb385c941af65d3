"""The training loop: what is trained, and towards what, is the business of a `Problem`."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from onnxmerge.calibration.settings import Training

Progress = Callable[[int, int, float | None], None]
"""Called with (steps done, steps in all, held-out loss if it was just measured)."""


class Problem(Protocol):
    """What is trained, and how well it does."""

    @property
    def trained(self) -> Mapping[str, Tensor]:
        """Every tensor that training changes, by name: parameters get gradients, others (statistics) are only kept."""

    def losses(self) -> Iterator[Tensor]:
        """The losses of one step, each on a batch of its own.

        Each is back-propagated before the next is asked for, so the values of only one are in memory; gradients add up.
        What is drawn at random comes from torch's generator, which the loop seeds before every step.
        """

    def judge(self) -> float:
        """The held-out loss of the tensors as they are."""

    def settle(self, step: int) -> None:
        """Called after every step, numbered from 1: here zeros stay zero, and what grows with time grows.

        Whatever depends on time must follow from `step` alone.
        """


@dataclass
class Outcome:
    """What training did.

    Attributes:
        best_step: the step whose weights were kept; 0 is the start.
        losses: (step, held-out loss) in the order of measurement, step 0 first.
        interrupted: the user stopped it; the best weights until then were kept.
    """

    best_step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    interrupted: bool = False


def train(problem: Problem, settings: Training, progress: Progress | None = None) -> Outcome:
    """Train; the tensors end as they were when judged best, the start included.

    A loss that is no longer finite ends the run, and so does an interrupt.
    """
    parameters = [tensor for tensor in problem.trained.values() if isinstance(tensor, torch.nn.Parameter)]
    bfloat16 = native_bfloat16() if settings.bfloat16 is None else settings.bfloat16
    outcome, best = Outcome(), BestWeights(list(problem.trained.values()))
    evaluations = {round(i * settings.steps / settings.evaluations) for i in range(1, settings.evaluations + 1)}
    try:
        outcome.losses.append((0, best.offer(0, problem.judge())))
        optimiser, schedule = _optimiser(parameters, settings)
        with torch.random.fork_rng(devices=()):
            for step in range(1, settings.steps + 1):
                torch.manual_seed(_SEEDS * settings.seed + step)
                optimiser.zero_grad(set_to_none=True)
                finite = _backward(problem, bfloat16)
                optimiser.step()
                problem.settle(step)
                schedule.step()
                held_out_loss = None
                if step in evaluations:
                    held_out_loss = best.offer(step, problem.judge())
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


_SEEDS = 1_000_003
"""Steps of two runs with neighbouring seeds draw different numbers, up to this many steps."""


def _backward(problem: Problem, bfloat16: bool) -> bool:
    """Add up the gradients of one step's losses; whether all losses were finite."""
    finite, losses = True, problem.losses()
    while True:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = next(losses, None)
        if loss is None:
            return finite
        loss.backward()
        finite = finite and math.isfinite(loss.item())


class BestWeights:
    """A copy of the tensors with the least held-out loss so far; at first of the start.

    Attributes:
        step: the step they come from.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._tensors, self._least = tensors, math.inf
        self._keep(0)

    def offer(self, step: int, loss: float) -> float:
        """Keep the current tensors if `loss` is the least so far (NaN never is); returns `loss`."""
        if loss < self._least:
            self._least = loss
            self._keep(step)
        return loss

    def restore(self) -> None:
        """Put the best ones back."""
        with torch.no_grad():
            for tensor, kept in zip(self._tensors, self._kept, strict=True):
                tensor.copy_(kept)

    def _keep(self, step: int) -> None:
        self.step = step
        self._kept = [tensor.detach().clone() for tensor in self._tensors]


def _optimiser(
    parameters: Sequence[torch.nn.Parameter], settings: Training
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


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` CPU threads (None: as many as before) while this lasts."""
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
