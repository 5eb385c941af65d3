"""kill -9 at any moment: every file that is there is whole, nothing earlier is lost, and the run goes on to its end."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors import safe_open
from test_cli import tiny
from warm import Warm, warm

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="needs fork")]

KILLS = {"zip": 20, "fuse": 20, "pack": 10}
IN_A_ROW = 4
"""Kills of one run before it is left to end."""


@pytest.fixture(scope="module")
def runs() -> Iterator[Warm]:
    with warm() as started:
        yield started


def commands(folder: Path) -> dict[str, list[object]]:
    models = [tiny(folder / f"{task}.onnx", seed) for seed, task in enumerate("ab")]
    x = np.random.default_rng(0).random((120, 1, 8, 8), np.float32)
    np.savez(folder / "samples.npz", x=x)
    how = ["--data", folder / "samples.npz", "--steps", 10, "--samples", 50, "--threads", 1, "--max-drop", 1, "--quiet"]
    return {"zip": ["zip", *models, *how, "--start", "repair"], "fuse": ["fuse", *models, *how]}


def finished(out: Path) -> dict[str, bytes]:
    """What must not change any more: candidates that have their record, the chosen one, and what is not the run's."""
    kept = [out / "mine.txt", *out.glob("merged.onnx")]
    for model in out.glob("*.onnx"):
        record = model.with_suffix(".json")
        if record.is_file():
            kept += [model, record]
    return {path.name: path.read_bytes() for path in kept}


def check_whole(out: Path) -> None:
    for path in out.iterdir():
        if path.name.startswith("."):
            continue  # not in its place yet
        if path.suffix == ".onnx":
            runs_in_onnxruntime(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        elif path.suffix == ".checkpoint":
            with safe_open(path, "np") as file:
                assert file.metadata()["run"]
        else:
            assert path.name in ("mine.txt", "packed.onnx.data")


def runs_in_onnxruntime(path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {value.name: np.ones((2, 1, 8, 8), np.float32) for value in session.get_inputs()}
    assert all(np.isfinite(output).all() for output in session.run(None, feeds))


@pytest.mark.parametrize("method", ["zip", "fuse"])
def test_a_killed_run_goes_on(method: str, runs: Warm, tmp_path: Path) -> None:
    command = commands(tmp_path)[method]
    undisturbed = runs.run(*command, "-o", tmp_path / "whole")
    assert undisturbed.code == 0, undisturbed.said
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.onnx")}
    moment = np.random.default_rng(0)
    killed = number = 0
    while killed < KILLS[method]:
        number += 1
        assert number < 4 * KILLS[method], "runs end before they are killed"
        out = tmp_path / f"out{number}"
        out.mkdir()
        (out / "mine.txt").write_text("keep me")
        code = -9
        for _ in range(IN_A_ROW):
            before = finished(out)
            ran = runs.run(*command, "-o", out, "--resume", kill_after=moment.uniform(0.1, 1.0) * undisturbed.seconds)
            code = ran.code
            assert code in (0, -9), ran.said
            check_whole(out)
            after = finished(out)
            assert {name: after.get(name) for name in before} == before
            if code == 0:
                break
            killed += 1
        if code:
            ended = runs.run(*command, "-o", out, "--resume")
            assert ended.code == 0, ended.said
        assert {path.name: path.read_bytes() for path in out.glob("*.onnx")} == wanted
        assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()} | {
            "mine.txt"
        }


@pytest.mark.parametrize("beside", [False, True])
def test_a_killed_pack_leaves_the_old_model_or_the_new_one(beside: bool, runs: Warm, tmp_path: Path) -> None:
    """With its weights `beside` there are two files to replace: the old model may be gone, but is never a mixture."""
    pairs = [[tiny(tmp_path / f"{a}{b}.onnx", 10 * a + b) for b in range(2)] for a in range(2)]
    if beside:
        for path in (path for pair in pairs for path in pair):
            model = onnx.load(path)
            onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    target, wanted, length = out / "packed.onnx", [], 0.0
    for pair in pairs:
        ran = runs.run("pack", *pair, "-o", target, "--overwrite", "--threads", 1, "--quiet")
        assert ran.code == 0, ran.said
        assert len(list(out.iterdir())) == 2 + beside
        wanted.append(contents(target))
        length = ran.seconds
    moment = np.random.default_rng(1)
    killed = 0
    for number in range(4 * KILLS["pack"]):
        pair = pairs[number % 2]
        options = ("--overwrite", "--threads", 1, "--quiet")
        ran = runs.run("pack", *pair, "-o", target, *options, kill_after=moment.uniform(0.2, 1.1) * length)
        assert ran.code in (0, -9), ran.said
        killed += ran.code == -9
        check_whole(out)
        assert contents(target) in wanted or not target.exists()
        if killed == KILLS["pack"] // 2:
            break
    assert killed == KILLS["pack"] // 2
    assert runs.run("pack", *pairs[0], "-o", target, "--overwrite", "--quiet").code == 0
    assert contents(target) == wanted[0]
    assert {path.name for path in out.iterdir()} <= {"mine.txt", "packed.onnx", "packed.onnx.data"}


def contents(target: Path) -> list[bytes]:
    data = target.with_name(f"{target.name}.data")
    return [path.read_bytes() for path in (target, data) if path.is_file()]
