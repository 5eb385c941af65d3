"""What a file tells of how it was made: `inspect` shows it, and `run` makes the same file of it again."""

import dataclasses
import hashlib
import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from test_cli import onnxmerge, pair, samples  # noqa: F401 (fixtures)
from typer.main import get_command

import onnxmerge as package
from onnxmerge.cli.app import app
from onnxmerge.cli.calibrate import calibrate
from onnxmerge.cli.fuse import fuse
from onnxmerge.cli.gate import gate
from onnxmerge.cli.zip import zip as zip_command

SHORT = ("--threads", "1")
DATA = ("a.onnx", "c.onnx", "--data", "samples.npz")


@pytest.fixture
def here(tmp_path: Path, pair: tuple[Path, Path], samples: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    for path, name in zip((*pair, samples), ("a.onnx", "b.onnx", "samples.npz"), strict=True):
        if path != tmp_path / name:
            shutil.copy(path, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(path: str) -> dict[str, object]:
    code, stdout, stderr = onnxmerge("inspect", path, "--json")
    assert code == 0, stderr
    return json.loads(stdout)


def made_again(recipe: dict[str, object], here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the recipe has run beside copies of the originals alone."""
    folder = here.parent / f"{here.name}-again"
    folder.mkdir()
    for name in ("a.onnx", "b.onnx", "samples.npz"):
        shutil.copy(name, folder)
    monkeypatch.chdir(folder)
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, _, stderr = onnxmerge("run", "recipe.yaml")
    assert code == 0, stderr
    return folder


def test_a_file_that_went_through_many_hands_is_made_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ("--data", "samples.npz")
    share = ("--share", "2", "--width", 1.25, "--weights", "1,2", "--start", "subspace", "--max-drop", 1)
    teachers = ("--teacher", "a=a.onnx", "--teacher", "b=b.onnx", "--norm-statistics", "frozen")
    for line in (
        ("zip", "a.onnx", "b.onnx", *data, *share, "--steps", 2, "--samples", 100, "-o", "zipped", *SHORT),
        ("calibrate", "zipped/merged.onnx", *teachers, *data, "--steps", 3, "-o", "more", *SHORT),
        ("apply", "more/merged.onnx", "--pass", "EnsureBiases", "-o", "rewritten.onnx"),
        ("quantize", "rewritten.onnx", "--to", "int8", *data, "--samples", 32, "-o", "int8.onnx", *SHORT),
        ("extract", "int8.onnx", "--task", "b", "-o", "b-alone.onnx"),
    ):
        code, _, stderr = onnxmerge(*line)
        assert code == 0, stderr
    found = told("b-alone.onnx")
    steps = found["recipe"]["steps"]
    assert [next(iter(step)) for step in steps] == ["zip", "calibrate", "apply", "quantize", "extract"]
    assert [own["command"] for own in found["made_by"]] == ["zip", "calibrate", "apply", "quantize", "extract"]
    assert steps[0]["zip"]["output"] == "zipped" and steps[0]["zip"]["max-drop"] == 1.0
    for own in found["made_by"]:
        assert {"onnxmerge", "onnx", "python"} <= own["versions"].keys()
        for path, digest in own["files"].items():
            assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest
    folder = made_again(found["recipe"], here, monkeypatch)
    for name in ("zipped/merged.onnx", "more/merged.onnx", "rewritten.onnx", "int8.onnx", "b-alone.onnx"):
        assert (folder / name).read_bytes() == (here / name).read_bytes(), name


@pytest.mark.parametrize(
    "line",
    [
        ("pack", "a.onnx", "b.onnx", "-o", "OUT", "--separate-inputs", "--share-input", "a:x=b:x"),
        ("fuse", *DATA, "-o", "OUT/", "--rule", "transport", "--weights", "2,1"),
        ("gate", *DATA, "-o", "OUT/", "--gate-steps", 2, "--steps", 2, "--no-labels"),
    ],
    ids=lambda line: line[0],
)
def test_each_merge_is_made_again(line: tuple[object, ...], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = onnx.load("a.onnx")
    for weight in other.graph.initializer:
        weight.raw_data = (onnx.numpy_helper.to_array(weight) * 1.01).tobytes()
    onnx.save(other, "c.onnx")
    folder = str(line[line.index("-o") + 1]).endswith("/")
    out = "made" if folder else "made.onnx"
    own = [out if text in ("OUT", "OUT/") else text for text in line]
    code, _, stderr = onnxmerge(*own, *(() if line[0] == "pack" else SHORT))
    assert code == 0, stderr
    file = Path(out, "merged.onnx") if folder else Path(out)
    recipe, before = told(str(file))["recipe"], file.read_bytes()
    if line[0] != "pack":
        report = json.loads(Path(out, "report.json").read_text())
        assert report["recipe"] == recipe, "the report tells what the file tells"
    shutil.move(out, "before")
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, _, stderr = onnxmerge("run", "recipe.yaml")
    assert code == 0, stderr
    assert file.read_bytes() == before


def test_inspect_shows_the_recipe_as_run_reads_it(here: Path) -> None:
    assert onnxmerge("pack", "a.onnx", "b.onnx", "-o", "both.onnx")[0] == 0
    code, stdout, _ = onnxmerge("inspect", "both.onnx")
    assert code == 0
    text = stdout[stdout.index("# pack read") :]
    assert f"#   a.onnx (SHA-256 {hashlib.sha256(Path('a.onnx').read_bytes()).hexdigest()})" in text
    assert yaml.safe_load(text) == {"steps": [{"pack": {"models": ["a.onnx", "b.onnx"], "output": "both.onnx"}}]}
    assert told("a.onnx")["recipe"] is None and "recipe" not in onnxmerge("inspect", "a.onnx")[1]


NONE = ("", "[]", "{", "[1]", '[{"command": "zip"}]', '"text"', "null", '{"steps": []}')
WRONG = ({"command": 1}, {"options": []}, {"files": ["a.onnx"]}, {"versions": None}, {"files": {"a.onnx": 3}})
STEP = {"command": "pack", "options": {}, "files": {}, "versions": {}}


@pytest.mark.parametrize("text", [*NONE, *(json.dumps([STEP, STEP | wrong]) for wrong in WRONG)])
def test_a_recipe_that_is_none_is_passed_over(text: str, here: Path) -> None:
    model = onnx.load("a.onnx")
    onnx.helper.set_model_props(model, {"onnxmerge.recipe": text, "onnxmerge.tasks": text})
    onnx.save(model, "odd.onnx")
    assert told("odd.onnx")["recipe"] is None
    assert onnxmerge("apply", "odd.onnx", "-o", "more.onnx", "--pass", "EnsureBiases")[0] == 0
    assert len(told("more.onnx")["made_by"]) == 1


def test_steps_that_read_nothing_are_shown(here: Path) -> None:
    model = onnx.load("a.onnx")
    onnx.helper.set_model_props(model, {"onnxmerge.recipe": json.dumps([STEP, STEP])})
    onnx.save(model, "odd.onnx")
    assert len(told("odd.onnx")["recipe"]["steps"]) == 2


def test_what_a_file_tells_cannot_write_on_the_terminal(here: Path) -> None:
    evil = "a\x1b]0;owned\x07\nsteps: [evil]\r"
    step = {"command": evil, "options": {evil: evil}, "files": {evil: evil}, "versions": {evil: evil}}
    model = onnx.load("a.onnx")
    onnx.helper.set_model_props(model, {"onnxmerge.recipe": json.dumps([step])})
    onnx.save(model, "odd.onnx")
    code, stdout, _ = onnxmerge("inspect", "odd.onnx")
    shown = stdout[stdout.index("Made by") :]
    assert code == 0 and not {"\x1b", "\x07", "\r"} & set(shown)
    assert yaml.safe_load(shown.partition("\n")[2])["steps"][0].keys() == {evil}


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        (zip_command, package.ZipSettings()),
        (fuse, package.FuseSettings()),
        (gate, package.GateSettings()),
        (calibrate, package.Settings(steps=1)),
    ],
    ids=["zip", "fuse", "gate", "calibrate"],
)
def test_options_that_are_left_out_mean_the_same_everywhere(command: object, settings: object) -> None:
    """A recipe leaves out what a setting is anyway, so the command line must have the same default."""
    told_otherwise = {"max_drop", "steps", "labels"}  # each recipe says them
    options = inspect.signature(inspect.unwrap(command)).parameters
    for own in dataclasses.fields(settings):
        if own.name in options and own.name not in told_otherwise:
            default, ours = options[own.name].default, getattr(settings, own.name)
            if isinstance(ours, tuple):
                ours = ",".join(map(str, ours)) if isinstance(default, str) else list(ours)
            assert default == ours or (own.name == "start" and default == []), own.name


ONLY_IN_PYTHON = {
    "zip": {"measure", "rate"},
    "fuse": {"measure", "rate", "ridge"},
    "gate": {"measure", "milestones"},
    "calibrate": {
        *("feature_norm", "gamma", "label_weight", "milestones", "momentum"),
        *("relative_rate", "schedule", "weight_decay"),
    },
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("zip", package.ZipSettings),
        ("fuse", package.FuseSettings),
        ("gate", package.GateSettings),
        ("calibrate", package.Settings),
    ],
)
def test_settings_are_called_like_options(name: str, settings: type) -> None:
    options = {option.removeprefix("--") for own in get_command(app).commands[name].params for option in own.opts}
    unknown = {own.name for own in dataclasses.fields(settings) if own.name.replace("_", "-") not in options}
    assert unknown == ONLY_IN_PYTHON[name]


def test_labels_are_called_like_the_option(here: Path) -> None:
    labels = np.arange(300) % 4
    np.savez("labelled.npz", **np.load("samples.npz"), labels=labels)
    assert onnxmerge("pack", "a.onnx", "b.onnx", "-o", "both.onnx")[0] == 0
    teachers = ("--teacher", "a=a.onnx", "--teacher", "b=b.onnx", "--data", "labelled.npz", *SHORT)
    code, _, stderr = onnxmerge("calibrate", "both.onnx", *teachers, "--labels", "--steps", 2, "-o", "out")
    assert code == 0, stderr
    step = told("out/merged.onnx")["recipe"]["steps"][-1]["calibrate"]
    assert step["labels"] is True and "label-weight" not in step
