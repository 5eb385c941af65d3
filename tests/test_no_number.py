"""A loss that becomes NaN in several processes, and in gate: the step, the array and its gradient are named."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import dense
from test_calibrate import work
from test_distributed import arguments_for, torchrun

import onnxmerge
import onnxmerge.calibration.engine as engine
from onnxmerge.errors import UsageError
from onnxmerge.report.schema import Result

__all__ = ["work"]  # a fixture
POISON = """
import os
import torch
import onnxmerge.calibration.engine as engine
from onnxmerge.cli import main
real, calls = engine._Loop._backward, []
def backward(self):
    loss = real(self)
    calls.append(1)
    if len(calls) == {step} and os.environ["RANK"] == "1":
        {poison}
    return loss
engine._Loop._backward = backward
main()
"""
POISONS = {
    "the loss became nan": "loss = float('nan')",
    "a gradient is no longer finite": "next(iter(self._parameters.values())).grad.fill_(torch.inf)",
}
LARGEST = r"the largest gradient the step before had the norm [0-9.e+-]+, of '[^']+'; the weights of step {step} were"


@pytest.mark.slow
@pytest.mark.parametrize("what", POISONS)
def test_of_several_processes_one(what: str, work: Path, tmp_path: Path) -> None:
    script = tmp_path / "poisoned.py"
    script.write_text(POISON.format(step=17, poison=POISONS[what]))
    ended = torchrun(*arguments_for(work, "-o", tmp_path / "out", "--json"), script=script)
    assert ended.returncode == 0, ended.stderr
    (note,) = json.loads(ended.stdout)["notes"][:1]
    assert note.startswith(f"The calibration of the model ended early: {what} in step 17; ")
    assert re.search(LARGEST.format(step=15), note)
    assert (tmp_path / "out/merged.onnx").is_file() and not list((tmp_path / "out").glob("*.checkpoint"))


@pytest.mark.slow
def test_of_several_processes_one_before_anything_was_learned(work: Path, tmp_path: Path) -> None:
    script = tmp_path / "poisoned.py"
    script.write_text(POISON.format(step=1, poison="loss = float('nan')"))
    ended = torchrun(*arguments_for(work, "-o", tmp_path / "out"), script=script)
    assert ended.returncode != 0
    assert (
        "onnxmerge: error: nothing was learned, so nothing was written: the loss became nan in step 1" in ended.stderr
    )
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("at", "name"), [(8, "pruned"), (19, "student")])
def test_in_gate(at: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = gated_with_a_loss_that_is_no_number(at, tmp_path, monkeypatch)
    steps = {"pruned": 8, "student": 7}
    (note,) = [note for note in result.notes if "ended early" in note]
    assert note.startswith(f"The calibration of {name} ended early: the loss became nan in step {steps[name]}; ")
    assert re.search(LARGEST.format(step=r"\d+"), note)


def test_in_gate_before_anything_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="nothing was learned, so nothing was written: the loss became nan in step 1"):
        gated_with_a_loss_that_is_no_number(1, tmp_path, monkeypatch)
    assert not list((tmp_path / "out").iterdir())


def gated_with_a_loss_that_is_no_number(at: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    """Two small networks gated; the loss of the step `at`, counted over both trainings, is no number."""
    for seed, own in enumerate("ab"):
        onnx.save(dense(seed=seed).proto(), folder / f"{own}.onnx")
    x = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)
    np.savez(folder / "data.npz", x=x)
    real, calls = engine._Loop._backward, []

    def backward(self: engine._Loop) -> float:
        calls.append(1)
        return real(self) * (float("nan") if len(calls) == at else 1.0)

    monkeypatch.setattr(engine._Loop, "_backward", backward)
    how = onnxmerge.GateSettings(measure=False, threads=1, gate_steps=12, steps=12)
    models = [folder / f"{own}.onnx" for own in "ab"]
    return onnxmerge.gate_models(models, folder / "data.npz", folder / "out", settings=how)
