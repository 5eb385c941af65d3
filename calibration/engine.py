"""The training loop: what is trained, and towards what, is the business of a `Problem`."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from onnxmerge.calibration import ranks
from onnxmerge.calibration.best import BestWeights, copy_into
from onnxmerge.calibration.checkpoint import (
    optimiser_facts,
    optimiser_tensors,
    read_checkpoint,
    restore_optimiser,
    write_checkpoint,
)
from onnxmerge.calibration.devices import mixed
from onnxmerge.calibration.optimisers import make_optimiser
from onnxmerge.calibration.settings import Checkpoint, Training


class Problem(Protocol):
    """What is trained, and how well it does."""

    @property
    def trained(self) -> Mapping[str, Tensor]:
        """Every tensor that training changes, by name: parameters get gradients, others (statistics) are only kept."""

    def losses(self) -> Iterator[Tensor]:
        """The losses of one step, each on a batch of its own.

        Each is back-propagated before the next is asked for, so the values of only one are in memory; gradients add up.
        Of several processes (`ranks`) each has its share of a batch, and the mean of their losses is that of the batch.
        What is drawn at random comes from torch's generator, which the loop seeds before every step.
        """

    @property
    def terms(self) -> Mapping[str, float]:
        """What the losses of the last call of `losses` consisted of, by name; empty where there is nothing to tell."""

    @property
    def samples(self) -> int:
        """How many samples one call of `losses` draws, in all processes."""

    def skip(self, rounds: int) -> None:
        """Called before a run goes on: go past the batches that so many calls of `losses` have drawn."""

    def judge(self) -> float:
        """The held-out loss of the tensors as they are."""

    def settle(self, step: int) -> None:
        """Called after every step, numbered from 1: here zeros stay zero, and what grows with time grows.

        Whatever depends on time must follow from `step` alone.
        """


@dataclass(frozen=True)
class Done:
    """A step that was just taken.

    Attributes:
        step: its number, from 1.
        steps: of the whole run.
        loss: what it was trained on.
        held_out: the held-out loss, where it was measured now.
        scalars: all that is known of the step, both losses too, by the names under which a log shows it.
    """

    step: int
    steps: int
    loss: float
    held_out: float | None
    scalars: Mapping[str, float] = field(default_factory=dict)


Progress = Callable[[Done], None]
"""Told of every step."""


@dataclass
class Outcome:
    """What training did.

    Attributes:
        best_step: the step whose weights were kept; 0 is the start.
        losses: (step, held-out loss) in the order of measurement, step 0 first.
        interrupted: the user stopped it; the best weights until then were kept.
        failure: a sentence where a loss or gradient was no number and so ended the run.
        stopped: the step after which early stopping ended the run.
        waited: share of the time in which there were no samples to train on, where that is known.
    """

    best_step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    interrupted: bool = False
    failure: str | None = None
    stopped: int | None = None
    waited: float = field(default=0.0, compare=False)


class _Failed(Exception):
    """A loss or gradient is no number."""


CHECKPOINT_SECONDS = 60
"""A checkpoint is written at every measurement of the held-out loss, and after this time without one."""


def train(
    problem: Problem, settings: Training, progress: Progress | None = None, checkpoint: Checkpoint | None = None
) -> Outcome:
    """Train; the tensors end as they were when judged best, the start included.

    The run ends early when a loss or a gradient is no longer finite (the step is not taken), on an interrupt, and after
    `settings.patience` evaluations without gain. One that goes on from its checkpoint ends with the very same numbers
    as one that was never stopped; whoever has kept its result removes the checkpoint.

    Raises:
        UsageError: the checkpoint cannot be written.
    """
    loop = _Loop(problem, settings)
    outcome, best = loop.outcome, loop.best
    evaluations = {round(i * settings.steps / settings.evaluations) for i in range(1, settings.evaluations + 1)}
    try:
        done = 0 if checkpoint is None else loop.resume(checkpoint)
        if not done:
            loop.evaluate(0)
        with torch.random.fork_rng(devices=[loop.device.index] if loop.device.type == "cuda" else []):
            while done < settings.steps and not loop.has_stalled:
                done += 1
                loss = loop.advance(done)
                held_out = loop.evaluate(done) if done in evaluations else None
                if checkpoint is not None:
                    loop.save(checkpoint, done, now=held_out is not None)
                if progress is not None:
                    measured = {} if held_out is None else {"loss/held-out": held_out}
                    progress(Done(done, settings.steps, loss, held_out, loop.scalars | measured))
        outcome.stopped = done if done < settings.steps else None
    except _Failed as failed:
        outcome.failure = f"{failed}; the weights of step {best.step} were kept"
    except KeyboardInterrupt:
        outcome.interrupted = True
    best.restore()
    outcome.best_step = best.step
    return outcome


class _Loop:
    """A run under way.

    Attributes:
        outcome: so far.
        best: the weights to keep.
        device: where the weights are.
        scalars: what is known of the last step.
    """

    def __init__(self, problem: Problem, settings: Training):
        self.problem, self.settings = problem, settings
        self.outcome, self.best = Outcome(), BestWeights(problem.trained)
        self._parameters = {n: t for n, t in problem.trained.items() if isinstance(t, torch.nn.Parameter)}
        self.device = next(iter(self._parameters.values())).device
        self._optimiser, self._schedule = make_optimiser(list(self._parameters.values()), settings)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "float16")
        self._norms: Tensor | None = None
        self.scalars: dict[str, float] = {}
        self._fingerprint, self._saved = "", time.monotonic()

    def resume(self, checkpoint: Checkpoint) -> int:
        """Go back to where the checkpoint was written; the steps done, 0 where there is none of this very run."""
        self._fingerprint = fingerprint(checkpoint.recipe, self.settings, self.problem.trained)
        found = read_checkpoint(checkpoint.path, self._fingerprint) if checkpoint.resume else None
        if found is None:
            return 0
        tensors, run = found
        copy_into(self.problem.trained, _under("trained", tensors))
        self.best.kept, self.best.step, self.best.loss = _under("best", tensors), run["best_step"], run["best_loss"]
        restore_optimiser(self._optimiser, self._schedule, _under("optimiser", tensors), run["optimiser"])
        self._scaler.load_state_dict(run["scaler"])
        self.outcome.losses = [(step, loss) for step, loss in run["losses"]]
        self.problem.skip(run["step"] * self.settings.accumulate)
        return int(run["step"])

    def save(self, checkpoint: Checkpoint, step: int, *, now: bool) -> None:
        """Write the checkpoint, `now` or when it is due."""
        if ranks.rank() or not (now or time.monotonic() - self._saved >= CHECKPOINT_SECONDS):
            return
        parts = {
            "trained": self.problem.trained,
            "best": self.best.kept,
            "optimiser": optimiser_tensors(self._optimiser),
        }
        run = {
            "fingerprint": self._fingerprint,
            "step": step,
            "best_step": self.best.step,
            "best_loss": self.best.loss,
            "losses": self.outcome.losses,
            "optimiser": optimiser_facts(self._optimiser, self._schedule),
            "scaler": self._scaler.state_dict(),
        }
        tensors = {f"{part}/{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
        write_checkpoint(checkpoint.path, tensors, run)
        self._saved = time.monotonic()

    def advance(self, step: int) -> float:
        """Take one step; returns its loss.

        A step whose scaled gradients overflow changes no parameter. The schedule goes on: rates, like all that depends
        on time, follow from the number of the step.

        Raises:
            _Failed: the loss or a gradient is not finite; nothing was changed.
        """
        begun, terms = time.perf_counter(), dict[str, float]()
        torch.manual_seed(_SEEDS * self.settings.seed + step)
        self._optimiser.zero_grad(set_to_none=True)
        own = 0.0
        for _ in range(self.settings.accumulate):
            own += self._backward()
            for name, term in self.problem.terms.items():
                terms[name] = terms.get(name, 0.0) + term / self.settings.accumulate
        loss, *shared = self._share([own, *terms.values()])
        self._scaler.unscale_(self._optimiser)
        norm, rate, scale = self._bound(step, loss), self._rate(), self._scaler.get_scale()
        if norm is None:
            self._optimiser.zero_grad(set_to_none=True)  # without gradients the optimiser leaves all as it is
        self._optimiser.step()
        self._scaler.update()
        ranks.average([tensor for name, tensor in self.problem.trained.items() if name not in self._parameters])
        self.problem.settle(step)
        self._schedule.step()
        samples = self.settings.accumulate * self.problem.samples
        self.scalars = {"loss/all": loss} | {f"loss/{name}": term for name, term in zip(terms, shared, strict=True)}
        self.scalars |= {"rate": rate, "samples per second": samples / _seconds_since(begun)}
        self.scalars |= {} if norm is None else {"gradient norm": norm}
        self.scalars |= {"loss scale": scale} if self._scaler.is_enabled() else {}
        return loss

    def evaluate(self, step: int) -> float:
        """Measure the held-out loss, and keep the weights if they are the best so far."""
        own = self.problem.judge() if ranks.rank() == 0 else math.nan
        loss = self.best.offer(step, ranks.first_of(own))
        self.outcome.losses.append((step, loss))
        return loss

    @property
    def has_stalled(self) -> bool:
        """Whether the last `patience` evaluations brought no gain."""
        since = sum(step > self.best.step for step, _ in self.outcome.losses)
        return self.settings.patience is not None and since >= self.settings.patience

    def _backward(self) -> float:
        """Add up the gradients of one round of losses; returns their sum."""
        total, losses = 0.0, self.problem.losses()
        while True:
            with mixed(self.settings, self.device):
                loss = next(losses, None)
            if loss is None:
                return total
            if self.settings.accumulate > 1:
                loss = loss / self.settings.accumulate
            self._scaler.scale(loss).backward()
            total += loss.item()

    def _share(self, losses: list[float]) -> list[float]:
        """Average the gradients of all processes, and their losses."""
        shared = torch.tensor(losses, device=self.device)
        ranks.average([p.grad for p in self._parameters.values() if p.grad is not None] + [shared])
        return losses if ranks.count() == 1 else shared.tolist()

    def _rate(self) -> float:
        """The learning rate of this step, on the scale of `Training.rate`."""
        group = self._optimiser.param_groups[0]
        return float(self.settings.rate * group["lr"] / group.get("max_lr", group["initial_lr"]))

    def _bound(self, step: int, loss: float) -> float | None:
        """Clip the gradients, refuse what is not finite; the norm of all before it was clipped.

        None: they overflow, and may not once the loss is scaled less.
        """
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        norms = torch.stack([gradient.norm() for gradient in gradients.values()]).float()
        if not (math.isfinite(loss) and bool(norms.isfinite().all())):
            if math.isfinite(loss) and self._scaler.get_scale() > 1:
                return None
            told = norms if self._norms is None else self._norms  # those of the failed step are no numbers themselves
            norm, place = told.nan_to_num(math.inf, math.inf).max(0)
            what = f"the loss became {loss}" if not math.isfinite(loss) else "a gradient is no longer finite"
            when = "" if self._norms is None else " the step before"
            raise _Failed(
                f"{what} in step {step}; the largest gradient{when} had the norm {float(norm):.3g}, "
                f"of {list(gradients)[int(place)]!r}"
            )
        self._norms, whole = norms, float(norms.norm())
        if self.settings.clip is not None:
            scale = self.settings.clip / max(whole, self.settings.clip)
            for gradient in gradients.values():
                gradient.mul_(scale)
        return whole


_SEEDS = 1_000_003
"""Steps of two runs with neighbouring seeds draw different numbers, up to this many steps."""


def _seconds_since(begun: float) -> float:
    return max(time.perf_counter() - begun, 1e-9)


def fingerprint(recipe: str, settings: Training, start: Mapping[str, Tensor]) -> str:
    """Tells runs apart: their recipes, their settings, and what they start from."""
    digest = hashlib.sha256(f"{recipe}\n{settings}\n".encode())
    for name, tensor in start.items():
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _under(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint holds under `part`/."""
    return {name.removeprefix(f"{part}/"): t for name, t in tensors.items() if name.startswith(f"{part}/")}
