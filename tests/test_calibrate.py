"""`onnxmerge calibrate` as a user meets it; onnxruntime judges what it wrote."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from calibrating import interrupted_at
from test_cli import onnxmerge, tiny

import onnxmerge as package
import onnxmerge.calibration.engine as engine
from onnxmerge.report.recipe import history

TASKS = ("a", "b")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two originals, samples of them, and what zip makes of them without calibration."""
    folder = tmp_path_factory.mktemp("work")
    models = [tiny(folder / f"{task}.onnx", seed) for seed, task in enumerate(TASKS)]
    random = np.random.default_rng(0)
    x = random.normal(size=(400, 1, 8, 8)).astype(np.float32)
    np.savez(folder / "samples.npz", x=x)
    for model, task in zip(models, TASKS, strict=True):
        (logits,) = run(model, x)
        np.savez(folder / f"{task}.npz", x=x, labels=logits.argmax(1))
        np.savez(folder / f"numbers-{task}.npz", x=x, labels=2 * logits)
        np.savez(folder / f"floats-{task}.npz", x=x, labels=logits.argmax(1).astype(np.float32))
    how = package.ZipSettings(share="2", max_drop=None, steps=0, samples=60, threads=1, measure=False)
    package.zip_models(models, folder / "samples.npz", folder / "zipped", settings=how)
    shutil.copy(folder / "zipped" / "merged.onnx", folder / "both.onnx")
    return folder


def run(model: Path, x: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})


def calibrate(work: Path, *arguments: object, merged: str = "both.onnx") -> tuple[int, str, str]:
    teachers = [part for task in TASKS for part in ("--teacher", work / f"{task}.onnx")]
    given = [] if "--data" in arguments else ["--data", work / "samples.npz"]
    steps = [] if "--steps" in arguments else ["--steps", 40]
    return onnxmerge("calibrate", work / merged, *teachers, *given, *steps, "--threads", 1, *arguments)


def error_of(model: Path, work: Path, factor: float = 1.0) -> float:
    """Mean squared error of both tasks' outputs to `factor` times the originals', on samples never seen."""
    x = np.random.default_rng(9).normal(size=(200, 1, 8, 8)).astype(np.float32)
    wanted = [factor * run(work / f"{task}.onnx", x)[0] for task in TASKS]
    return float(np.mean([np.square(ours - theirs).mean() for ours, theirs in zip(run(model, x), wanted, strict=True)]))


