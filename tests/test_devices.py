"""Training on another device than the CPU, and in float16."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from calibrating import interrupted_at, merge, train, weights
from elsewhere import ELSEWHERE, Elsewhere
from gating import wide
from test_calibrate import calibrate, work
from test_checkpoint import run
from test_cli import onnxmerge
from test_distributed import losses_of, torchrun
from test_engine import Line, settings
from test_gate_learning import LABELS, MEAN, source
from torch import Tensor

import onnxmerge as package
import onnxmerge.calibration.devices as devices
import onnxmerge.calibration.distillation as distillation
import onnxmerge.calibration.engine as engine
import onnxmerge.calibration.gating as gating
import onnxmerge.calibration.objective as objective
from onnxmerge.calibration import ranks
from onnxmerge.calibration.engine import Done
from onnxmerge.calibration.engine import train as train_problem
from onnxmerge.calibration.gating import fine_tune, learn_gates
from onnxmerge.calibration.objective import FeatureTap
from onnxmerge.calibration.operators import OPERATORS
from onnxmerge.calibration.settings import Checkpoint, Precision, Settings, Training
from onnxmerge.errors import UsageError
from onnxmerge.methods.zip.choices import Start

__all__ = ["work"]  # a fixture


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Training goes to the device of `Elsewhere`, and leaves nothing behind on the CPU that it needs."""
    with pytest.MonkeyPatch.context() as patch, Elsewhere():
        for module in (distillation, gating, objective):
            patch.setattr(module, "chosen_device", lambda wanted: ELSEWHERE)
        for module in (distillation, engine):  # which has no autocast
            patch.setattr(module, "mixed", lambda settings, device: contextlib.nullcontext())
        yield


WAYS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "two streams": {"one_split": False},
    "sgd": {"optimiser": "sgd", "rate": 1e-3, "accumulate": 2, "clip": 1.0},
    "batch statistics": {"norm_statistics": "updating"},
    "labels": {"label_weight": 1.0},
    "features": {"taps": [FeatureTap("b", "r", "r", np.array([2, 0, 3, 1]))]},
    "remembered": {"taps": [FeatureTap("b", "r", "r", np.array([2, 0, 3, 1]))], "cache_bytes": 10**7},
}


@pytest.mark.parametrize("way", WAYS)
def test_training_elsewhere_ends_with_the_same_bytes(way: str) -> None:
    here, there = (merge(batch_norm=way == "batch statistics") for _ in range(2))
    given = {"steps": 30, "precision": "float32"} | WAYS[way]
    expected, _ = train(here, **given)
    with elsewhere():
        outcome, _ = train(there, **given)
    assert outcome == expected and expected.best_step and weights(there) == weights(here)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_resumed_run_elsewhere_ends_with_the_same_bytes(precision: str, tmp_path: Path) -> None:
    how = {"precision": precision, "steps": 20}
    whole, stopped, resumed = (merge() for _ in range(3))
    path = tmp_path / "c"
    with elsewhere():
        expected = run(whole, None, **how)
        with pytest.MonkeyPatch.context() as patch:
            interrupted_at(patch, 11)
            assert run(stopped, Checkpoint(path), **how).interrupted
        assert run(resumed, Checkpoint(path, resume=True), **how) == expected
    assert weights(resumed) == weights(whole) != weights(stopped)


@pytest.mark.parametrize("given", [LABELS, MEAN], ids=["labels", "mean"])
def test_gates_elsewhere_are_the_same(given: Settings) -> None:
    how = replace(given, precision="float32", steps=6, evaluations=2)

    def learned() -> list[np.ndarray]:
        own = wide("residual")
        found = learn_gates(own.model, own.places, [source(own, "residual", 5)], how)
        fine_tune(own.model, [source(own, "residual", 5)], how)
        return [found.log_alpha, found.gates, *(v.const_value.numpy() for v in own.model.graph.initializers.values())]

    expected = learned()
    with elsewhere():
        found = learned()
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


# --- float16 ----------------------------------------------------------------------------------------------------------


class Half(Line):
    """Its gradients pass through float16, so those above 65504 once they are scaled are infinite."""

    def batch(self) -> Tensor:
        weight = self.weight
        self.weight = weight.half().float()  # type: ignore[assignment]
        loss = super().batch()
        self.weight = weight
        return loss


def by_step(problem: Line, **given: Any) -> list[tuple[Mapping[str, float], Tensor]]:
    """What is told of every step, and the weights after it."""
    told: list[tuple[Mapping[str, float], Tensor]] = []
    kept = lambda done: told.append((done.scalars, problem.weight.detach().clone()))  # noqa: E731
    train_problem(problem, settings(**{"precision": "float16"} | given), kept)
    return told


