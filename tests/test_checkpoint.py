"""Checkpoints: a run that was killed and goes on ends with the very same bytes as one that never stopped."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from calibrating import INPUTS, OUTPUTS, TASKS, TEACHERS, Memory, interrupted_at, merge, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from test_cli import onnxmerge, tiny
from test_engine import Line

import onnxmerge.calibration.engine as engine
from onnxmerge.calibration.distillation import calibrate
from onnxmerge.calibration.engine import Done, Outcome, train
from onnxmerge.calibration.settings import Checkpoint, Settings, Training
from onnxmerge.data import Split
from onnxmerge.errors import UsageError


def run(merged: onnx_ir.Model, checkpoint: Checkpoint | None, kill_at: int | None = None, **given: Any) -> Outcome:
    """Calibrate on two streams; `kill_at`: end this process with SIGKILL after that step."""
    held_out = dict.fromkeys(TASKS, Split(Memory(70, 9)))
    data = {task: Split(Memory(100, seed)) for seed, task in enumerate(TASKS)}
    how = Settings(**{"steps": 40, "evaluations": 5, "threads": 1, "batch": 32} | given)

    def progress(done: Done) -> None:
        if done.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    return calibrate(merged, TEACHERS, OUTPUTS, INPUTS, [], data, held_out, how, progress, checkpoint)


WAYS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "bfloat16": {"precision": "bfloat16"},
    "float16": {"precision": "float16", "logit_weight": 300.0},  # large enough to halve the scale
    "sgd": {"optimiser": "sgd", "rate": 1e-3, "accumulate": 2, "clip": 1.0},
    "without momentum": {"optimiser": "sgd", "rate": 1e-3, "momentum": 0.0},
    "batch statistics": {"norm_statistics": "updating"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("every_step", [True, False])
def test_a_resumed_run_ends_with_the_same_bytes(
    way: str, every_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if every_step:
        monkeypatch.setattr(engine, "CHECKPOINT_SECONDS", 0)
    whole, stopped, resumed = (merge(batch_norm=way == "batch statistics") for _ in range(3))
    path = tmp_path / "run.checkpoint"
    expected = run(whole, None, **WAYS[way])

    def stop(step: int) -> None:
        if step == 23:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        real = engine._Loop.advance
        patch.setattr(engine._Loop, "advance", lambda self, step: (stop(step), real(self, step))[1])
        assert run(stopped, Checkpoint(path), **WAYS[way]).interrupted
    with safe_open(path, "pt") as file:
        assert f'"step": {22 if every_step else 16},' in file.metadata()["run"]
    assert run(resumed, Checkpoint(path, resume=True), **WAYS[way]) == expected
    assert weights(resumed) == weights(whole) != weights(stopped)


def test_a_killed_process_goes_on_where_it_was(tmp_path: Path) -> None:
    path, whole, resumed = tmp_path / "run.checkpoint", merge(), merge()
    script = (
        "import test_checkpoint as t; from pathlib import Path; "
        f"t.run(t.merge(), t.Checkpoint(Path({str(path)!r})), kill_at=29)"
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL and path.is_file()
    steps: list[int] = []
    real = engine._Loop.advance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._Loop, "advance", lambda self, step: (steps.append(step), real(self, step))[1])
        outcome = run(resumed, Checkpoint(path, resume=True))
    assert steps == list(range(25, 41))  # the last measurement before the kill was that of step 24
    assert outcome == run(whole, None) and weights(resumed) == weights(whole)


def test_a_finished_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, first, second = Checkpoint(tmp_path / "c"), merge(), merge()
    outcome = run(first, checkpoint)
    monkeypatch.setattr(engine._Loop, "advance", lambda self, step: pytest.fail("a step was taken"))
    assert run(second, Checkpoint(checkpoint.path, resume=True)) == outcome
    assert weights(first) == weights(second)


@given(
    stop=st.integers(1, 24),
    how=st.fixed_dictionaries(
        {
            "steps": st.integers(1, 24),
            "evaluations": st.integers(1, 30),
            "optimiser": st.sampled_from(["adamw", "sgd"]),
            "schedule": st.sampled_from(["one-cycle", "milestones"]),
            "milestones": st.sampled_from([(), (0.1, 0.5), (0.2, 0.25, 0.3)]),
            "momentum": st.sampled_from([0.0, 0.9]),
            "accumulate": st.integers(1, 3),
            "clip": st.sampled_from([None, 0.5]),
            "patience": st.sampled_from([None, 1, 3]),
            "rate": st.sampled_from([0.01, 0.3]),
        }
    ),
)
@settings(max_examples=60, deadline=None)
def test_any_run_stopped_anywhere_goes_on(stop: int, how: dict[str, Any]) -> None:
    training = Training(seed=5, threads=1, precision="float32", **how)

    def halt(done: Done) -> None:
        if done.step == stop:
            raise KeyboardInterrupt

    whole, stopped, resumed = Line(rounds=2), Line(rounds=2), Line(rounds=2)
    expected = train(whole, training)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c"
        train(stopped, training, halt, Checkpoint(path))
        assert train(resumed, training, None, Checkpoint(path, resume=True)) == expected
    assert torch.equal(resumed.weight, whole.weight) and torch.equal(resumed.mean, whole.mean)
    assert resumed.drawn == whole.drawn[len(whole.drawn) - len(resumed.drawn) :]


@pytest.mark.parametrize("other", ["settings", "recipe", "start", "damaged", "no checkpoint", "not asked for"])
def test_what_is_not_this_runs_checkpoint_is_not_taken(other: str, tmp_path: Path) -> None:
    path, fresh, model = tmp_path / "c", merge(), merge()
    before = merge()
    if other == "start":
        value = before.graph.initializers["b/w"]
        assert value.const_value is not None
        value.const_value = onnx_ir.tensor(value.const_value.numpy() * 1.5, name="b/w")
    run(before, Checkpoint(path, "other" if other == "recipe" else ""), seed=int(other == "settings"))
    if other == "damaged":
        path.write_bytes(path.read_bytes()[:-40])
    if other == "no checkpoint":
        path.write_text("{}")
    steps: list[int] = []
    real = engine._Loop.advance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._Loop, "advance", lambda self, step: (steps.append(step), real(self, step))[1])
        run(model, Checkpoint(path, resume=other != "not asked for"))
    run(fresh, None)
    assert steps == list(range(1, 41)) and weights(model) == weights(fresh)


def test_a_checkpoint_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone/c: cannot write the file"):
        run(merge(), Checkpoint(tmp_path / "gone" / "c"))


def test_a_checkpoint_holds_what_it_says(tmp_path: Path) -> None:
    model, path = merge(), tmp_path / "c"
    run(model, Checkpoint(path))
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        best = {name: file.get_tensor(f"best/{name}") for name in model.graph.initializers}
    assert {f"trained/{name}" for name in best} < names
    assert {name.split("/")[2] for name in names if name.startswith("optimiser/")} == {"step", "exp_avg", "exp_avg_sq"}
    for name, tensor in best.items():
        value = model.graph.initializers[name].const_value
        assert value is not None and torch.equal(tensor, torch.tensor(value.numpy()))


# --- zip and fuse -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name"), [("zip", "k02"), ("fuse", "calibrated")])
def test_resume_goes_on_within_a_candidate(method: str, name: str, tmp_path: Path) -> None:
    models = [tiny(tmp_path / f"{task}.onnx", seed) for seed, task in enumerate(TASKS)]
    np.savez(tmp_path / "samples.npz", x=np.random.default_rng(0).normal(size=(200, 1, 8, 8)).astype(np.float32))
    common = [method, *models, "--data", tmp_path / "samples.npz", "--steps", 20, "--samples", 50, "--threads", 1]
    if method == "zip":
        common += ["--share", "2"]
    assert onnxmerge(*common, "-o", tmp_path / "whole")[0] == 0
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        steps = interrupted_at(patch, 13)
        assert onnxmerge(*common, "-o", out)[0] == 130
        assert (out / f"{name}.checkpoint").is_file() and not (out / f"{name}.onnx").exists()
        assert onnxmerge(*common, "-o", out, "--resume")[0] == 0
    assert steps == [*range(1, 14), *range(13, 21)]
    assert (out / f"{name}.onnx").read_bytes() == (tmp_path / "whole" / f"{name}.onnx").read_bytes()
    assert not list(out.glob("*.checkpoint"))
