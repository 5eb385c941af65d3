"""Temporary folders go with their run, and those of a killed run with the next one."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from onnxmerge.scratch import scratch

HOLD = """
import sys, time
from onnxmerge.scratch import scratch

with scratch() as folder:
    (folder / "values").write_bytes(b"much")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def aged(folder: Path) -> Path:
    os.utime(folder, (time.time() - 3600,) * 2)
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="there are no locks")
def test_a_killed_runs_folder_goes_with_the_next_run(room: Path) -> None:
    runs = [subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        folders = [aged(Path(run.stdout.readline().strip())) for run in runs if run.stdout]
        with scratch():
            assert all(folder.is_dir() for folder in folders), "both runs go on"
        runs[0].send_signal(signal.SIGKILL)
        runs[0].wait()
        with scratch() as own:
            assert [folder.is_dir() for folder in folders] == [False, True] and own.is_dir()
        assert (folders[1] / "values").read_bytes() == b"much"
    finally:
        for run in runs:
            run.kill()
            run.wait()


def test_what_is_young_or_not_ours_stays(room: Path) -> None:
    (room / "onnxmerge-young").mkdir()
    for name in ("other", "onnxmerge_like"):
        aged_folder = room / name
        aged_folder.mkdir()
        aged(aged_folder)
    elsewhere = room / "elsewhere"
    elsewhere.mkdir()
    (room / "onnxmerge-link").symlink_to(aged(elsewhere))
    with scratch() as own:
        left = {path.name for path in room.iterdir()} - {own.name}
    assert left == {"onnxmerge-young", "other", "onnxmerge_like", "elsewhere", "onnxmerge-link"}
    assert not own.exists()
