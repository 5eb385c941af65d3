"""quantize: 8-bit integers and float16, and what that costs each task."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import Net, chain, execute
from test_cli import onnxmerge, pair, samples, tiny  # noqa: F401 (fixtures)

from onnxmerge.methods.quantize import quantize_model
from onnxmerge.report.recipe import RECIPE, history
from onnxmerge.runtime.quantize import join_ranges, measure_ranges
from onnxmerge.runtime.session import open_session, run

FAST = ("--no-measure", "--threads", 1)


@pytest.fixture
def merged(tmp_path: Path, pair: tuple[Path, Path], samples: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    first = onnx.load(pair[0])
    onnx.helper.set_model_props(first, {"owner": "me"})
    onnx.save(first, pair[0])
    assert onnxmerge("pack", *pair, "-o", "merged.onnx")[0] == 0
    return tmp_path / "merged.onnx"


def ends(path: Path) -> list[tuple[str, int]]:
    graph = onnx.load(path).graph
    return [(value.name, value.type.tensor_type.elem_type) for value in (*graph.input, *graph.output)]


@pytest.mark.parametrize(("to", "error"), [("int8", 0.1), ("float16", 1e-2)])
def test_a_merged_model_stays_one(merged: Path, pair: tuple[Path, Path], to: str, error: float) -> None:  # noqa: F811
    line = ("quantize", merged, "--to", to, "--data", "samples.npz", *FAST, "--json")
    code, stdout, stderr = onnxmerge(*line, "-o", "out.onnx")
    assert code == 0, stderr
    result = json.loads(stdout)
    (candidate,) = result["candidates"]
    assert result["method"] == "quantize" and result["chosen"] == to
    assert set(candidate["tasks"]) == {"a", "b"}
    for score in candidate["tasks"].values():
        assert 0 < score["relative_error"] < error and score["agreement"] > 0.8
    assert candidate["bytes"] == Path("out.onnx").stat().st_size
    assert ends(Path("out.onnx")) == ends(merged)
    kept = {p.key: p.value for p in onnx.load(merged).metadata_props}
    found = {p.key: p.value for p in onnx.load("out.onnx").metadata_props}
    assert {name for name in {*kept, *found} if kept.get(name) != found.get(name)} == {RECIPE}
    assert history(found)[:-1] == history(kept) and history(found)[-1].options["to"] == to
    assert onnxmerge(*line, "-o", "again.onnx")[0] == 0
    assert Path("again.onnx").read_bytes() == Path("out.onnx").read_bytes()
    assert onnxmerge(*line, "-o", "again.onnx")[0] == 2
    against = ("--against", "a.onnx", "--against", "b.onnx", "--data", "samples.npz", "--threads", 1)
    code, stdout, stderr = onnxmerge("validate", "out.onnx", *against, "--json")
    assert code == 0, stderr
    (validated,) = json.loads(stdout)["candidates"]
    for task, score in candidate["tasks"].items():  # the file itself is judged, not what folding makes of it
        assert validated["tasks"][task]["relative_error"] == pytest.approx(score["relative_error"], rel=1e-5)
    assert onnxmerge("extract", "out.onnx", "--task", "b", "-o", "back.onnx")[0] == 0
    x = np.load("samples.npz")["x"][:20]
    ours, theirs = execute(onnx.load("back.onnx"), {"x": x}), execute(onnx.load(pair[1]), {"x": x})
    assert np.linalg.norm(ours["logits"] - theirs["logits"]) < error * np.linalg.norm(theirs["logits"])


def test_weights_are_integers_by_channel_and_norms_are_folded(tmp_path: Path) -> None:
    onnx.save(chain().proto(), tmp_path / "a.onnx")
    result, _ = quantize_model(tmp_path / "a.onnx", tmp_path / "b.onnx", "int8", ["noise"], measure=False)
    graph = onnx.load(tmp_path / "b.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert "QuantizeLinear" in kinds and "BatchNormalization" not in kinds
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    for conv in (node for node in graph.node if node.op_type == "Conv"):
        weight, scales = (arrays[name] for name in makers[conv.input[1]].input[:2])
        assert weight.data_type == onnx.TensorProto.INT8 and list(scales.dims) == [weight.dims[0]]
    assert any("made up" in note for note in result.notes)


def test_layers_can_stay_in_float(merged: Path) -> None:
    line = ("quantize", merged, "--to", "int8", "--data", "samples.npz", *FAST)
    assert onnxmerge(*line, "-o", "all.onnx")[0] == 0
    code, _, stderr = onnxmerge(*line, "-o", "some.onnx", "--keep", "b/w3")
    assert code == 0, stderr
    graph = onnx.load("some.onnx").graph
    makers = {node.output[0]: node for node in graph.node}
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    heads = {node.name: node for node in graph.node if node.op_type == "Gemm"}
    assert heads["b/head"].input[1] in arrays and makers[heads["a/head"].input[1]].op_type == "DequantizeLinear"
    code, _, stderr = onnxmerge(*line, "-o", "none.onnx", "--keep", "absent")
    assert code == 2 and "--keep absent" in stderr and "b/w3" in stderr and not Path("none.onnx").exists()


def test_a_head_has_the_range_of_its_own_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Task b's samples are a hundred times larger; the range of a's head does not know them, what is shared does."""
    monkeypatch.chdir(tmp_path)
    a, b = onnx.load(tiny(tmp_path / "a.onnx")), onnx.load(tiny(tmp_path / "b.onnx"))
    head = next(tensor for tensor in b.graph.initializer if tensor.name == "w3")
    head.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(head), "w3"))
    onnx.save(b, "b.onnx")
    x = np.random.default_rng(0).random((40, 1, 8, 8), np.float32)
    np.savez("small.npz", x=x)
    np.savez("large.npz", x=100 * x)
    assert onnxmerge("pack", "a.onnx", "b.onnx", "-o", "merged.onnx")[0] == 0
    data = ("--data", "a=small.npz", "--data", "b=large.npz", *FAST)
    code, _, stderr = onnxmerge("quantize", "merged.onnx", "-o", "out.onnx", "--to", "int8", *data)
    assert code == 0, stderr
    graph = onnx.load("out.onnx").graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    scale = {node.output[0]: float(arrays[node.input[1]]) for node in graph.node if node.output[0].endswith("logits")}
    assert len(a.graph.output) == 1 and 20 < scale["b/logits"] / scale["a/logits"] < 500


