"""gate on networks with heads of their own: one body put together from the best channels of all, and every head."""

import json

import numpy as np
import onnx
import pytest
from gating import Wide, with_gates
from graphs import Net, execute, feeds_for, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import onnxmerge
from onnxmerge.cli.app import app
from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.load import load
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.methods.check import check_spaces
from onnxmerge.methods.gate.plan import make_gate_plan
from onnxmerge.methods.task import load_networks
from onnxmerge.passes.fold_gates import FoldGates
from onnxmerge.passes.gate_places import find_gate_places
from onnxmerge.passes.prune import Prune
from onnxmerge.passes.widen_body import WidenBody

TASKS = ("a", "b", "c")


def classifier(seed: int, classes: int, end: str = "plain", width: int = 8) -> Net:
    """A stem, a block with a skip, and a head: one layer, with a Softmax, or with a hidden layer of its own."""
    net = Net(seed)
    x = net.relu(net.norm(net.conv(net.input(["N", 3, 8, 8]), width)))
    x = net.relu(net.op("Add", net.norm(net.conv(net.relu(net.norm(net.conv(x, 6))), width)), x))
    x = net.flatten(net.op("GlobalAveragePool", x), width)
    x = net.gemm(x, classes)
    if end == "softmax":
        x = net.op("Softmax", x, channels=classes)
    net.output(x)
    return net


def tokens(seed: int, classes: int, end: str = "plain") -> Net:
    net = Net(seed)
    x = net.relu(net.matmul(net.relu(net.matmul(net.input(["N", 5, 6]), 9)), 7))
    x = net.matmul(x, classes)
    net.output(net.op("Sigmoid", x, channels=classes) if end == "softmax" else x)
    return net


def two_outputs(seed: int, classes: int, end: str = "plain") -> Net:
    """One head that reads the middle of the body, one that reads its end."""
    net = Net(seed)
    x = net.relu(net.gemm(net.input(["N", 6]), 10))
    y = net.relu(net.gemm(x, 8))
    net.output(net.gemm(x, 3))
    net.output(net.gemm(y, classes))
    return net


def transformer(seed: int, classes: int, end: str = "plain") -> Net:
    """Attention of two heads and a dense pair beside a skip, both behind norms; the mean over tokens is classified."""
    net = Net(seed)
    x = net.matmul(net.input(["N", 5, 6]), 8)
    y = net.op("LayerNormalization", x, net.uniform(8), net.normal(8), channels=8, axis=-1)
    made = []
    for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
        made.append(net.op("Transpose", net.op("Reshape", net.matmul(y, 8), net.ints(0, 5, 2, 4)), perm=order))
    mixed = net.op("MatMul", net.op("Softmax", net.op("MatMul", made[0], made[1]), axis=-1), made[2])
    mixed = net.op("Reshape", net.op("Transpose", mixed, perm=[0, 2, 1, 3]), net.ints(0, 5, 8), channels=8)
    x = net.op("Add", x, net.matmul(mixed, 8), channels=8)
    y = net.op("LayerNormalization", x, net.uniform(8), net.normal(8), channels=8, axis=-1)
    x = net.op("Add", x, net.matmul(net.relu(net.matmul(y, 12)), 8), channels=8)
    x = net.gemm(net.op("ReduceMean", x, net.ints(1), keepdims=0, channels=8), classes)
    net.output(net.op("Softmax", x, channels=classes) if end == "softmax" else x)
    return net


KINDS = {"residual": classifier, "tokens": tokens, "two outputs": two_outputs, "transformer": transformer}
HEADS = [(4, "plain"), (7, "softmax"), (4, "plain")]


def networks(kind: str, count: int = 2, seed: int = 0) -> list[onnx.ModelProto]:
    return [KINDS[kind](seed + n, *HEADS[n]).proto() for n in range(count)]


def widened(kind: str, count: int = 2, seed: int = 0) -> Wide:
    models = [KINDS[kind](seed + n, *HEADS[n]).model() for n in range(count)]
    wide = WidenBody(dict(zip(TASKS[1:], models[1:], strict=False)), "a")(models[0]).model
    return Wide(models, wide, find_gate_places(wide, models[0], count, 1 / count))


