"""Two runs that want one output: the second is refused in one sentence; one that was killed stands in nobody's way."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_cli import DEMO, FAST, onnxmerge, pair, samples

from onnxmerge.files import claim_file, claim_folder

__all__ = ["pair", "samples"]  # fixtures
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing keeps two runs apart there")


@contextlib.contextmanager
def elsewhere(claim: object, output: Path) -> Iterator[int]:
    """Another process has `output`; its number."""
    ready, tell = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            with claim(output, overwrite=True):  # type: ignore[operator]
                os.write(tell, b"x")
                signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(ready, 1) == b"x"
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(ready)
        os.close(tell)


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
@pytest.mark.parametrize("method", ["zip", "fuse", "calibrate"])
def test_a_folder(method: str, more: list[str], tmp_path: Path, pair: tuple[Path, Path], samples: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    given: list[object] = [method, *pair]
    if method == "calibrate":
        given = [method, pair[0], "--teacher", pair[0]]
    with elsewhere(claim_folder, out):
        code, _, stderr = onnxmerge(*given, "-o", out, "--data", samples, "--quiet", *more)
    assert (code, stderr) == (2, f"onnxmerge: error: {out}: another run is writing there\n")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_file(more: list[str], tmp_path: Path, pair: tuple[Path, Path]) -> None:
    out = tmp_path / "out.onnx"
    with elsewhere(claim_file, out):
        code, _, stderr = onnxmerge("pack", *pair, "-o", out, "--quiet", *more)
        assert (code, stderr) == (2, f"onnxmerge: error: {out}: another run is writing there\n")
        assert not out.exists()
        assert onnxmerge("pack", *pair, "-o", tmp_path / "other.onnx", "--quiet", *more)[0] == 0
    assert onnxmerge("pack", *pair, "-o", out, "--quiet", *more)[0] == 0  # the other was killed
    assert not list(tmp_path.glob(".*"))


def test_a_killed_run_leaves_no_lock(tmp_path: Path, pair: tuple[Path, Path], samples: Path) -> None:
    out = tmp_path / "out"
    with elsewhere(claim_folder, out):
        pass
    assert list(out.iterdir()) == []
    code, _, stderr = onnxmerge("zip", *pair, "-o", out, "--data", samples, *FAST, "--share", 0)
    assert code == 0, stderr


def test_a_run_that_ended_lets_go(tmp_path: Path) -> None:
    for claim, output in ((claim_folder, tmp_path / "out"), (claim_file, tmp_path / "out.onnx")):
        for _ in range(2):
            with claim(output, overwrite=False):
                pass
        with pytest.raises(RuntimeError), claim(output, overwrite=False):
            raise RuntimeError
        with claim(output, overwrite=False):
            pass


def test_extract_and_pack_want_one_file(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert onnxmerge("pack", DEMO / "digits.onnx", DEMO / "fashion.onnx", "-o", tmp_path / "p.onnx", "-q")[0] == 0
    with elsewhere(claim_file, out):
        code, _, stderr = onnxmerge("extract", tmp_path / "p.onnx", "--task", "digits", "-o", out)
    assert code == 2 and stderr == f"onnxmerge: error: {out}: another run is writing there\n"
