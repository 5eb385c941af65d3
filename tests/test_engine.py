"""The training loop, on problems small enough to be solved by hand-written torch."""

import itertools
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir
import pytest
import torch
from calibrating import INPUTS, Memory, network, noise, run_onnx, weights
from torch import Tensor

from onnxmerge.calibration.ahead import Ahead
from onnxmerge.calibration.distillation import calibrate
from onnxmerge.calibration.engine import Done, Outcome, train
from onnxmerge.calibration.module import GraphModule
from onnxmerge.calibration.settings import Settings, Training
from onnxmerge.data import Batch, Split
from onnxmerge.errors import UsageError
from onnxmerge.methods.calibrating import Told, remarks


class Line:
    """y = x w, towards a known w; `batches` of 8 samples each in turn."""

    def __init__(self, rounds: int = 1, scale: float = 1.0, poison: int | None = None):
        generator = torch.Generator().manual_seed(0)
        self.x = scale * torch.randn(512, 5, generator=generator)
        self.y = self.x @ torch.randn(5, generator=generator)
        self.weight = torch.nn.Parameter(torch.randn(5, generator=generator))
        self.mean = torch.zeros(3)
        self.drawn: list[float] = []
        self.settled: list[int] = []
        self._rounds, self._poison, self._number = rounds, poison, 0

    @property
    def trained(self) -> Mapping[str, Tensor]:
        return {"w": self.weight, "mean": self.mean}

    def batch(self) -> Tensor:
        rows = slice(8 * self._number % 512, 8 * self._number % 512 + 8)
        self._number += 1
        loss = (self.x[rows] @ self.weight - self.y[rows]).square().mean()
        return loss * torch.nan if self._number == self._poison else loss

    def losses(self) -> Iterator[Tensor]:
        self.drawn.append(float(torch.rand(())))
        for _ in range(self._rounds):
            yield self.batch()

    @property
    def terms(self) -> Mapping[str, float]:
        return {"line": self._number}

    @property
    def samples(self) -> int:
        return 8 * self._rounds

    def skip(self, rounds: int) -> None:
        self._number = rounds * self._rounds

    def judge(self) -> float:
        return float((self.x @ self.weight - self.y).detach().square().mean())

    def settle(self, step: int) -> None:
        self.settled.append(step)
        self.mean += 1


def settings(**given: Any) -> Training:
    return Training(**{"steps": 30, "evaluations": 3, "threads": 1, "precision": "float32", "rate": 0.05} | given)


SGD = {"optimiser": "sgd", "rate": 0.02}


def test_a_problem_is_trained_and_settled_after_every_step() -> None:
    line, told = Line(), []
    outcome = train(line, settings(rate=0.2), told.append)
    assert line.settled == list(range(1, 31)) and outcome.failure is None
    assert outcome.losses[-1][1] < 0.5 * outcome.losses[0][1]
    assert [done.step for done in told] == line.settled and all(done.loss > 0 for done in told)
    assert [(d.step, d.held_out) for d in told if d.held_out is not None] == outcome.losses[1:]


def test_what_is_only_kept_goes_back_with_the_weights() -> None:
    line = Line(scale=3.0)
    outcome = train(line, settings(**SGD | {"rate": 10.0}))
    assert outcome.best_step == 0 and bool((line.mean == 0).all())


