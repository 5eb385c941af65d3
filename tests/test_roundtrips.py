"""What leaves for other tools and comes back is still what it was: the law holds, and outputs are equal."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import execute, feeds_for
from test_cli import DEMO, SHARED, onnxmerge

from onnxmerge import ZipSettings, zip_models
from onnxmerge.methods.zip.choices import Start
from onnxmerge.report.recipe import RECIPE, history

EDITS = '''
import numpy as np
import onnx_graphsurgeon as gs


def twice_negated(graph):
    """Put two Negs behind the first node: what it makes stays."""
    node = graph.nodes[0]
    made = node.outputs[0]
    inner, outer = (gs.Variable(f"{made.name}_{end}", dtype=made.dtype, shape=made.shape) for end in ("a", "b"))
    for reader in list(made.outputs):
        reader.inputs = [outer if value is made else value for value in reader.inputs]
    graph.nodes += [gs.Node("Neg", inputs=[made], outputs=[inner]), gs.Node("Neg", inputs=[inner], outputs=[outer])]
    return graph.toposort()


def halved(graph):
    """Halve the first weight, in place."""
    weight = next(value for value in graph.tensors().values() if isinstance(value, gs.Constant))
    weight.values = weight.values * np.float32(0.5)


def cut(graph):
    """Take a node out and leave its readers."""
    del graph.nodes[0]


def another_output(graph):
    """Show what the first node makes."""
    graph.outputs.append(graph.nodes[0].outputs[0])


def no_graph(graph):
    """Return what is none."""
    return graph.nodes
'''


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    assert onnxmerge("pack", DEMO / "digits.onnx", DEMO / "fashion.onnx", "-o", folder / "packed.onnx")[0] == 0
    settings = ZipSettings(share="3", start=(Start.SUBSPACE,), steps=0, samples=100, max_drop=None, measure=False)
    data = {task: DEMO / f"{task}.yaml" for task in ("digits", "fashion")}
    zip_models([DEMO / "digits.onnx", DEMO / "fashion.onnx"], data, folder / "zipped", settings=settings)
    (folder / "zipped/merged.onnx").rename(folder / "zipped.onnx")
    return folder


def through_surgeon(source: Path, target: Path) -> None:
    surgeon = pytest.importorskip("onnx_graphsurgeon")
    graph = surgeon.import_onnx(onnx.load(source))
    onnx.save(surgeon.export_onnx(graph.fold_constants().cleanup().toposort()), target)


def through_polygraphy(source: Path, target: Path) -> None:
    pytest.importorskip("onnx_graphsurgeon")
    pytest.importorskip("polygraphy")
    from polygraphy.backend.onnx import FoldConstants, InferShapes, OnnxFromPath, SaveOnnx

    SaveOnnx(FoldConstants(InferShapes(OnnxFromPath(str(source)))), str(target))()


def law_holds(path: Path) -> bool:
    code, stdout, stderr = onnxmerge("inspect", path, "--check", "--json", "--threads", 1)
    assert code == 0, stderr
    found = json.loads(stdout)
    return found["check"]["passed"] and found["permutable_parameters_share"] > 0.9


def same_outputs(first: Path, second: Path) -> None:
    feeds = feeds_for(onnx.load(first))
    ours, theirs = (execute(onnx.load(path), feeds) for path in (first, second))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(theirs[name], array, rtol=1e-4, atol=1e-4 * np.abs(array).max())


@pytest.mark.parametrize("through", [through_surgeon, through_polygraphy])
@pytest.mark.parametrize("name", ["packed.onnx", "zipped.onnx"])
def test_a_merged_model_comes_back(merged: Path, tmp_path: Path, name: str, through) -> None:  # type: ignore[no-untyped-def]
    through(merged / name, tmp_path / "back.onnx")
    assert law_holds(tmp_path / "back.onnx")
    same_outputs(merged / name, tmp_path / "back.onnx")
    assert onnxmerge("extract", tmp_path / "back.onnx", "--task", "fashion", "-o", tmp_path / "fashion.onnx")[0] == 0
    both = onnx.load(merged / name)
    feeds = feeds_for(both)
    one = execute(onnx.load(tmp_path / "fashion.onnx"), feeds)
    np.testing.assert_allclose(one["logits"], execute(both, feeds)["fashion/logits"], rtol=1e-3, atol=1e-4)


def test_polygraphy_runs_it_with_the_same_outputs(merged: Path) -> None:
    pytest.importorskip("polygraphy")
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    model = onnx.load(merged / "zipped.onnx")
    feeds = feeds_for(model)
    with OnnxrtRunner(SessionFromOnnx(str(merged / "zipped.onnx"))) as runner:
        found = runner.infer(feeds)
    for name, array in execute(model, feeds).items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", ["int8", "float16"])
def test_a_quantized_model_is_read_like_any_other(merged: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / "low.onnx"
    data = [part for task in ("digits", "fashion") for part in ("--data", f"{task}={DEMO / task}.yaml")]
    line = ("quantize", merged / "zipped.onnx", "-o", out, "--to", to, *data, "--samples", 50, "--no-measure", "--json")
    code, stdout, stderr = onnxmerge(*line)
    assert code == 0, stderr
    for score in json.loads(stdout)["candidates"][0]["tasks"].values():
        assert score["agreement"] > 0.97 and score["accuracy"] > score["original_accuracy"] - 0.02
    assert law_holds(out)
    if to == "int8":
        through_surgeon(out, tmp_path / "back.onnx")
        same_outputs(out, tmp_path / "back.onnx")


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_a_real_networks_normal_form_comes_back(tmp_path: Path) -> None:
    out, back = tmp_path / "folded.onnx", tmp_path / "back.onnx"
    assert onnxmerge("apply", SHARED / "resnet8_cifar10.onnx", "-o", out, "--pass", "FoldBatchNorm")[0] == 0
    through_surgeon(out, back)
    assert law_holds(back)
    same_outputs(SHARED / "resnet8_cifar10.onnx", back)


def test_a_recipe_deploys_what_was_merged(merged: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs/recipes.md").read_text(encoding="utf-8")
    _, steps = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "zipped").mkdir()
    shutil.copy(merged / "zipped.onnx", tmp_path / "zipped/merged.onnx")
    for task in ("digits", "fashion"):
        for suffix in ("yaml", "npz"):
            shutil.copy(DEMO / f"{task}.{suffix}", tmp_path)
    (tmp_path / "recipe.yaml").write_text(f"steps:\n{steps}")
    code, _, stderr = onnxmerge("run", tmp_path / "recipe.yaml")
    assert code == 0, stderr
    assert (tmp_path / "repository/both/1/model.onnx").read_bytes() == (tmp_path / "int8.onnx").read_bytes()
    assert "max_batch_size: 16" in (tmp_path / "repository/both/config.pbtxt").read_text()


# --- a user's edits ---------------------------------------------------------------------------------------------------


@pytest.fixture
def edits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("onnx_graphsurgeon")
    monkeypatch.chdir(tmp_path)
    Path("users_edits.py").write_text(EDITS)
    monkeypatch.delitem(__import__("sys").modules, "users_edits", raising=False)
    return tmp_path


def test_an_edit_keeps_metadata_and_names(merged: Path, edits: Path) -> None:
    line = ("apply", merged / "zipped.onnx", "--edit", "users_edits:twice_negated", "--exact")
    code, stdout, stderr = onnxmerge(*line, "-o", "out.onnx", "--json")
    assert code == 0, stderr
    assert max(json.loads(stdout)["steps"][0]["differences"].values()) < 1e-4
    before, after = onnx.load(merged / "zipped.onnx"), onnx.load("out.onnx")
    assert [node.op_type for node in after.graph.node].count("Neg") == 2
    kept, found = ({p.key: p.value for p in model.metadata_props} for model in (before, after))
    assert {name for name in {*kept, *found} if kept.get(name) != found.get(name)} == {RECIPE}
    assert history(found)[-1].options["edit"] == ["users_edits:twice_negated"]
    assert (after.producer_name, after.ir_version) == (before.producer_name, before.ir_version)
    assert onnxmerge(*line, "-o", "again.onnx")[0] == 0
    assert Path("again.onnx").read_bytes() == Path("out.onnx").read_bytes()
    data = [part for task in ("digits", "fashion") for part in ("--data", f"{task}={DEMO / task}.yaml")]
    against = [part for task in ("digits", "fashion") for part in ("--against", DEMO / f"{task}.onnx")]
    assert onnxmerge("validate", "out.onnx", *against, *data, "--samples", 50)[0] == 0
    assert onnxmerge("extract", "out.onnx", "--task", "digits", "-o", "digits.onnx")[0] == 0
    assert law_holds(Path("digits.onnx"))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["halved"], 0, ""),
        (["halved", "--exact"], 1, "users_edits:halved shall keep outputs equal, but 'digits/logits' differs by"),
        (["cut"], 3, "users_edits:cut: what it makes is no well-formed model"),
        (["another_output"], 2, "there is a new output"),
        (["another_output", "--change-interface"], 0, ""),
        (["no_graph"], 2, "users_edits:no_graph: failed with TypeError: it returned"),
        (["absent"], 2, "has no attribute 'absent'"),
    ],
)
def test_what_an_editor_meets(merged: Path, edits: Path, arguments: list[str], code: int, said: str) -> None:
    name, *options = arguments
    line = ("apply", merged / "packed.onnx", "-o", "out.onnx", "--edit", f"users_edits:{name}", *options)
    found, _, stderr = onnxmerge(*line)
    assert found == code and said in stderr and "Traceback" not in stderr, stderr
    assert Path("out.onnx").exists() == (code == 0)


def test_the_pages_edit(merged: Path, edits: Path) -> None:
    page = (Path(__file__).parents[1] / "docs/deploy.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    Path("pages_edit.py").write_text(code)
    line = ("apply", merged / "zipped.onnx", "-o", "out.onnx", "--edit", "pages_edit:name_classes")
    assert "there is a new output 'digits/class'" in onnxmerge(*line)[2]
    code, _, stderr = onnxmerge(*line, "--change-interface")
    assert code == 0, stderr
    model = onnx.load("out.onnx")
    found = execute(model, feeds_for(model))
    np.testing.assert_array_equal(found["fashion/class"], found["fashion/logits"].argmax(axis=1))


def test_external_data_stay_external(edits: Path) -> None:
    model = onnx.load(DEMO / "digits.onnx")
    onnx.save(model, "a.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    line = ("apply", "a.onnx", "-o", "out.onnx", "--edit", "users_edits:twice_negated", "--pass", "FoldBatchNorm")
    code, _, stderr = onnxmerge(*line)
    assert code == 0, stderr
    assert Path("out.onnx.data").exists()
    same_outputs(Path("out.onnx"), DEMO / "digits.onnx")
