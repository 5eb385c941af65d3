"""Outputs that cannot be written, on a disk that is full or read-only: one sentence, exit code 2, nothing lost."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_cli import tiny
from warm import Ran, Warm, warm

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs mount")]
SIZES = [(method, size) for method in ("zip", "fuse") for size in (16, 40, 64, 100)] + [("pack", 16)]
"""Kilobytes that the disk has: it fills at the first model, at later ones, at the plan, at the report."""


@pytest.fixture(scope="module")
def runs() -> Iterator[Warm]:
    with warm() as started:
        yield started


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty folder to mount on."""
    place = tmp_path / "disk"
    place.mkdir()
    yield place
    subprocess.run(["umount", place], capture_output=True, check=False)


def mount(place: Path, options: str) -> None:
    tried = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip("this user may not mount")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    folder = tmp_path_factory.mktemp("work")
    models = [tiny(folder / f"{task}.onnx", seed, hidden=12) for seed, task in enumerate("ab")]
    np.savez(folder / "samples.npz", x=np.random.default_rng(0).random((120, 1, 8, 8), np.float32))
    how = ["--data", folder / "samples.npz", "--steps", 0, "--samples", 50, "--threads", 1, "--quiet"]
    return {
        "zip": ["zip", *models, *how, "--max-drop", 1, "--start", "keep"],
        "fuse": ["fuse", *models, *how],
        "pack": ["pack", *models, "--threads", 1, "--quiet"],
    }


def output(method: str, folder: Path) -> Path:
    return folder / ("out.onnx" if method == "pack" else "out")


def refused(ran: Ran, place: Path, why: str) -> None:
    assert ran.code == 2, ran.said
    assert ran.said.startswith(f"onnxmerge: error: {place}") and why in ran.said and ran.said.count("\n") == 1


@pytest.mark.parametrize(("method", "kilobytes"), SIZES)
def test_a_full_disk(
    method: str, kilobytes: int, runs: Warm, work: dict[str, list[object]], disk: Path, tmp_path: Path
) -> None:
    out = output(method, disk)
    mount(disk, f"size={kilobytes}k")
    (disk / "mine.txt").write_text("keep me")
    again = ["--overwrite"] if method == "pack" else ["--resume"]
    ran = runs.run(*work[method], "-o", out)
    refused(ran, disk, "No space left on device")
    assert (disk / "mine.txt").read_text() == "keep me"
    assert not list(disk.rglob(".*"))
    subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
    ran = runs.run(*work[method], "-o", out, *again)
    assert ran.code == 0, ran.said
    assert runs.run(*work[method], "-o", output(method, tmp_path)).code == 0
    for model in [out] if method == "pack" else out.glob("*.onnx"):
        assert model.read_bytes() == (tmp_path / model.relative_to(disk)).read_bytes()


@pytest.mark.parametrize("method", ["zip", "fuse", "pack"])
def test_a_disk_that_is_read_only(method: str, runs: Warm, work: dict[str, list[object]], disk: Path) -> None:
    mount(disk, "size=4m")
    out = output(method, disk)
    if method != "pack":
        out.mkdir()
        (out / "mine.txt").write_text("keep me")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    ran = runs.run(*work[method], "-o", out, *([] if method == "pack" else ["--resume"]))
    refused(ran, out, "Read-only" if method == "pack" else "cannot write into the output folder")
    assert {path.name for path in disk.rglob("*")} <= {"out", "mine.txt"}


@pytest.mark.parametrize("method", ["zip", "fuse", "pack"])
def test_a_folder_without_the_right_to_write(
    method: str, runs: Warm, work: dict[str, list[object]], tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    folder.chmod(0o555)
    ran = runs.run(*work[method], "-o", folder / "out.onnx" if method == "pack" else folder, powerless=True)
    folder.chmod(0o755)
    refused(ran, folder, "")
    assert not list(folder.iterdir())
