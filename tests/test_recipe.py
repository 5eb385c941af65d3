"""Recipes: what a call amounts to, and running it again."""

import shlex
from pathlib import Path

import pytest
import yaml
from test_cli import FAST, onnxmerge, pair, samples, tiny  # noqa: F401 (fixtures)
from typer.main import get_command

from onnxmerge.cli.app import app
from onnxmerge.cli.recipe import Step, arguments

ZIP = {
    "models": ["a.onnx", "b.onnx"],
    "data": "samples.npz",
    "output": "out",
    "share": 1,
    "steps": 0,
    "samples": 100,
    "max-drop": 1,
    "start": ["subspace", "keep"],
    "labels": False,
}


def written(folder: Path, *steps: dict[str, object]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"steps": list(steps)}))
    return path


def line_of(command: str, values: dict[str, object]) -> str:
    return shlex.join(arguments(Step(command, values), get_command(app).commands[command]))  # type: ignore[attr-defined]


def test_a_step_is_a_command_line() -> None:
    assert line_of("zip", ZIP) == (
        "--data samples.npz --output out --share 1 --steps 0 --samples 100 --max-drop 1 --start subspace "
        "--start keep --no-labels -- a.onnx b.onnx"
    )
    named = {"merged": "m.onnx", "against": {"a": "x.onnx", "b": "y.onnx"}, "data": {"a": "d", "b": "e"}}
    assert line_of("validate", named) == "--against a=x.onnx --against b=y.onnx --data a=d --data b=e -- m.onnx"
    for given, text in ((0.001, "0.001"), ({"a/y": 0.01}, "a/y=0.01"), ([1, "a/y=2"], "1 --atol a/y=2")):
        assert line_of("validate", {"merged": "m.onnx", "atol": given}) == f"--atol {text} -- m.onnx"
    assert line_of("zip", {"models": ["-a.onnx"], "weights": [1, 0.5]}) == "--weights 1,0.5 -- -a.onnx"


def test_a_call_tells_its_recipe_which_makes_the_same_again(
    tmp_path: Path,
    pair: tuple[Path, Path],  # noqa: F811
    samples: Path,  # noqa: F811
) -> None:
    out = tmp_path / "out"
    code, _, stderr = onnxmerge("zip", *pair, "-o", out, "--data", samples, "--share", 1, *FAST, "--seed", 3)
    assert code == 0, stderr
    told = stderr[stderr.index("steps:") :]
    ((command, values),) = yaml.safe_load(told)["steps"][0].items()
    assert command == "zip" and values["seed"] == 3 and values["share"] == "1" and "threads" not in values
    first = (out / "merged.onnx").read_bytes()
    recipe = tmp_path / "again.yaml"
    recipe.write_text(told)
    assert onnxmerge("run", recipe)[0] == 2  # nothing is overwritten unless that is asked for
    (out / "merged.onnx").unlink()
    code, _, stderr = onnxmerge("run", recipe, "--overwrite")
    assert code == 0, stderr
    assert (out / "merged.onnx").read_bytes() == first
    assert "steps:" not in stderr  # the recipe is known


def test_paths_are_relative_to_the_recipe(
    tmp_path: Path,
    pair: tuple[Path, Path],  # noqa: F811
    samples: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    check = {"merged": "out/merged.onnx", "against": ["a.onnx", "b.onnx"], "data": "samples.npz", "max-drop": 1}
    code, _, stderr = onnxmerge("run", written(tmp_path, {"zip": ZIP}, {"validate": check}))
    assert code == 0, stderr
    assert "step 2 of 2: onnxmerge validate" in stderr
    assert (tmp_path / "out/merged.onnx").exists() and not list(elsewhere.iterdir())


def test_the_first_step_that_fails_ends_the_run(
    tmp_path: Path,
    pair: tuple[Path, Path],  # noqa: F811
    samples: Path,  # noqa: F811
) -> None:
    check = {"merged": "a.onnx", "against": ["a.onnx"], "data": "samples.npz", "min-speedup": 1000}
    recipe = written(tmp_path, {"zip": {**ZIP, "max-drop": 0, "share": 2}}, {"validate": check})
    code, _, stderr = onnxmerge("run", recipe)
    assert code == 1 and "step 1 of 2" in stderr and "step 2 of 2" not in stderr


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"zap": ZIP}, "step 1 (zap): there is no such command"),
        ({"run": {"recipe": "recipe.yaml"}}, "step 1 (run): there is no such command"),
        ({"zip": {**ZIP, "shares": 1}}, "there is no 'shares'; zip has models, data, output, share"),
        ({"zip": {**ZIP, "steps": "many"}}, "'--steps'"),
        ({"zip": {**ZIP, "steps": -1}}, "'--steps'"),
        ({"zip": {**ZIP, "labels": "maybe"}}, "labels is true or false"),
        ({"zip": {**ZIP, "seed": None}}, "seed cannot be None"),
        ({"zip": "a.onnx"}, "no mapping"),
        ({"zip": ZIP, "pack": ZIP}, "a step is one command"),
        ({"zip": {**ZIP, "data": "os:getcwd"}}, "--trust-code"),
        ({"zip": {**ZIP, "data": {"a": "os:getcwd", "b": "samples.npz"}}}, "--trust-code"),
    ],
)
def test_a_bad_recipe_is_refused_before_anything_runs(tmp_path: Path, step: dict[str, object], said: str) -> None:
    before = [] if "step 1" in said else [{"inspect": {"model": "absent.onnx"}}]
    code, _, stderr = onnxmerge("run", written(tmp_path, *before, step))
    assert code == 2 and said in stderr and "recipe.yaml: step" in stderr
    assert "absent.onnx" not in stderr  # the step before did not run


@pytest.mark.parametrize(
    "text", ["", "steps", "steps: {}", "other: []", "steps: [zip]", "a: !!python/name:os.system", "{"]
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    code, _, stderr = onnxmerge("run", path)
    assert code == 2 and "recipe.yaml" in stderr and "Traceback" not in stderr
    assert onnxmerge("run", tmp_path / "absent.yaml")[0] == 2


def test_a_dry_run_prints_the_commands(tmp_path: Path) -> None:
    code, stdout, _ = onnxmerge("run", written(tmp_path, {"zip": ZIP}), "--dry-run", "--overwrite")
    assert code == 0 and stdout.startswith("onnxmerge zip --overwrite --data samples.npz")
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml"}


def test_passes_are_listed() -> None:
    code, stdout, _ = onnxmerge("passes", "--json")
    found = {own["name"]: own for own in yaml.safe_load(stdout)}
    assert code == 0 and found["Permute"]["preserves"] == "exact" and found["Refit"]["preserves"] == "approximate"
    assert all(own["summary"] for own in found.values())
