"""One walk for all candidates of weights mode: each goes on from the last, in memory or from disk."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from calibrating import interrupted_at
from graphs import chain, dense, execute, relative_error, residual
from test_weights_mode import BUILDS, error, permuted, samples_of, tasks_of

import onnxmerge
from onnxmerge.ir.save import save
from onnxmerge.ir.weights import get_array
from onnxmerge.methods.progress import Silent
from onnxmerge.methods.task import Task
from onnxmerge.methods.zip.alignment import find_sharable
from onnxmerge.methods.zip.choices import Mode, Rule
from onnxmerge.methods.zip.settings import ZipSettings
from onnxmerge.methods.zip.weights.begun import LOST_NAMES, Begun, lost_names, read_candidate
from onnxmerge.methods.zip.weights.settings import WeightSharing
from onnxmerge.methods.zip.weights.share import share_weights


def step_by_step(tasks: list[Task], folder: Path, **given: object) -> list[oir.Model]:
    """The candidates k = 1, 2, ..., each made from the file of the one before."""
    sharable, made = find_sharable(tasks), []
    begun: Begun | None = None
    for k in range(1, len(sharable.cuts) + 1):
        sharing = WeightSharing(samples=300, threads=1, **given)  # type: ignore[arg-type]
        made.append(share_weights(sharable, {}, tasks, k, sharing, begun=begun).model)
        save(made[-1], folder / f"{k}.onnx", {LOST_NAMES: json.dumps(lost_names(made[-1]))})
        begun = Begun(k, {}, read_candidate(folder / f"{k}.onnx"), tasks, sharable)
    return made


@pytest.mark.parametrize("build", BUILDS)
def test_step_by_step_or_at_once_is_the_same(build, tmp_path):
    """The published rule changes nothing but the layers that it shares, so it cannot tell."""
    tasks = tasks_of([build(seed=seed).model() for seed in range(3)], tmp_path)
    sharable = find_sharable(tasks)
    for k, found in enumerate(step_by_step(tasks, tmp_path, rule=Rule.MTZ), start=1):
        sharing = WeightSharing(rule=Rule.MTZ, samples=300, threads=1)
        wanted = share_weights(sharable, {}, tasks, k, sharing).model
        for task in tasks:
            ours, theirs = (execute(model, {"x": samples_of(task)}) for model in (found, wanted))
            assert max(relative_error(theirs[name], ours[name]) for name in theirs) < 1e-3
            assert k == 1 or error(found, task) > 1e-2


@pytest.mark.parametrize("build", BUILDS)
def test_permuted_copies_are_shared_for_free_step_by_step(build, tmp_path):
    """Two have equal tails, so the files hold these once, under one name."""
    model = build().model()
    tasks = tasks_of([model, permuted(model.clone(), 1), model.clone()], tmp_path)
    made = step_by_step(tasks, tmp_path, rule=Rule.MTZ)
    assert any(lost_names(merged) for merged in made)
    assert max(error(made[-1], task) for task in tasks) < 1e-3


# --- whole runs -------------------------------------------------------------------------------------------------------


class Stopping(Silent):
    """Raises when a stage begins."""

    def __init__(self, stage: str, stop: BaseException):
        self.wanted, self.stop = stage, stop
        self.seen: list[str] = []

    def stage(self, name: str, total: int | None = None) -> None:
        self.seen.append(name)
        if name.startswith(self.wanted):
            raise self.stop

    def advance(self, what: str = "") -> None:
        self.seen.append(what)


def run(folder: Path, build: object, *, resume: bool = False, progress: Silent | None = None, **given: object) -> dict:
    models = [folder.parent / f"{name}.onnx" for name in "ab"]
    data = {}
    for number, path in enumerate(models):
        if not path.exists():
            save(build(seed=number).model(), path)  # type: ignore[operator]
            shape = [300, *(v for v in oir.load(path).graph.inputs[0].shape if isinstance(v, int))]
            x = np.random.default_rng(number).standard_normal(shape).astype(np.float32)
            np.savez(path.with_suffix(".npz"), x=x)
        data[path.stem] = path.with_suffix(".npz")
    quick = {"mode": Mode.WEIGHTS, "samples": 200, "steps": 4, "measure": False, "threads": 1}
    settings = ZipSettings(**(quick | given))  # type: ignore[arg-type]
    result = onnxmerge.zip_models(models, data, folder, settings=settings, resume=resume, progress=progress)
    return {c.name: Path(c.path or "").read_bytes() for c in result.candidates}


@pytest.mark.slow
def test_a_run_that_was_stopped_while_a_layer_was_retrained_goes_on_there(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", chain, retrain=5, share="3")
    folder, steps = tmp_path / "out", interrupted_at(monkeypatch, 14)
    with pytest.raises(KeyboardInterrupt):
        run(folder, chain, retrain=5, share="3")
    # two layers were finished, and three steps after the third
    assert steps == [*range(1, 6), *range(1, 6), *range(1, 5)]
    assert {file.name for file in folder.glob("*.checkpoint")} == {f"k03.layer{n}.checkpoint" for n in (1, 2, 3)}
    assert run(folder, chain, retrain=5, share="3", resume=True) == whole
    assert steps[14:] == [4, 5, 1, 2, 3, 4]
    assert not list(folder.glob("*.checkpoint"))


@pytest.mark.slow
@pytest.mark.parametrize(("build", "retrain"), [(chain, 0), (residual, 3)])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(build, retrain, tmp_path):
    whole = run(tmp_path / "whole", build, retrain=retrain)
    assert list(whole) == [f"k{k:02d}" for k in range(len(whole))] and len(whole) > 3
    for stop in (KeyboardInterrupt(), MemoryError()):
        folder = tmp_path / type(stop).__name__
        with pytest.raises(type(stop)):
            run(folder, build, retrain=retrain, progress=Stopping("k03: calibrate", stop))
        assert (folder / "k02.onnx").exists() and not (folder / "k03.onnx").exists()
        after = Stopping("never", stop)
        assert run(folder, build, retrain=retrain, resume=True, progress=after) == whole
        assert not any(stage.startswith(("k01", "k02")) for stage in after.seen)


def test_every_layer_is_shared_once(tmp_path):
    """And nothing but calibration touches it afterwards."""
    progress = Stopping("never", KeyboardInterrupt())
    run(tmp_path / "out", dense, steps=0, rule=Rule.MTZ, progress=progress)
    layers = [name for name in progress.seen if name.startswith("c")]
    assert layers and len(set(layers)) == len(layers)
    first, second = (oir.load(tmp_path / "out" / f"k0{k}.onnx").graph.initializers for k in (1, 2))
    name = next(name for name in first if name.startswith("shared/"))
    np.testing.assert_array_equal(get_array(first[name]), get_array(second[name]))


def test_what_was_calibrated_is_where_the_next_candidate_begins(tmp_path):
    """Zippering: rounds of sharing and calibration take turns."""
    run(tmp_path / "out", chain, steps=40, rule=Rule.MTZ, share="auto")
    (tmp_path / "alone").mkdir()
    for name in ("a.onnx", "b.onnx", "a.npz", "b.npz"):
        (tmp_path / "alone" / name).write_bytes((tmp_path / name).read_bytes())
    run(tmp_path / "alone" / "out", chain, steps=0, rule=Rule.MTZ, share="1")
    trained, plain = (
        get_array(next(v for n, v in oir.load(path).graph.initializers.items() if n.startswith("shared/")))
        for path in (tmp_path / "out" / "k01.onnx", tmp_path / "alone" / "out" / "k01.onnx")
    )
    assert not np.array_equal(trained, plain)
    last = oir.load(tmp_path / "out" / "k03.onnx").graph.initializers
    name = next(name for name in last if name.startswith("shared/"))
    assert np.abs(get_array(last[name]) - trained).max() < np.abs(get_array(last[name]) - plain).max()


# --- a threshold on the functional difference -------------------------------------------------------------------------


def test_the_plan_holds_the_counts_that_came_out_and_replays_them(tmp_path):
    given = {"steps": 0, "share": "3", "max_difference": 0.3}
    (wanted,) = run(tmp_path / "out", residual, **given).values()
    record = json.loads((tmp_path / "out" / "report.json").read_text())["candidates"][0]
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())["candidates"][0]
    sizes = json.loads((tmp_path / "out" / "plan.json").read_text())["spaces"]
    assert plan["channels"] == record["channels"]
    assert any(0 < count < sizes[space] for space, count in plan["channels"].items())
    assert plan["predicted"]["parameters"] == record["parameters"]
    replay = {"steps": 0, "share": str(tmp_path / "out" / "plan.json")}
    (found,) = run(tmp_path / "again", residual, **replay).values()
    feeds = {"x": np.random.default_rng(0).standard_normal((16, 3, 10, 10)).astype(np.float32)}
    ours, theirs = (execute(onnx.load_from_string(model), feeds) for model in (wanted, found))
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-3)


def test_with_a_threshold_too_each_candidate_goes_on_from_the_last(tmp_path):
    given = {"max_difference": 0.4, "retrain": 2, "steps": 2}
    whole = run(tmp_path / "whole", residual, **given)
    records = json.loads((tmp_path / "whole" / "report.json").read_text())["candidates"]
    for earlier, later in pairwise(records[1:]):
        assert earlier["channels"].items() <= later["channels"].items()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", residual, progress=Stopping("k03: calibrate", KeyboardInterrupt()), **given)
    assert run(tmp_path / "part", residual, resume=True, **given) == whole
    resumed = json.loads((tmp_path / "part" / "plan.json").read_text())["candidates"]
    assert resumed == json.loads((tmp_path / "whole" / "plan.json").read_text())["candidates"]