def test_every_step_has_its_own_random_numbers_and_the_users_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    first, second, other = Line(), Line(), Line()
    train(first, settings())
    train(second, settings())
    train(other, settings(seed=1))
    assert first.drawn == second.drawn and len(set(first.drawn)) == 30 and not set(first.drawn) & set(other.drawn)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("given", "make", "schedule"),
    [
        (
            {"optimiser": "sgd", "rate": 0.002, "milestones": (0.5, 0.75), "gamma": 0.1},
            lambda p: torch.optim.SGD(p, 0.002, momentum=0.9, weight_decay=5e-4),
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [15, 22], 0.1),
        ),
        (
            {"optimiser": "sgd", "rate": 0.02, "milestones": (), "momentum": 0.5, "weight_decay": 0.0},
            lambda p: torch.optim.SGD(p, 0.02, momentum=0.5),
            lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
        ),
        (
            {"rate": 0.05, "relative_rate": False, "schedule": "milestones", "milestones": (0.2,), "weight_decay": 0.1},
            lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [6], 0.5),
        ),
        (
            {"rate": 0.05, "relative_rate": False},
            lambda p: torch.optim.AdamW(p, 0.05),
            lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=30),
        ),
    ],
    ids=["milestones", "constant", "adamw in steps", "one cycle"],
)
def test_optimisers_and_schedules_are_those_of_torch(given: dict[str, Any], make: Any, schedule: Any) -> None:
    ours, theirs = Line(), Line()
    outcome = train(ours, settings(**given))
    assert outcome.best_step == 30
    optimiser = make([theirs.weight])
    rates = schedule(optimiser)
    for _ in range(30):
        optimiser.zero_grad()
        theirs.batch().backward()
        optimiser.step()
        rates.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-6, atol=1e-7)


def test_accumulated_batches_count_as_one_large_batch() -> None:
    accumulated, large = Line(), Line()
    train(accumulated, settings(accumulate=4, **SGD))

    def four() -> Iterator[Tensor]:
        yield torch.stack([Line.batch(large) for _ in range(4)]).mean()

    large.losses = four  # type: ignore[method-assign]
    train(large, settings(**SGD))
    torch.testing.assert_close(accumulated.weight, large.weight)


def test_gradients_are_clipped_to_a_norm() -> None:
    clipped, small = Line(), Line()
    start = clipped.weight.detach().clone()
    how = SGD | {"momentum": 0.0, "weight_decay": 0.0, "steps": 1, "evaluations": 1}
    train(clipped, settings(clip=0.01, **how))
    assert float((clipped.weight - start).detach().norm()) == pytest.approx(0.02 * 0.01, rel=1e-3)
    train(small, settings(clip=1e6, **how))
    other = Line()
    train(other, settings(**how))
    assert torch.equal(small.weight, other.weight)


def test_patience_ends_a_run_that_gains_nothing() -> None:
    line, told = Line(), []
    outcome = train(
        line, settings(steps=100, evaluations=10, patience=2, **SGD | {"rate": 10.0, "clip": 1.0}), told.append
    )
    assert outcome.best_step == 0 and outcome.stopped == 20 and len(told) == 20
    assert [step for step, _ in outcome.losses] == [0, 10, 20]