def assert_each_network_is_there(models, got, tolerance=1e-5) -> None:
    for task, model in zip(TASKS, models, strict=False):
        for name, wanted in execute(model, feeds_for(model, batch=3)).items():
            assert relative_error(wanted, got[f"{task}/{name}"]) < tolerance


# --- the graph --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_output_is_its_networks_own_while_gates_are_open(kind, count):
    own = widened(kind, count)
    assert_each_network_is_there(own.networks, with_gates(own, np.ones(own.places.count)))
    assert len(own.model.graph.inputs) == 1
    assert all(space.space.size % count == 0 for space in own.places.spaces)
    assert bool(own.places.whole) == (kind == "transformer")


@settings(max_examples=15)
@given(kind=st.sampled_from(list(KINDS)), count=st.integers(2, 3), seed=st.integers(0, 99))
def test_the_pruned_network_is_the_widened_one_with_closed_gates(kind, count, seed):
    own = widened(kind, count)
    importance = np.random.default_rng(seed).uniform(0.1, 1.0, own.places.count)
    kept = own.places.kept(importance)
    gates = np.where(own.places.closed(kept), 0, importance)
    pruned = Prune(kept, own.places.all_spaces)(FoldGates(own.places, gates)(own.model).model).model
    wanted, got = with_gates(own, gates), execute(pruned, feeds_for(own.model, batch=3))
    for name, array in wanted.items():
        assert np.abs(array - got[name]).max() < 1e-5 * max(np.abs(array).max(), 1e-2)
    assert check_spaces(pruned, find_spaces(pruned), seed=seed, threads=1).passed


def test_heads_read_through_the_bodys_gates():
    own = widened("residual")
    (heads,) = [value for value in own.places.values if len(value.readers) == 2 and value.rank == 2]
    nodes = list(own.model.graph)
    assert {nodes[number].op_type for number in heads.readers} == {"Gemm"}
    assert sorted(nodes[n].outputs[0].name.partition("/")[0] for n in heads.readers) == ["a", "b"]


def test_bodies_that_differ_are_told_by_their_first_difference():
    first, other = classifier(0, 4).model(), classifier(1, 7, width=6).model()
    with pytest.raises(ModelError, match=r"network 2 is not of the same architecture.*Conv .*'c0' has shape"):
        WidenBody({"b": other}, "a")(first)


# --- the method -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Networks and for each its own samples with labels that its own output gives."""

    def make(kind: str = "residual", count: int = 2, labels: bool = True):
        for number, proto in enumerate(networks(kind, count)):
            task = TASKS[number]
            onnx.save(proto, tmp_path / f"{task}.onnx")
            x = np.random.default_rng(number).standard_normal((160, 3, 8, 8)).astype(np.float32)
            (logits,) = execute(load(tmp_path / f"{task}.onnx"), {"x": x}).values()
            np.savez(tmp_path / f"{task}.npz", x=x, **({"labels": logits.argmax(1)} if labels else {}))
        return tmp_path

    return make


def gate(path, tasks="ab", one: bool = False, **more):
    own = onnxmerge.GateSettings(**{"measure": False, "threads": 1, "gate_steps": 12, "steps": 12} | more)
    data = path / "a.npz" if one else {task: path / f"{task}.npz" for task in tasks}
    files = [path / f"{task}.onnx" for task in tasks]
    return onnxmerge.gate_models(files, data, path / "out", settings=own, overwrite=True)


