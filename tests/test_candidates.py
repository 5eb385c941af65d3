"""The shelf of finished candidates: whole models with their recipe, damage noticed, the chosen one on its own."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from graphs import Net, execute

import onnxmerge.ir.save
from onnxmerge.ir.load import load
from onnxmerge.methods.candidates import Shelf
from onnxmerge.methods.recipe import Recipe
from onnxmerge.report.recipe import Made, history
from onnxmerge.report.schema import Candidate
from onnxmerge.runtime.session import open_session, run

RECIPE = Recipe(Made("zip", {"seed": 1}, {"a.onnx": "0" * 64}, {"onnxmerge": "1.0"}), ["a", "b"], "fingerprint")


@pytest.fixture(params=["in one file", "weights beside"])
def shelf(tmp_path, request, monkeypatch):
    if request.param == "weights beside":
        monkeypatch.setattr(onnxmerge.ir.save, "_INLINE_LIMIT", 1000)
    return Shelf(tmp_path, RECIPE, resume=True)


@pytest.fixture
def model(tmp_path):
    net = Net(0)
    net.head(net.relu(net.conv(net.input(["N", 3, 10, 10]), 16)))
    folder = tmp_path / "original"
    folder.mkdir()
    onnx.save(net.proto(), folder / "a.onnx")
    return load(folder / "a.onnx")


def put(shelf, model):
    path = str(shelf.write("k1", model))
    candidate = Candidate(name="k1", share=1, path=path, parameters=1, bytes=1, tasks={}, steps=0, seconds=0.0)
    shelf.put(candidate)
    return candidate


def test_what_is_chosen_stands_on_its_own(shelf, model, tmp_path):
    put(shelf, model)
    shelf.choose("k1")
    for file in tmp_path.glob("k1*"):
        file.unlink()
    merged = onnx.load(tmp_path / "merged.onnx")
    feed = {"x": np.random.default_rng(0).normal(size=(2, 3, 10, 10)).astype(np.float32)}
    found = run(open_session(tmp_path / "merged.onnx", threads=1), feed)
    wanted = execute(model, feed)
    assert found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)
    carried = {entry.key: entry.value for entry in merged.metadata_props}
    assert history(carried) == [RECIPE.step] and set(json.loads(carried["onnxmerge.tasks"])) == {"a", "b"}
    shelf.choose(None)
    assert not list(tmp_path.glob("merged*"))


def test_a_damaged_file_is_not_taken_again(shelf, model, tmp_path):
    candidate = put(shelf, model)
    assert shelf.get("k1") == candidate
    for file in tmp_path.glob("k1.onnx*"):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert shelf.get("k1") is None
        file.write_bytes(content)
    assert shelf.get("k1") == candidate
    assert Shelf(tmp_path, replace(RECIPE, fingerprint="another"), resume=True).get("k1") is None
