"""YAML that is no data, or too much of it: one sentence, for cards and recipes alike."""

import pathlib
import signal
import sys

import numpy as np
import pytest
from test_cli import onnxmerge, tiny

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 12)
)
HOSTILE = {
    "a tag of Python": "!!python/object/apply:os.system [touch sprung]",
    "a name of Python": "{steps: !!python/name:os.system }",
    "an own tag": "!mine {steps: []}",
    "a bomb": BOMB + "steps: [{zip: {models: *a11}}]",
    "a list in itself": "steps: &a [*a]",
    "a mapping in itself": "&a {steps: *a}",
    "nested too deep": "[" * 20_000,
    "no date": "file: 2020-13-45",
    "no truth value": "file: !!bool perhaps",
    "no time": "file: !!timestamp soon",
    "no integer": "file: 0x_",
    "an integer too long": "file: " + "9" * 5000,
    "a time out of range": "file: 0001-01-01t00:00:00+14:00",
    "a byte": "steps: [\x00]",
    "a key that is a list": "{[a]: b}",
    "a merge of nothing": "<<: 3",
    "two documents": "steps: []\n---\nsteps: []",
    "no UTF-8": "steps: \udcff",
}


@pytest.fixture(autouse=True)
def limited():
    if sys.platform != "win32":
        signal.alarm(60)  # ends the process
    yield
    if sys.platform != "win32":
        signal.alarm(0)


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_yaml(kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.yaml"
    path.write_bytes(HOSTILE[kind].encode("utf-8", "surrogateescape"))
    models = [tiny(tmp_path / f"{name}.onnx", seed) for seed, name in enumerate("ab")]
    for arguments in (["run", path], ["zip", *models, "--data", path, "-o", tmp_path / "out"]):
        code, _, said = onnxmerge(*arguments)
        assert code == 2 and said.startswith(f"onnxmerge: error: {path}: ") and said.count("\n") == 1, said
    assert {file.name for file in tmp_path.iterdir()} == {"hostile.yaml", "a.onnx", "b.onnx"}


def test_aliases_may_be_used(tmp_path: pathlib.Path) -> None:
    models = [tiny(tmp_path / f"{name}.onnx", seed) for seed, name in enumerate("ab")]
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 1, 8, 8), np.float32))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"steps:\n- pack: {{models: &both [{models[0]}, {models[1]}], output: p.onnx}}\n"
        "- zip: {models: *both, data: x.npz, output: out, dry-run: true}\n"
    )
    code, stdout, stderr = onnxmerge("run", recipe, "--dry-run")
    assert code == 0 and stdout.count(str(models[1])) == 2, stderr
