"""Two processes under torchrun train what one trains; when one dies, all end and the checkpoint is whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from test_calibrate import TASKS, calibrate, error_of, work

from onnxmerge.data import Split

__all__ = ["work"]  # a fixture
pytestmark = pytest.mark.slow


def torchrun(*arguments: object, script: Path | None = None, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run `python -m onnxmerge`, or a script that stands for it, in so many processes."""
    program = ["-m", "onnxmerge"] if script is None else [str(script)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
        check=False,
    )


def arguments_for(folder: Path, *more: object, steps: int = 30) -> list[object]:
    teachers = [part for task in TASKS for part in ("--teacher", folder / f"{task}.onnx")]
    data = [part for task in TASKS for part in ("--data", f"{task}={folder / f'{task}.npz'}")]
    return ["calibrate", folder / "both.onnx", *teachers, *data, "--labels", "--steps", steps, "--threads", 1, *more]


def losses_of(text: str) -> list[float]:
    return [loss for _, loss in json.loads(text)["candidates"][1]["losses"]]


@pytest.mark.parametrize("batch", [32, 33], ids=["equal parts", "unequal parts"])
def test_two_processes_have_the_loss_curve_of_one(batch: int, work: Path, tmp_path: Path) -> None:
    more = ["--batch", batch, "--json", "--accumulate", 2, "--clip", 5.0, "--float32"]
    together = torchrun(*arguments_for(work, *more, "-o", tmp_path / "two", "--report", tmp_path / "two.json"))
    assert together.returncode == 0, together.stderr
    report = json.loads(together.stdout)  # one process alone prints
    assert report == json.loads((tmp_path / "two.json").read_text())
    assert {file.name for file in (tmp_path / "two").iterdir()} == {
        *("merged.onnx", "merged.json", "report.json", "report.html")
    }
    data = [part for task in TASKS for part in ("--data", f"{task}={work / f'{task}.npz'}")]
    code, stdout, stderr = calibrate(work, *data, "--labels", *more, "--steps", 30, "-o", tmp_path / "one")
    assert code == 0, stderr
    np.testing.assert_allclose(losses_of(together.stdout), losses_of(stdout), rtol=1e-4)
    assert len(losses_of(stdout)) == 11 and losses_of(stdout)[-1] < 0.9 * losses_of(stdout)[0]
    assert error_of(tmp_path / "two/merged.onnx", work) == pytest.approx(
        error_of(tmp_path / "one/merged.onnx", work), rel=1e-3
    )


def test_a_process_that_dies_ends_all_and_the_run_can_go_on(work: Path, tmp_path: Path) -> None:
    script = tmp_path / "dying.py"
    script.write_text(
        "import os, signal\n"
        "import onnxmerge.calibration.engine as engine\n"
        "from onnxmerge.cli import main\n"
        "real = engine._Loop.advance\n"
        "def advance(self, step):\n"
        "    if step == 17 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, step)\n"
        "engine._Loop.advance = advance\n"
        "main()\n"
    )
    out = tmp_path / "out"
    died = torchrun(*arguments_for(work, "-o", out), script=script)
    assert died.returncode != 0
    assert [file.name for file in out.iterdir()] == ["merged.checkpoint"]
    with safe_open(out / "merged.checkpoint", "pt") as file:
        assert json.loads(file.metadata()["run"])["step"] == 15
    resumed = torchrun(*arguments_for(work, "-o", out, "--resume", "--json"))
    assert resumed.returncode == 0, resumed.stderr
    whole = torchrun(*arguments_for(work, "-o", tmp_path / "whole", "--json"))
    assert losses_of(resumed.stdout) == losses_of(whole.stdout)
    assert (out / "merged.onnx").read_bytes() == (tmp_path / "whole/merged.onnx").read_bytes()


def test_more_processes_than_samples_in_a_batch_are_refused(work: Path, tmp_path: Path) -> None:
    refused = torchrun(*arguments_for(work, "-o", tmp_path / "out", "--batch", 1))
    assert refused.returncode != 0
    assert "onnxmerge: error: a batch of 1 samples cannot be shared by 2 processes" in refused.stderr


def test_zip_runs_in_several_processes(work: Path, tmp_path: Path) -> None:
    models = [work / f"{task}.onnx" for task in TASKS]
    common = ["zip", *models, "--data", work / "samples.npz", "--steps", 10, "--samples", 50, "--max-drop", 1.0]
    run = torchrun(*common, "--threads", 1, "-o", tmp_path / "out", "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["chosen"] == "k02"
    made = (tmp_path / "out/k02.onnx").read_bytes()
    (tmp_path / "out/k02.json").unlink()  # one finished candidate is found again by all, the other made again by all
    again = torchrun(*common, "--threads", 1, "-o", tmp_path / "out", "--json", "--resume")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out/k02.onnx").read_bytes() == made and (tmp_path / "out/k02.json").is_file()


def test_parts_of_a_batch_make_the_batch() -> None:
    class Numbers:
        has_labels = False

        def __len__(self) -> int:
            return 50

        def read(self, rows: np.ndarray) -> np.ndarray:
            return rows

    split = Split(Numbers())  # type: ignore[arg-type]
    whole = split.shuffled(11, 3)
    parts = [split.shuffled(11, 3, part=(rank, 3)) for rank in range(3)]
    for _ in range(12):
        np.testing.assert_array_equal(np.concatenate([next(part) for part in parts]), next(whole))