def test_outputs_that_differ_are_kept_apart_and_each_is_held_against_its_own_network(folder):
    path = folder()
    result = gate(path, gate_steps=300, steps=300)
    merged = load(path / "out" / "merged.onnx")
    assert [(o.name, o.shape[1]) for o in merged.graph.outputs] == [
        (f"{task}/{load(path / f'{task}.onnx').graph.outputs[0].name}", size) for task, size in (("a", 4), ("b", 7))
    ]
    assert "Labels taught." in result.notes
    assert result.originals == {} and result.candidates[0].ensemble is None
    for task, score in result.candidates[-1].tasks.items():
        x = {"x": np.random.default_rng("ab".index(task)).standard_normal((160, 3, 8, 8)).astype(np.float32)}
        got = execute(merged, x)[f"{task}/{load(path / f'{task}.onnx').graph.outputs[0].name}"]
        (wanted,) = execute(load(path / f"{task}.onnx"), x).values()
        assert score.original_accuracy == 1.0 and score.agreement > 0.5
        assert (got.argmax(1) == wanted.argmax(1)).mean() > 0.6
    assert json.loads((path / "out" / "plan.json").read_text())["heads"] == "apart"
    body = [v for name, v in merged.graph.initializers.items() if not name.startswith(("a/", "b/"))]
    alone = load(path / "a.onnx").graph.initializers
    assert sorted(tuple(v.shape) for v in body) == sorted(
        tuple(v.shape) for v in alone.values() if tuple(v.shape) not in ((4, 8), (8, 4), (4,))
    )


def test_three_networks_without_labels_each_teach_their_own_output(folder):
    result = gate(folder(count=3, labels=False), "abc")
    assert "Each network itself taught: no labels were used." in result.notes
    assert set(result.candidates[-1].tasks) == {"a", "b", "c"}


def test_of_one_source_for_all_nobody_learns_the_labels(folder):
    path = folder()
    result = gate(path, one=True)
    assert "Labels taught." not in result.notes
    with pytest.raises(UsageError, match="its own data"):
        gate(path, one=True, labels=True)


def test_networks_with_equal_outputs_are_averaged_unless_they_are_asked_to_stay_apart(folder):
    path = folder()
    onnx.save(classifier(5, 4).proto(), path / "b.onnx")
    files = load_networks([path / "a.onnx", path / "b.onnx"], folded=False)
    assert make_gate_plan(files, onnxmerge.GateSettings()).plan.heads == "mean"
    apart = make_gate_plan(files, onnxmerge.GateSettings(heads="apart"))
    assert apart.plan.heads == "apart"
    assert [value.name.partition("/")[0] for value in apart.widened.graph.outputs] == ["a", "b"]


def test_the_same_seed_gives_the_same_bytes(folder):
    path = folder()
    gate(path)
    first = (path / "out" / "merged.onnx").read_bytes()
    gate(path)
    assert (path / "out" / "merged.onnx").read_bytes() == first


def test_a_mean_of_outputs_that_differ_is_refused_and_apart_is_named(folder):
    with pytest.raises(ModelError, match=r"b\.onnx: is not of the same architecture.*--heads apart"):
        gate(folder(), heads="mean")


def test_bodies_that_differ_are_refused_and_zip_is_named(folder):
    path = folder()
    onnx.save(classifier(1, 7, width=6).proto(), path / "b.onnx")
    with pytest.raises(ModelError, match=r"b\.onnx: is not of the same architecture.*zip networks of different tasks"):
        gate(path, heads="apart")


def test_layer_by_layer_takes_one_task_only(folder):
    with pytest.raises(UsageError, match="--layerwise"):
        gate(folder(), layerwise=True, heads="apart")
    with pytest.raises(ModelError, match="same architecture"):
        gate(folder(), layerwise=True)


def test_the_command_takes_data_of_each_task_and_its_report_tells_of_each(folder):
    path = folder()
    options = ["--data", f"a={path / 'a.npz'}", "--data", f"b={path / 'b.npz'}", "--gate-steps", 4, "--steps", 4]
    run = [path / "a.onnx", path / "b.onnx", *options, "-o", path / "out", "--threads", 1, "--heads", "apart"]
    done = CliRunner().invoke(app, ["gate", *map(str, run)])
    assert done.exit_code == 0, done.output
    assert "gates selected" in done.stdout.replace("\n", " ") and "ensemble" not in done.stdout
    page = (path / "out" / "report.html").read_text()
    assert "Gates" in page and "Stem, k" not in page
    refused = CliRunner().invoke(app, ["gate", *map(str, run[:2]), "--dry-run", "--heads", "both"])
    assert refused.exit_code == 2 and "--heads both" in refused.output