def test_a_merged_model_comes_nearer_to_its_originals(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = calibrate(work, "-o", out, "--json", "--report", tmp_path / "copy.html")
    assert code == 0, stderr
    report = json.loads(stdout)
    assert report == json.loads((out / "report.json").read_text()) and report["method"] == "calibrate"
    given, made = report["candidates"]
    assert (given["name"], made["name"], report["chosen"]) == ("given", "merged", "merged")
    assert made["steps"] == 40 and [step for step, _ in made["losses"]] == list(range(0, 41, 4))
    assert error_of(out / "merged.onnx", work) < 0.8 * error_of(work / "both.onnx", work)
    for task in TASKS:
        assert made["tasks"][task]["relative_error"] < given["tasks"][task]["relative_error"]
    assert "calibrate" in (out / "report.html").read_text() and (tmp_path / "copy.html").is_file()
    assert not list(out.glob("*.checkpoint"))
    before, after = onnx.load(work / "both.onnx"), onnx.load(out / "merged.onnx")
    assert [node.op_type for node in after.graph.node] == [node.op_type for node in before.graph.node]
    kept = {p.key: p.value for p in after.metadata_props}
    assert kept["onnxmerge.share"] == "2" and history(kept)[-1].options["steps"] == 40


def test_the_same_from_python_and_twice_the_same_bytes(work: Path, tmp_path: Path) -> None:
    assert calibrate(work, "-o", tmp_path / "cli")[0] == 0
    teachers = {task: work / f"{task}.onnx" for task in TASKS}
    how = package.Settings(steps=40, threads=1)
    result = package.calibrate_model(
        work / "both.onnx", teachers, work / "samples.npz", tmp_path / "python", settings=how
    )
    assert result.chosen == "merged"
    assert (tmp_path / "cli/merged.onnx").read_bytes() == (tmp_path / "python/merged.onnx").read_bytes()


def test_labels_that_are_numbers_can_be_all_there_is(work: Path, tmp_path: Path) -> None:
    data = [part for task in TASKS for part in ("--data", f"{task}={work / f'numbers-{task}.npz'}")]
    alone = ["--labels", "--kl-weight", 0, "--logit-weight", 0, "--feature-weight", 0]
    code, _, stderr = calibrate(work, *data, *alone, "-o", tmp_path / "out", "--steps", 100, "--rate", 0.03)
    assert code == 0, stderr
    assert error_of(tmp_path / "out/merged.onnx", work, 2.0) < 0.6 * error_of(work / "both.onnx", work, 2.0)


def test_classes_are_scored(work: Path, tmp_path: Path) -> None:
    data = [part for task in TASKS for part in ("--data", f"{task}={work / f'{task}.npz'}")]
    code, stdout, stderr = calibrate(work, *data, "--labels", "-o", tmp_path / "out", "--json", "--steps", 2)
    assert code == 0, stderr
    assert json.loads(stdout)["candidates"][1]["tasks"]["b"]["original_accuracy"] == 1.0


def test_fewer_samples_and_early_stopping(work: Path, tmp_path: Path) -> None:
    code, stdout, stderr = calibrate(
        work, "--samples", 3, "--rate", 1.0, "--patience", 2, "-o", tmp_path / "out", "--json", "--steps", 60
    )
    assert code == 0, stderr
    report = json.loads(stdout)
    assert report["candidates"][1]["steps"] == 12
    assert report["notes"] == [
        "The calibration of the model ended after step 12, for the held-out loss had not fallen since step 0.",
        "No measurement of the held-out loss was below that of the start: the weights are those given.",
    ]
    assert error_of(tmp_path / "out/merged.onnx", work) == error_of(work / "both.onnx", work)


def test_no_steps_only_measure(work: Path, tmp_path: Path) -> None:
    code, _, stderr = calibrate(work, "-o", tmp_path / "out", "--steps", 0)
    assert code == 0, stderr
    assert error_of(tmp_path / "out/merged.onnx", work) == error_of(work / "both.onnx", work)


def test_one_teacher_of_two_is_enough_and_the_other_is_named(work: Path, tmp_path: Path) -> None:
    code, stdout, stderr = onnxmerge(
        *("calibrate", work / "both.onnx", "--teacher", work / "a.onnx", "--data", work / "samples.npz"),
        *("-o", tmp_path / "out", "--steps", 4, "--threads", 1, "--json"),
    )
    assert code == 0, stderr
    notes = json.loads(stdout)["notes"]
    assert notes == ["These outputs have no teacher, and change with what they share with others: b/logits."]


def test_several_teachers_of_one_task(work: Path, tmp_path: Path) -> None:
    code, stdout, stderr = calibrate(work, "-o", tmp_path / "out", "--json", merged="a.onnx")
    assert code == 0, stderr
    given, made = json.loads(stdout)["candidates"]
    assert made["tasks"]["b"]["relative_error"] < given["tasks"]["b"]["relative_error"]


def test_an_interrupted_run_goes_on(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, steps = tmp_path / "out", interrupted_at(monkeypatch, 21)
    code, _, stderr = calibrate(work, "-o", out)
    assert code == 130 and "--resume goes on" in stderr and [f.name for f in out.iterdir()] == ["merged.checkpoint"]
    assert calibrate(work, "-o", out)[0] == 2  # the folder is not empty
    assert calibrate(work, "-o", out, "--resume")[0] == 0
    assert calibrate(work, "-o", out, "--resume")[0] == 0  # nothing is left to do
    assert steps == [*range(1, 22), *range(21, 41)]
    assert calibrate(work, "-o", tmp_path / "whole")[0] == 0
    assert (out / "merged.onnx").read_bytes() == (tmp_path / "whole/merged.onnx").read_bytes()


def test_a_loss_that_is_no_number_writes_nothing(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(self: engine._Loop) -> float:
        for loss in self.problem.losses():
            loss.backward()
        return float("nan")

    monkeypatch.setattr(engine._Loop, "_backward", backward)
    code, _, stderr = calibrate(work, "-o", tmp_path / "out")
    assert (
        code == 2 and "nothing was written: the loss became nan in step 1; the largest gradient had the norm" in stderr
    )
    assert not list((tmp_path / "out").iterdir())


def test_what_was_learned_before_a_loss_was_no_number_is_kept(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engine._Loop._backward
    calls: list[int] = []

    def backward(self: engine._Loop) -> float:
        calls.append(1)
        loss = real(self)
        return loss if len(calls) < 30 else float("inf")

    monkeypatch.setattr(engine._Loop, "_backward", backward)
    code, stdout, stderr = calibrate(work, "-o", tmp_path / "out", "--json")
    assert code == 0, stderr
    note = json.loads(stdout)["notes"][0]
    assert note.startswith("The calibration of the model ended early: the loss became inf in step 30; the largest ")
    assert note.endswith("the weights of step 28 were kept.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "cats={a}", "--data", "{s}"], "has no output cats/logits; its outputs are a/logits, b/logits"),
        (["--teacher", "{a}", "--teacher", "a={b}", "--data", "{s}"], "--teacher: the task 'a' is named twice"),
        (["--teacher", "{a}"], "--data: the task 'a' has no data"),
        (["--teacher", "{a}", "--data", "dogs={s}"], "there is no task 'dogs'; the tasks are a"),
        (["--teacher", "{gone}", "--data", "{s}"], "gone.onnx"),
        (["--teacher", "{a}", "--data", "{gone}"], "gone.onnx"),
        (["--teacher", "{a}", "--data", "{s}", "--labels"], "the data of task 'a' has no labels"),
        (["--teacher", "{a}", "--data", "{floats}", "--labels"], "output 'logits' has [4]; class numbers are integers"),
        (["--teacher", "{a}", "--data", "{s}", "--optimiser", "lion"], "optimiser must be adamw or sgd, not 'lion'"),
        (["--teacher", "{a}", "--data", "{s}", "--rate", "0"], "rate must be above 0, not 0.0"),
        (["--teacher", "{wide}", "--data", "{s}"], "has no output wide/logits"),
        (["--teacher", "a={wide}", "--data", "{s}"], "expects (N, 2, 8, 8)"),
        (["--teacher", "a={many}", "--data", "{s}"], "its output a/logits is Nx4, but that of"),
    ],
)
def test_bad_input_is_one_clear_sentence(arguments: list[str], message: str, work: Path, tmp_path: Path) -> None:
    tiny(work / "wide.onnx", channels=2)
    tiny(work / "many.onnx", classes=7)
    files = {"s": "samples.npz", "floats": "floats-a.npz"}
    files |= {name: f"{name}.onnx" for name in ("a", "b", "gone", "wide", "many")}
    names = {key: str(work / file) for key, file in files.items()}
    code, _, stderr = onnxmerge(
        *("calibrate", work / "both.onnx", "-o", tmp_path / "out", "--threads", 1, "--steps", 2),
        *(argument.format(**names) for argument in arguments),
    )
    assert code in (2, 3) and message in stderr and len(stderr.strip().splitlines()) == 1, stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_the_given_model_is_never_replaced(work: Path, tmp_path: Path) -> None:
    shutil.copy(work / "both.onnx", tmp_path / "merged.onnx")
    before = (tmp_path / "merged.onnx").read_bytes()
    code, _, stderr = calibrate(tmp_path, "-o", tmp_path, "--overwrite", merged="merged.onnx")
    assert code == 2 and (tmp_path / "merged.onnx").read_bytes() == before, stderr
    for task in TASKS:
        shutil.copy(work / f"{task}.onnx", tmp_path)
    shutil.copy(work / "samples.npz", tmp_path)
    code, _, stderr = calibrate(tmp_path, "-o", tmp_path, "--overwrite", merged="merged.onnx")
    assert code == 2 and "holds the merged model itself" in stderr
    assert (tmp_path / "merged.onnx").read_bytes() == before