def test_ranges_are_those_of_all_batches(tmp_path: Path) -> None:
    net = Net()
    net.output(net.op("Relu", net.matmul(net.input(["N", 3]), 2)))
    model = onnx.shape_inference.infer_shapes(net.proto())
    onnx.save(model, tmp_path / "a.onnx")
    batches = [{"x": np.full((2, 3), value, np.float32)} for value in (1, -5, 7, 2)]
    found = measure_ranges(tmp_path / "a.onnx", iter(batches))
    assert [float(end.item()) for end in found["x"]] == [-5, 7]
    joined = join_ranges(
        [{"x": (np.array(-1), np.array(2))}, {"x": (np.array(0), np.array(3)), "y": (np.array(1),) * 2}]
    )
    assert joined == {"x": (-1, 3), "y": (1, 1)}


def test_a_bound_that_is_broken_leaves_nothing_behind(merged: Path) -> None:
    np.savez("noise.npz", x=np.random.default_rng(0).standard_normal((2000, 1, 8, 8)).astype(np.float32))
    line = ("quantize", merged, "-o", "out.onnx", "--to", "int8", "--data", "noise.npz", *FAST, "--max-drop")
    code, stdout, stderr = onnxmerge(*line, 0, "--json")
    assert code == 1 and "nothing was written" in stderr and json.loads(stdout)["chosen"] is None
    assert not Path("out.onnx").exists()
    assert onnxmerge(*line, 1)[0] == 0 and Path("out.onnx").exists()


