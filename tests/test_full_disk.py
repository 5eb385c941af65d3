"""A disk that fills: one sentence with the path, exit code 2, nothing half-written, and the run can go on.

A limit on the size of files makes every write fail as a full disk does: with an OSError in the middle of the file.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from test_calibrate import TASKS, work
from test_cli import onnxmerge

__all__ = ["work"]  # a fixture
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs a file size limit"),
]

FULL = """
import resource, signal
import onnxmerge.calibration.engine as engine, onnxmerge.methods.calibrate as calibrate
import onnxmerge.methods.candidates as candidates
from onnxmerge.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def full_before(module, name, when):
    real = getattr(module, name)
    def function(*given, **more):
        if when(*given):
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        return real(*given, **more)
    setattr(module, name, function)
{before}
main()
"""
BEFORE = {
    "checkpoint": "full_before(engine._Loop, 'save', lambda loop, checkpoint, step, *rest: step > 15)",
    "model": "full_before(calibrate, 'save', lambda *given: True)",
    "record": "full_before(candidates, 'write_text', lambda *given: True)",
    "report": "full_before(calibrate, 'write_report', lambda *given: True)",
    "candidate": "full_before(candidates, 'save', lambda model, path, *rest: 'k02' in str(path))",
    "choice": "full_before(candidates.Shelf, 'choose', lambda *given: True)",
}


def on_a_full_disk(before: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FULL.format(before=BEFORE[before]), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def calibration(work: Path, out: Path) -> list[object]:
    teachers = [part for task in TASKS for part in ("--teacher", work / f"{task}.onnx")]
    given = ["--data", work / "samples.npz", "--steps", 30, "--threads", 1, "-o", out]
    return ["calibrate", work / "both.onnx", *teachers, *given]


@pytest.mark.parametrize(
    ("before", "path", "left"),
    [
        ("checkpoint", "merged.checkpoint", {"merged.checkpoint"}),
        ("model", "merged.onnx", {"merged.checkpoint"}),
        ("record", "merged.json", {"merged.checkpoint", "merged.onnx"}),
        ("report", "report.json", {"merged.json", "merged.onnx"}),
    ],
)
def test_calibrate(before: str, path: str, left: set[str], work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = on_a_full_disk(before, *calibration(work, out))
    assert ran.returncode == 2 and not ran.stdout
    assert ran.stderr == f"onnxmerge: error: {out / path}: cannot write the file: {reason(ran.stderr)}\n"
    assert {file.name for file in out.iterdir()} == left
    assert onnxmerge(*calibration(work, out), "--resume")[0] == 0
    assert onnxmerge(*calibration(work, tmp_path / "whole"))[0] == 0
    assert (out / "merged.onnx").read_bytes() == (tmp_path / "whole/merged.onnx").read_bytes()


@pytest.mark.parametrize(
    ("before", "path", "left"),
    [
        ("checkpoint", "k02.checkpoint", {"k02.checkpoint"}),
        ("candidate", "k02.onnx", {"k02.checkpoint"}),
        ("choice", "merged.onnx", {"k02.onnx", "k02.json"}),
    ],
)
def test_zip(before: str, path: str, left: set[str], work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ["zip", *(work / f"{task}.onnx" for task in TASKS), "--data", work / "samples.npz", "--steps", 30]
    common += ["--samples", 50, "--threads", 1, "--max-drop", 1.0, "--share", "2", "-o"]
    ran = on_a_full_disk(before, *common, out)
    assert ran.returncode == 2 and not ran.stdout
    assert ran.stderr == f"onnxmerge: error: {out / path}: cannot write the file: {reason(ran.stderr)}\n"
    assert {file.name for file in out.iterdir()} == left
    assert onnxmerge(*common, out, "--resume")[0] == 0
    assert onnxmerge(*common, tmp_path / "whole")[0] == 0
    for name in ("k02.onnx", "merged.onnx"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def reason(stderr: str) -> str:
    """What the system said, wherever it was found out."""
    found = stderr.rstrip("\n").split("cannot write the file: ")[-1]
    assert "File too large" in found and "\n" not in found
    return found