def test_a_step_whose_scaled_gradients_overflow_is_skipped_and_the_scale_halved() -> None:
    problem = Half(scale=30.0)
    before, scale = problem.weight.detach().clone(), 2.0**16
    told = by_step(problem, relative_rate=False)
    skipped = ["gradient norm" not in scalars for scalars, _ in told]
    assert all(skipped[:5]) and 5 < sum(skipped) < 20
    for (scalars, weight), was_skipped in zip(told, skipped, strict=True):
        assert scalars["loss scale"] == scale and torch.equal(weight, before) == was_skipped
        before, scale = weight, scale / 2 if was_skipped else scale
    assert problem.settled == list(range(1, 31))
    plain = by_step(Line(scale=30.0), relative_rate=False, precision="float32")
    assert [own["rate"] for own, _ in told] == [own["rate"] for own, _ in plain]  # the schedule goes on
    assert "loss scale" not in plain[0][0]


@pytest.mark.parametrize("clip", [None, 1e-2])
def test_gradients_are_told_and_clipped_as_if_the_loss_were_not_scaled(clip: float | None) -> None:
    given = {"clip": clip, "optimiser": "sgd", "rate": 1.0, "momentum": 0.0, "accumulate": 2}
    start = Line().weight.detach()
    scaled, plain = (by_step(Line(scale=0.1), precision=own, **given) for own in ("float16", "float32"))
    for (ours, weight), (theirs, expected) in zip(scaled, plain, strict=True):
        assert ours["gradient norm"] == pytest.approx(theirs["gradient norm"], rel=0.01)
        assert float((weight - expected).norm()) < 0.01 * float((expected - start).norm())


def test_gradients_that_are_never_finite_end_the_run() -> None:
    problem = Line()
    problem.weight.register_hook(lambda gradient: gradient * torch.inf)
    outcome = train_problem(problem, settings(precision="float16"))
    assert outcome.failure is not None and "a gradient is no longer finite in step 17" in outcome.failure
    assert problem.settled == list(range(1, 17)) and bool(problem.weight.isfinite().all())


def test_a_loss_that_is_no_number_ends_the_run_whatever_the_scale() -> None:
    outcome = train_problem(Line(poison=4), settings(precision="float16"))
    assert outcome.failure is not None and outcome.failure.startswith("the loss became nan in step 4;")


def test_the_checkpoint_keeps_the_scale(tmp_path: Path) -> None:
    whole, stopped, resumed = (Half(scale=30.0) for _ in range(3))
    how, path = settings(precision="float16", relative_rate=False), tmp_path / "c"
    expected = train_problem(whole, how)
    with pytest.MonkeyPatch.context() as patch:
        interrupted_at(patch, 14)
        assert train_problem(stopped, how, None, Checkpoint(path)).interrupted
    told: list[Done] = []
    assert train_problem(resumed, how, told.append, Checkpoint(path, resume=True)) == expected
    assert told[0].step == 11 and told[0].scalars["loss scale"] < 2.0**16
    assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_learns_what_float32_learns(precision: str) -> None:
    half, full = (train(merge(), precision=own, steps=30)[0] for own in (precision, "float32"))
    assert half.losses != full.losses
    np.testing.assert_allclose([loss for _, loss in half.losses], [loss for _, loss in full.losses], rtol=0.05)


def test_the_precision_is_an_option(work: Path, tmp_path: Path) -> None:
    found = {}
    for own in get_args(Precision):
        code, stdout, stderr = calibrate(work, "-o", tmp_path / own, "--precision", own, "--json")
        assert code == 0, stderr
        found[own] = losses_of(stdout)
    assert found["float16"] != found["float32"] != found["bfloat16"]
    for half in ("bfloat16", "float16"):
        assert found[half][-1] == pytest.approx(found["float32"][-1], rel=0.05)
    assert calibrate(work, "-o", tmp_path / "no", "--precision", "half")[0] == 2


# --- which device -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "wanted", "process", "expected"),
    [
        (0, None, None, "cpu"),
        (0, "cpu", None, "cpu"),
        (0, "cuda", None, "--device cuda: torch finds no GPU"),
        (2, None, None, "cuda:0"),
        (2, "cpu", "1", "cpu"),
        (2, "cuda", "1", "cuda:1"),
        (2, None, "2", r"more processes than GPUs \(2\); start as many as these, or add --device cpu"),
    ],
)
def test_each_process_has_a_gpu_of_its_own(
    gpus: int, wanted: Any, process: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if process is not None:
        monkeypatch.setenv("LOCAL_RANK", process)
    if expected.startswith(("cpu", "cuda")):
        assert str(devices.chosen_device(wanted)) == expected
    else:
        with pytest.raises(UsageError, match=expected):
            devices.chosen_device(wanted)


def test_gpus_exchange_through_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    monkeypatch.setattr(ranks.dist, "init_process_group", told.append)
    monkeypatch.setattr(ranks.dist, "destroy_process_group", lambda: None)
    with ranks.joined("cuda"):
        assert told == [torch.device("cuda:1"), "cpu:gloo,cuda:nccl"]
    told.clear()
    with ranks.joined("cpu"):
        assert told == ["gloo"]


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float32", None), ("bfloat16", torch.bfloat16), ("float16", torch.float16), (None, torch.bfloat16)],
)
def test_precisions_are_those_of_autocast(precision: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: True)
    with devices.mixed(Training(1, precision=precision), torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (dtype or torch.float32)
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: False)
    with devices.mixed(Training(1), torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize("given", [{"precision": "half"}, {"device": "gpu"}])
def test_no_such_precision_or_device(given: dict[str, Any]) -> None:
    name = next(iter(given))
    with pytest.raises(UsageError, match=f"calibration: {name} must be .* or .*, not "):
        Training(1, **given)


def test_a_gpu_with_too_little_memory_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*given: Any) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(OPERATORS, "Relu", out_of_memory)
    with pytest.raises(UsageError, match="the GPU has too little memory to train on; smaller batches need less"):
        train(merge())


