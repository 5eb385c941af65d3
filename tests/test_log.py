"""`--tensorboard`: TensorBoard's own reader finds what every step came to."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from calibrating import interrupted_at, merge
from calibrating import train as calibrate_small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_calibrate import TASKS, calibrate, work
from test_cli import onnxmerge
from test_distributed import arguments_for, torchrun
from test_engine import Line

from onnxmerge.calibration.engine import Done, train
from onnxmerge.calibration.log import Log
from onnxmerge.calibration.objective import FeatureTap
from onnxmerge.calibration.settings import Training
from onnxmerge.errors import UsageError

__all__ = ["work"]  # a fixture


def read(folder: Path) -> dict[str, dict[int, float]]:
    """Every scalar that TensorBoard shows of a training, by step."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


def by_step(steps: int, problem: Line | None = None, **how: Any) -> list[Done]:
    told: list[Done] = []
    train(problem or Line(), Training(steps, threads=1, precision="float32", **how), told.append)
    return told


# --- what a step says


def test_scalars_are_those_of_the_step() -> None:
    problem = Line(rounds=2)
    first = by_step(1, problem, optimiser="sgd", rate=0.5, accumulate=3, clip=1e-3)[0].scalars
    fresh = Line(rounds=2)
    loss = sum(fresh.batch() / 3 for _ in range(6))
    loss.backward()
    assert fresh.weight.grad is not None
    assert first["loss/all"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["gradient norm"] == pytest.approx(float(fresh.weight.grad.norm()), rel=1e-5)  # before it is clipped
    assert first["loss/line"] == pytest.approx((2 + 4 + 6) / 3)  # the mean of what the rounds told
    assert first["rate"] == 0.5 and first["samples per second"] > 0
    assert first["loss/held-out"] == pytest.approx(problem.judge())


@pytest.mark.parametrize("relative", [True, False])
def test_the_rate_is_on_the_scale_of_the_settings(relative: bool) -> None:
    rates = [own.scalars["rate"] for own in by_step(40, rate=0.02, relative_rate=relative)]
    assert max(rates) == pytest.approx(0.02, rel=1e-2) and rates[0] == pytest.approx(0.02 / 25) and rates[-1] < 1e-5
    halved = [own.scalars["rate"] for own in by_step(12, rate=0.02, optimiser="sgd", relative_rate=relative)]
    assert halved == pytest.approx([0.02 * 0.5 ** (step // 2) for step in range(12)])


def test_the_parts_of_a_loss_are_its_sum() -> None:
    told: list[Done] = []
    how = {"label_weight": 0.7, "kl_weight": 0.3, "steps": 4, "accumulate": 2, "one_split": False}
    taps = [FeatureTap("b", "r", "r")]
    calibrate_small(merge(), progress=told.append, taps=taps, **how)
    for done in told:
        parts = {name: value for name, value in done.scalars.items() if name.count("/") == 2}
        names = {f"loss/{task}/{name}" for task in "ab" for name in ("outputs", "kl", "labels")}
        assert set(parts) == names | {"loss/b/features"}
        assert sum(parts.values()) == pytest.approx(done.loss, rel=1e-5) and parts["loss/b/kl"] > 0


# --- the log ----------------------------------------------------------------------------------------------------------


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    log = Log(tmp_path / "deep/log")
    log.begin("k02, /conv1/Conv: calibrate")
    log.write(1, {"loss/all": 0.5, "rate": 0.25})
    log.begin("k03")
    log.write(1, {"loss/all": 2.0})
    log.close()
    first, second = (read(tmp_path / "deep/log" / name) for name in ("k02,-conv1-Conv-calibrate", "k03"))
    assert first == {"loss/all": {1: 0.5}, "rate": {1: 0.25}} and second == {"loss/all": {1: 2.0}}


def test_what_is_run_again_replaces_what_came_later(tmp_path: Path) -> None:
    for values, start in (([1.0, 2.0, 3.0, 4.0], 1), ([30.0, 40.0], 3)):
        log = Log(tmp_path)
        log.begin("calibrate")
        for step, value in enumerate(values, start):
            log.write(step, {"loss/all": value})
        log.close()
    assert read(tmp_path / "calibrate")["loss/all"] == {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0}


def test_no_tensorboard_is_a_sentence(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, stderr = calibrate(work, "-o", tmp_path / "out", "--tensorboard", tmp_path / "log")
    assert (
        code == 2
        and "a log needs the package tensorboard; install it with: pip install 'onnxmerge[tensorboard]'" in stderr
    )
    assert not (tmp_path / "out").exists() and not (tmp_path / "log").exists()


def test_a_log_that_cannot_be_written_is_a_sentence(work: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, _, stderr = calibrate(work, "-o", tmp_path / "out", "--tensorboard", tmp_path / "file")
    assert code == 2 and f"{tmp_path}/file: cannot write the log: File exists" in stderr
    (tmp_path / "log").mkdir()
    (tmp_path / "log/calibrate").touch()
    code, _, stderr = calibrate(work, "-o", tmp_path / "out", "--tensorboard", tmp_path / "log")
    assert code == 2 and f"{tmp_path}/log: cannot write the log: " in stderr
    log = Log(tmp_path / "log")
    with pytest.raises(UsageError, match="cannot write the log"):
        log.begin("calibrate")
        log.write(1, {"loss": 1.0})


# --- commands ---------------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_goes_on_in_its_log(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = interrupted_at(monkeypatch, 14)
    common = ["-o", tmp_path / "out", "--tensorboard", tmp_path / "log"]
    assert calibrate(work, *common)[0] == 130
    assert max(read(tmp_path / "log/calibrate")["loss/all"]) == 13
    code, stdout, _ = calibrate(work, *common, "--resume", "--json")
    assert code == 0 and steps[14] == 13  # the checkpoint is that of step 12
    found = read(tmp_path / "log/calibrate")
    for name in ("loss/all", "rate", "gradient norm", "samples per second", "loss/a/outputs", "loss/b/kl"):
        assert sorted(found[name]) == list(range(1, 41))
    reported = dict(json.loads(stdout)["candidates"][1]["losses"])
    assert found["loss/held-out"] == pytest.approx({step: reported[step] for step in range(4, 41, 4)})
    assert calibrate(work, "-o", tmp_path / "plain")[0] == 0  # a log changes nothing
    assert (tmp_path / "out/merged.onnx").read_bytes() == (tmp_path / "plain/merged.onnx").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "more", "trainings"),
    [
        ("zip", ["--samples", 50], {"k01-calibrate", "k02-calibrate"}),
        ("fuse", ["--samples", 50], {"calibrate"}),
        ("gate", ["--gate-steps", 6], {"learn-the-gates", "fine-tune"}),
    ],
)
def test_every_method_logs_each_training(
    method: str, more: list[object], trainings: set[str], work: Path, tmp_path: Path
) -> None:
    models = [work / f"{task}.onnx" for task in TASKS]
    more = [*more, "--steps", 6, "--threads", 1, "-o", tmp_path / "out", "--tensorboard", tmp_path / "log"]
    assert onnxmerge(method, *models, "--data", work / "samples.npz", *more)[0] in (0, 1)
    assert {folder.name for folder in (tmp_path / "log").iterdir()} == trainings
    for name in trainings:
        told = read(tmp_path / "log" / name)
        assert sorted(told["loss/all"]) == list(range(1, 7))
        assert ("loss/half" in told) == (name == "learn-the-gates")


@pytest.mark.slow
def test_of_several_processes_the_first_logs_what_all_did(work: Path, tmp_path: Path) -> None:
    found = []
    for count in (1, 2):
        more = ["-o", tmp_path / f"out{count}", "--tensorboard", tmp_path / f"log{count}", "--quiet"]
        more += ["--precision", "float32"]
        done = torchrun(*arguments_for(work, *more, steps=6), processes=count)
        assert done.returncode == 0, done.stderr
        assert len(list((tmp_path / f"log{count}").rglob("events*"))) == 1
        found.append(read(tmp_path / f"log{count}/calibrate"))
    for name in set(found[0]) - {"samples per second"}:
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-4)