@pytest.mark.parametrize(("poison", "when"), [(1, ""), (25, " the step before")])
def test_a_loss_that_is_no_number_ends_the_run_before_the_step_is_taken(poison: int, when: str) -> None:
    line = Line(poison=poison)
    outcome = train(line, settings())
    last = 10 * ((poison - 1) // 10)
    assert outcome.best_step == last and line.settled == list(range(1, poison)) and bool(line.weight.isfinite().all())
    assert outcome.failure is not None
    assert outcome.failure.startswith(f"the loss became nan in step {poison}; the largest gradient{when} had the norm ")
    assert outcome.failure.endswith(f", of 'w'; the weights of step {last} were kept")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"accumulate": 0}, "accumulate must be at least 1, not 0"),
        ({"clip": 0.0}, r"clip must be above 0, not 0\.0"),
        ({"clip": float("nan")}, "clip must be above 0, not nan"),
        ({"patience": 0}, "patience must be at least 1, not 0"),
        ({"momentum": 1.0}, r"momentum must be at least 0 and less than 1, not 1\.0"),
        ({"milestones": (0.5, 2)}, r"milestones must be shares of the run, between 0 and 1, not \(0\.5, 2\)"),
        ({"schedule": "cosine"}, "schedule must be one-cycle or milestones, not 'cosine'"),
        ({"norm_statistics": "batch"}, "norm_statistics must be frozen or updating, not 'batch'"),
        ({"weight_decay": -1.0}, r"weight_decay must be at least 0, not -1\.0"),
    ],
)
def test_settings_that_cannot_work(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings(**given)


# --- batch norms that follow the data ---------------------------------------------------------------------------------


def alone(model: onnx_ir.Model, samples: Memory, **given: Any) -> list[tuple[int, float]]:
    return alone_outcome(model, samples, **given).losses


def alone_outcome(model: onnx_ir.Model, samples: Memory, **given: Any) -> Outcome:
    split = Split(samples)
    how = Settings(**{"steps": 12, "batch": 32, "evaluations": 1, "threads": 1, "precision": "float32"} | given)
    names = {"t": {"y": "y"}}
    return calibrate(model, {"t": network(3)}, names, {"t": INPUTS["a"]}, [], {"t": split}, {"t": split}, how)


LABELS = {"kl_weight": 0.0, "logit_weight": 0.0, "label_weight": 1.0}


def test_updating_statistics_are_those_of_torchs_batch_norm() -> None:
    model, samples = network(10, batch_norm=True), Memory(256, 1)
    arrays = {n: torch.tensor(v.const_value.numpy()) for n, v in model.graph.initializers.items() if v.const_value}
    conv, norm, dense = torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(64, 3)
    own = torch.nn.Sequential(conv, norm, torch.nn.ReLU(), torch.nn.Flatten(), dense)
    places = {
        "conv.weight": conv.weight, "conv.bias": conv.bias, "scale": norm.weight, "shift": norm.bias,
        "mean": norm.running_mean, "variance": norm.running_var, "b": dense.bias,
    }  # fmt: skip
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(arrays[name])
        dense.weight.copy_(arrays["w"].T)
    alone(model, samples, norm_statistics="updating", optimiser="sgd", rate=0.01, milestones=(), **LABELS)
    optimiser = torch.optim.SGD(own.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    batches = Split(samples).shuffled(32, 0)
    for _ in range(12):
        batch = next(batches)
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(own(torch.tensor(batch.inputs["x"])), torch.tensor(batch.labels))
        loss.backward()
        optimiser.step()
    own.eval()
    (ours,) = run_onnx(onnx_ir.to_proto(model), {"x": samples.x})
    np.testing.assert_allclose(ours, own(torch.tensor(samples.x)).detach().numpy(), rtol=0, atol=1e-4)
    for name, place in places.items():
        value = model.graph.initializers[name].const_value
        assert value is not None and not np.array_equal(value.numpy(), arrays[name].numpy())
        np.testing.assert_allclose(value.numpy(), place.detach().numpy(), rtol=0, atol=1e-5)


def test_the_held_out_loss_is_that_of_the_running_statistics() -> None:
    model, samples = network(10, batch_norm=True), Memory(256, 1)
    losses = alone(model, samples, norm_statistics="updating", **LABELS)
    (logits,) = run_onnx(onnx_ir.to_proto(model), {"x": samples.x})
    shown = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert min(loss for _, loss in losses) == pytest.approx(-shown[np.arange(256), samples.labels].mean(), rel=1e-4)


# --- labels that are numbers ------------------------------------------------------------------------------------------


class Numbers(Memory):
    """Samples whose labels are what a network of its own makes of them."""

    def __init__(self, count: int, seed: int, shape: tuple[int, ...] = (3,)):
        super().__init__(count, seed)
        (wanted,) = run_onnx(onnx_ir.to_proto(network(77)), {"x": self.x})
        self.labels = wanted.reshape(count, *shape)

    def read(self, rows: np.ndarray) -> Batch:
        assert self.labels is not None
        return Batch({"x": self.x[rows]}, self.labels[rows])


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_labels_that_are_numbers_are_matched_by_the_output(shape: tuple[int, ...]) -> None:
    model, samples = network(10), Numbers(256, 1, shape)
    losses = alone(model, samples, steps=200, rate=0.05, **LABELS)
    (found,) = run_onnx(onnx_ir.to_proto(model), {"x": samples.x})
    assert samples.labels is not None
    error = float(np.square(found - samples.labels.reshape(found.shape)).mean())
    assert error == pytest.approx(min(loss for _, loss in losses), rel=1e-4)
    assert error < 0.3 * losses[0][1]


def test_numbers_are_matched_behind_a_softmax_and_classes_before_it() -> None:
    model, samples = network(10, softmax=True), Numbers(64, 1)
    samples.labels = np.full((64, 3), 1 / 3, np.float32)
    (before,) = run_onnx(onnx_ir.to_proto(model), {"x": samples.x})
    losses = alone(model, samples, steps=1, **LABELS)
    assert losses[0][1] == pytest.approx(float(np.square(before - 1 / 3).mean()), rel=1e-4)


def test_numbers_of_another_shape_are_refused() -> None:
    samples = Numbers(64, 1)
    samples.labels = noise(64, 4)
    with pytest.raises(UsageError, match=r"labels of task 't' are numbers of shape \[4\] for each .* has \[3\]"):
        alone(network(10), samples, **LABELS)
    assert weights(network(10)) and GraphModule(network(10)).statistics() == {}


def test_progress_is_told_of_losses() -> None:
    told: list[Done] = []
    train(Line(), settings(steps=4, evaluations=2), told.append)
    assert [done.held_out is not None for done in told] == [False, True, False, True]


# --- reading ahead ----------------------------------------------------------------------------------------------------


def test_what_is_read_ahead_comes_in_order_and_ends() -> None:
    items = Ahead(iter(range(50)))
    assert list(items) == list(range(50)) and list(items) == []
    items.close()


def test_a_fault_in_reading_comes_out_where_the_item_was_due() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise UsageError("a sample cannot be read")

    items = Ahead(broken())
    assert next(items) == 1
    for _ in range(2):
        with pytest.raises(UsageError, match="a sample cannot be read"):
            next(items)
    items.close()


def test_closing_ends_the_thread_and_no_more_is_read_than_needed() -> None:
    drawn: list[int] = []

    def endless() -> Iterator[int]:
        for number in itertools.count():
            drawn.append(number)
            yield number

    before = threading.active_count()
    items = Ahead(endless())
    assert next(items) == 0
    items.close()
    assert threading.active_count() == before and len(drawn) <= 4


def test_waiting_for_slow_samples_is_measured_and_told() -> None:
    class Slow(Memory):
        def read(self, rows: np.ndarray) -> Batch:
            time.sleep(0.1)
            return super().read(rows)

    slow, fast = (alone_outcome(network(10), samples(64, 1), steps=10, batch=64) for samples in (Slow, Memory))
    assert slow.waited > 0.3 and slow.waited > fast.waited
    assert remarks("k01", Outcome(waited=0.1)) == []
    (remark,) = remarks("k01", slow)
    assert remark.startswith("The calibration of k01 waited for samples ")


def test_progress_says_loss_and_speed() -> None:
    class Line:
        notes: ClassVar[list[str]] = []

        def stage(self, name: str, total: int | None = None) -> None: ...

        def advance(self, note: str = "") -> None:
            self.notes.append(note)

        def measured(self, step: int, scalars: Mapping[str, float]) -> None: ...

    tell = Told(Line())
    tell(Done(3, 5, 0.5, None))
    tell(Done(4, 5, 0.25, 0.125))
    assert Line.notes[:2] == ["", ""] and Line.notes[2].startswith("loss 0.5000, ")  # two steps were taken before
    assert Line.notes[3].startswith("loss 0.2500, held-out loss 0.1250, ") and Line.notes[3].endswith(" steps/s")
