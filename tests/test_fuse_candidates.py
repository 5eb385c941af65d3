"""The candidates of a fuse: which is chosen, what an interrupted run keeps, and that seeds decide everything."""

import json

import numpy as np
import onnx
import pytest
from graphs import dense
from typer.testing import CliRunner

import onnxmerge.methods.fuse.fuse as fuse_module
from onnxmerge.cli.app import app


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate("ab"):
        onnx.save(dense(seed=seed).proto(), tmp_path / f"{name}.onnx")
    generator = np.random.default_rng(0)
    arrays = {"x": generator.standard_normal((300, 6)), "test_x": generator.standard_normal((100, 6))}
    labels = {"labels": generator.integers(4, size=300), "test_labels": generator.integers(4, size=100)}
    np.savez(tmp_path / "data.npz", **{name: x.astype(np.float32) for name, x in arrays.items()}, **labels)
    return tmp_path


def run(folder, *arguments: str, out: str = "out"):
    models = [str(folder / "a.onnx"), str(folder / "b.onnx")]
    common = ["--data", str(folder / "data.npz"), "-o", str(folder / out), "--threads", "1", "-q"]
    return CliRunner().invoke(app, ["fuse", *models, *common, *arguments])


def report(folder, out: str = "out") -> dict:
    return json.loads((folder / out / "report.json").read_text())


def test_the_candidate_nearest_to_the_ensemble_is_chosen(folder):
    assert run(folder).exit_code == 0
    found = report(folder)
    agreement = {c["name"]: c["ensemble"]["agreement"] for c in found["candidates"]}
    assert set(agreement) == {"least-squares-mean", "least-squares-selected", "heads"}
    assert agreement[found["chosen"]] == max(agreement.values())
    chosen = folder / "out" / f"{found['chosen']}.onnx"
    assert (folder / "out" / "merged.onnx").read_bytes() == chosen.read_bytes()
    assert len({(folder / "out" / f"{name}.onnx").read_bytes() for name in agreement}) == len(agreement)


def test_what_was_calibrated_is_chosen(folder):
    assert run(folder, "--steps", "10").exit_code == 0
    found = report(folder)
    assert found["chosen"] == "calibrated"
    last = found["candidates"][-1]
    assert (last["name"], last["steps"], last["losses"][0][0]) == ("calibrated", 10, 0)
    best = max(found["candidates"][:-1], key=lambda c: c["ensemble"]["agreement"])
    assert last["start"] == best["name"]


@pytest.mark.parametrize("start", ["keep", "random", "fused"])
def test_starts(start, folder):
    assert run(folder, "--start", start, "--rule", "average").exit_code == 0
    (only,) = report(folder)["candidates"]
    assert only["start"] == {"keep": "keep", "random": "random", "fused": "average"}[start]
    agreement = only["tasks"]["a"]["agreement"]
    assert (agreement == 1.0) == (start == "keep")


def test_a_bound_that_no_candidate_keeps(folder):
    with np.load(folder / "data.npz") as data:
        np.savez(folder / "data.npz", **{name: data[name] for name in ("x", "test_x")})
    result = run(folder, "--max-drop", "0", "--start", "random")
    assert result.exit_code == 1
    assert report(folder)["chosen"] is None
    assert not (folder / "out" / "merged.onnx").exists()


def test_labels_and_teachers_are_weighed(folder):
    def losses(*arguments: str) -> list:
        assert run(folder, "--rule", "average", "--steps", "5", *arguments, "--overwrite").exit_code == 0
        return report(folder)["candidates"][-1]["losses"]

    plain = losses()
    assert losses("--labels") != plain
    assert losses("--distil-weight", "1") != plain
    assert losses("--distil-weight", "1") != losses("--distil-weight", "1", "--temperature", "8")
    assert losses("--distil-weight", "0.3", "--labels") != losses("--distil-weight", "0", "--labels")


def test_one_seed_gives_the_same_bytes(folder):
    assert run(folder, "--steps", "5", out="first").exit_code == 0
    assert run(folder, "--steps", "5", out="second").exit_code == 0
    names = sorted(path.name for path in (folder / "first").glob("*.onnx"))
    assert len(names) == 5
    for name in names:
        first, second = ((folder / out / name).read_bytes() for out in ("first", "second"))
        assert first == second, name


def test_an_interrupted_run_is_reported_and_resumed(folder, monkeypatch):
    real, calls = fuse_module.fuse_counterparts, []

    def interrupted(*arguments, **more):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(fuse_module, "fuse_counterparts", interrupted)
    stopped = run(folder)
    assert stopped.exit_code == 130
    assert [c["name"] for c in report(folder)["candidates"]] == ["least-squares-mean"]
    assert run(folder).exit_code == 2  # what is there is not overwritten
    before = (folder / "out" / "least-squares-mean.onnx").read_bytes()
    assert run(folder, "--resume").exit_code == 0
    assert len(calls) == 3  # the second candidate again, the first not
    assert (folder / "out" / "least-squares-mean.onnx").read_bytes() == before
    assert len(report(folder)["candidates"]) == 3
    assert run(folder, "--resume").exit_code == 0
    assert len(calls) == 3
    assert run(folder, "--resume", "--seed", "1").exit_code == 0
    assert len(calls) == 5  # another recipe: nothing is taken over