@pytest.mark.parametrize("command", ["calibrate", "zip", "fuse", "gate"])
def test_a_gpu_that_is_not_there_is_told_before_anything_is_read(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    more = ["--teacher", "absent.onnx"] if command == "calibrate" else ["absent.onnx"]
    code, _, stderr = onnxmerge(command, "absent.onnx", *more, "-o", tmp_path / "out", "--device", "cuda")
    assert code == 2 and stderr.splitlines() == ["onnxmerge: error: --device cuda: torch finds no GPU"]
    assert onnxmerge(command, "absent.onnx", *more, "-o", tmp_path / "out", "--device", "gpu")[0] == 2


# --- the networks that ship with the package --------------------------------------------------------------------------

DEMO = Path(package.__file__).parent / "demo"
DEMO_TASKS = ("digits", "fashion")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch does not find two GPUs")


@pytest.fixture(scope="module")
def zipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both networks in one, all hidden layers shared, not trained."""
    folder = tmp_path_factory.mktemp("demo")
    models, data = ([DEMO / f"{task}.{kind}" for task in DEMO_TASKS] for kind in ("onnx", "yaml"))
    how = package.ZipSettings(
        share="5", steps=0, samples=500, start=(Start.KEEP,), max_drop=None, measure=False, threads=1
    )
    package.zip_models(models, dict(zip(DEMO_TASKS, data, strict=True)), folder / "zipped", settings=how)
    return folder / "zipped/merged.onnx"


def options_for(model: Path, output: Path, *more: object) -> list[object]:
    given: list[object] = ["calibrate", model, "-o", output, "--json", "--threads", 1, "--evaluations", 2]
    for task in DEMO_TASKS:
        given += ["--teacher", DEMO / f"{task}.onnx", "--data", f"{task}={DEMO / task}.yaml"]
    return [*given, "--steps", 20, *more]


def losses(model: Path, output: Path, *more: object) -> list[float]:
    """The held-out losses of a calibration."""
    code, stdout, stderr = onnxmerge(*options_for(model, output, *more))
    assert code == 0, stderr
    return losses_of(stdout)


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_learns_what_a_cpu_learns(zipped: Path, tmp_path: Path) -> None:
    expected = losses(zipped, tmp_path / "cpu", "--precision", "float32", "--device", "cpu")
    found = losses(zipped, tmp_path / "cuda", "--precision", "float32", "--device", "cuda")
    assert found == pytest.approx(expected, rel=1e-3) and found != expected
    for half in ("bfloat16", "float16"):
        found = losses(zipped, tmp_path / half, "--precision", half, "--device", "cuda")
        assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_resumed_run_on_a_gpu_ends_with_the_same_bytes(precision: str, tmp_path: Path) -> None:
    whole, stopped, resumed = (merge() for _ in range(3))
    how, path = {"precision": precision, "device": "cuda"}, tmp_path / "c"
    expected = run(whole, None, **how)
    with pytest.MonkeyPatch.context() as patch:
        interrupted_at(patch, 19)
        assert run(stopped, Checkpoint(path), **how).interrupted
    assert run(resumed, Checkpoint(path, resume=True), **how) == expected
    assert weights(resumed) == weights(whole) != weights(stopped)


@pytest.mark.gpu
@needs_gpu
def test_gates_are_learned_on_a_gpu() -> None:
    own = wide("residual")
    found = learn_gates(own.model, own.places, [source(own, "residual", 5)], replace(LABELS, device="cuda"))
    assert found.outcome.failure is None and np.isfinite(found.gates).all()


@pytest.mark.gpu
@needs_gpus
def test_two_gpus_have_the_loss_curve_of_one(zipped: Path, tmp_path: Path) -> None:
    more = ("--precision", "float32", "--device", "cuda")
    together = torchrun(*options_for(zipped, tmp_path / "two", *more))
    assert together.returncode == 0, together.stderr
    assert losses_of(together.stdout) == pytest.approx(losses(zipped, tmp_path / "one", *more), rel=1e-3)