def test_what_float16_cannot_hold_is_told(tmp_path: Path) -> None:
    net = Net()
    x = net.op("Mul", net.matmul(net.input(["N", 3]), 4), net.constant(np.float32(1e6)), name="big")
    net.output(net.op("Mul", x, net.constant(np.float32(1e-6)), name="small"))
    onnx.save(net.proto(), tmp_path / "a.onnx")
    line = ("quantize", tmp_path / "a.onnx", "-o", tmp_path / "b.onnx", "--to", "float16", *FAST)
    code, _, stderr = onnxmerge(*line)
    assert code == 3 and "the value 'big' reaches" in stderr and "Mul_big, Mul_small" in stderr
    assert not (tmp_path / "b.onnx").exists()
    code, _, stderr = onnxmerge(*line, "--keep", "Mul_big", "--keep", "Mul_small")
    assert code == 0, stderr
    kinds = {tensor.data_type for tensor in onnx.load(tmp_path / "b.onnx").graph.initializer}
    assert kinds == {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "int8"], "int8 needs samples"),
        (["--to", "int8", "--data", "absent.npz"], "absent.npz"),
        (["--to", "int8", "--data", "c=samples.npz"], "there is no task 'c'; the tasks are a, b"),
        (["--to", "int4", "--data", "samples.npz"], "'--to'"),
    ],
)
def test_what_a_user_meets(merged: Path, arguments: list[str], said: str) -> None:
    code, _, stderr = onnxmerge("quantize", merged, "-o", "out.onnx", *arguments)
    assert code == 2 and said in stderr and not Path("out.onnx").exists()


def test_one_network_and_not_twice(
    tmp_path: Path,
    pair: tuple[Path, Path],  # noqa: F811
    samples: Path,  # noqa: F811
) -> None:
    line = ("--to", "int8", "--data", samples, "--threads", 1)
    code, stdout, stderr = onnxmerge("quantize", pair[0], "-o", tmp_path / "c.onnx", *line)
    assert code == 0 and "the original" in " ".join(stdout.split()), stderr
    code, _, stderr = onnxmerge("quantize", tmp_path / "c.onnx", "-o", tmp_path / "d.onnx", *line)
    assert code == 2 and "is quantized already" in stderr


def test_tasks_with_inputs_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: Path) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    tiny(Path("a.onnx"), 1), tiny(Path("b.onnx"), 2)
    assert onnxmerge("pack", "a.onnx", "b.onnx", "-o", "merged.onnx", "--separate-inputs")[0] == 0
    line = ("quantize", "merged.onnx", "-o", "out.onnx", "--to", "int8", "--data", samples, "--threads", 1, "--json")
    code, stdout, stderr = onnxmerge(*line)
    assert code == 0, stderr
    assert [name for name, _ in ends(Path("out.onnx"))] == ["a/x", "b/x", "a/logits", "b/logits"]
    (candidate,) = json.loads(stdout)["candidates"]
    assert set(candidate["tasks"]) == {"a", "b"} and candidate["latency_ms"]["speedup"] > 0


@pytest.mark.parametrize("to", ["int8", "float16"])
def test_external_data_stay_external(tmp_path: Path, samples: Path, to: str) -> None:  # noqa: F811
    model = onnx.load(tiny(tmp_path / "a.onnx", hidden=64))
    onnx.save(model, tmp_path / "b.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    line = ("--to", to, "--data", samples, *FAST)
    code, _, stderr = onnxmerge("quantize", tmp_path / "b.onnx", "-o", tmp_path / "c.onnx", *line)
    assert code == 0, stderr
    assert (tmp_path / "c.onnx.data").exists()
    x = np.load(samples)["x"][:20]
    ours = run(open_session(tmp_path / "c.onnx"), {"x": x})["logits"]
    theirs = execute(onnx.load(tmp_path / "a.onnx"), {"x": x})["logits"]
    assert np.linalg.norm(ours - theirs) < 0.1 * np.linalg.norm(theirs)
