"""What fuse plans: whose architecture, which layers stand for which; and what it refuses."""

import json
import re

import numpy as np
import onnx
import pytest
from graphs import Net, dense, execute, relative_error
from typer.testing import CliRunner

from onnxmerge.cli.app import app
from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.load import load


def write(folder, name: str, net: Net) -> None:
    onnx.save(net.proto(), folder / f"{name}.onnx")


def samples(folder, shape=(6,), count: int = 200) -> None:
    x = np.random.default_rng(0).standard_normal((count, *shape)).astype(np.float32)
    np.savez(folder / "data.npz", x=x)


def run(folder, *arguments: str):
    names = [str(folder / a) if a.endswith((".onnx", ".json")) and "/" not in a else a for a in arguments]
    return CliRunner().invoke(app, ["fuse", *names, "--data", str(folder / "data.npz"), "--threads", "1", "-q"])


def fuse(folder, *arguments: str):
    result = run(folder, *arguments, "-o", str(folder / "out"), "--overwrite")
    assert result.exit_code == 0, result.output
    return load(folder / "out" / "merged.onnx")


@pytest.fixture
def perceptrons(tmp_path):
    write(tmp_path, "deep", dense(seed=1, sizes=(6, 12, 10, 8, 4)))
    write(tmp_path, "shallow", dense(seed=2, sizes=(6, 12, 8, 4)))
    samples(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        ([], 4),
        (["--into", "shallow"], 3),
        (["--balance", "collapse"], 3),
        (["--balance", "collapse", "--rule", "average"], 3),
        (["--into", "shallow", "--balance", "add"], 4),
        (["--into", "shallow", "--balance", "add", "--rule", "transport"], 4),
        (["--balance", "keep"], 4),
    ],
)
def test_whose_depth_the_result_has(arguments, layers, perceptrons):
    assert len(find_layers(fuse(perceptrons, "deep.onnx", "shallow.onnx", *arguments))) == layers


def chain_of(seed: int, depth: int) -> Net:
    net = Net(seed)
    x = net.input(["N", 3, 10, 10])
    for _ in range(depth):
        x = net.relu(net.norm(net.conv(x, 8)))
    net.head(x)
    return net


def residual_of(seed: int, blocks: int) -> Net:
    net = Net(seed)
    x = net.relu(net.norm(net.conv(net.input(["N", 3, 10, 10]), 8)))
    for _ in range(blocks):
        branch = net.norm(net.conv(net.relu(net.norm(net.conv(x, 8))), 8))
        x = net.relu(net.op("Add", branch, x))
    net.head(x)
    return net


@pytest.mark.parametrize("kind", ["dense", "chain", "residual"])
def test_the_reference_is_deepened_exactly(kind, tmp_path):
    """--balance add --start keep is Net2Net: the shallow network itself in the deeper one's depth."""
    if kind == "dense":
        deep, shallow, shape = dense(seed=1, sizes=(6, 12, 10, 8, 4)), dense(seed=2, sizes=(6, 12, 8, 4)), (6,)
    else:
        build = {"chain": chain_of, "residual": residual_of}[kind]
        deep, shallow, shape = build(1, 4), build(2, 2), (3, 10, 10)
    write(tmp_path, "deep", deep)
    write(tmp_path, "shallow", shallow)
    samples(tmp_path, shape)
    kept = fuse(tmp_path, "deep.onnx", "shallow.onnx", "--into", "shallow", "--balance", "add", "--start", "keep")
    original = load(tmp_path / "shallow.onnx")
    assert len(find_layers(kept)) > len(find_layers(original))
    x = {"x": np.random.default_rng(3).standard_normal((8, *shape)).astype(np.float32)}
    for a, b in zip(execute(original, x).values(), execute(kept, x).values(), strict=True):
        assert relative_error(a, b) < 1e-5


def test_a_plan_is_printed_edited_and_replayed(perceptrons):
    dry = run(perceptrons, "deep.onnx", "shallow.onnx", "--dry-run", "--json")
    assert dry.exit_code == 0 and not (perceptrons / "out").exists()
    plan = json.loads(dry.stdout)
    assert plan["into"] == "deep" and len(plan["layers"]) == 3
    own = plan["maps"]["shallow"]
    first, second = own
    assert own[first] == plan["layers"][0] and own[second] == plan["layers"][2]
    fuse(perceptrons, "deep.onnx", "shallow.onnx")
    assert json.loads((perceptrons / "out" / "plan.json").read_text()) == plan
    own[second] = plan["layers"][1]
    (perceptrons / "edited.json").write_text(json.dumps(plan))
    fuse(perceptrons, "deep.onnx", "shallow.onnx", "--map", "edited.json")
    assert json.loads((perceptrons / "out" / "plan.json").read_text()) == plan
    table = run(perceptrons, "deep.onnx", "shallow.onnx", "--dry-run")
    assert plan["layers"][1] in table.stdout


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda plan: "no JSON", "is not a plan of fuse"),
        (lambda plan: json.dumps(plan | {"into": "other"}), "has no layer map of shallow into deep"),
        (
            lambda plan: json.dumps(plan | {"maps": {"shallow": {"nothing": plan["layers"][0]}}}),
            "has no layer 'nothing'",
        ),
        (
            lambda plan: json.dumps(
                plan | {"maps": {"shallow": dict(zip(plan["maps"]["shallow"], plan["layers"][1::-1], strict=True))}}
            ),
            "must increase",
        ),
    ],
)
def test_bad_plans(edit, message, perceptrons):
    plan = json.loads(run(perceptrons, "deep.onnx", "shallow.onnx", "--dry-run", "--json").stdout)
    (perceptrons / "bad.json").write_text(edit(plan))
    result = run(perceptrons, "deep.onnx", "shallow.onnx", "--map", "bad.json", "-o", str(perceptrons / "out"))
    assert result.exit_code == 2
    assert message in re.sub(r"\s+", " ", result.output) and "bad.json" in result.output
    assert not (perceptrons / "out").exists()


def normalised_locally(seed: int) -> Net:
    """An operator without a rule between two convolutions."""
    net = Net(seed)
    x = net.relu(net.conv(net.input(["N", 3, 8, 8]), 6))
    x = net.op("LRN", x, channels=6, size=3)
    net.head(net.relu(net.conv(x, 5)))
    return net


def test_an_operator_without_a_rule_in_the_middle(tmp_path):
    for seed, name in enumerate("ab"):
        write(tmp_path, name, normalised_locally(seed))
    samples(tmp_path, (3, 8, 8))
    result = run(tmp_path, "a.onnx", "b.onnx", "-o", str(tmp_path / "out"))
    assert result.exit_code == 3
    assert "LRN" in result.output and "a.onnx" in result.output and not (tmp_path / "out").exists()
    fuse(tmp_path, "a.onnx", "b.onnx", "--match", "none", "--rule", "average")


def test_no_layers_correspond(tmp_path):
    write(tmp_path, "a", dense(seed=0))
    net = Net(1)
    net.output(net.gemm(net.input(["N", 6]), 4))
    write(tmp_path, "b", net)
    samples(tmp_path)
    result = run(tmp_path, "a.onnx", "b.onnx", "-o", str(tmp_path / "out"))
    assert result.exit_code == 3 and "b.onnx" in result.output and not (tmp_path / "out").exists()


def test_few_samples_are_said(perceptrons):
    samples(perceptrons, count=12)
    fuse(perceptrons, "deep.onnx", "shallow.onnx")
    notes = json.loads((perceptrons / "out" / "report.json").read_text())["notes"]
    assert any("samples are few" in note and "deep" in note for note in notes)


def test_made_up_samples_are_said(perceptrons):
    arguments = ["fuse", str(perceptrons / "deep.onnx"), str(perceptrons / "shallow.onnx"), "--data", "noise"]
    arguments += ["-o", str(perceptrons / "out"), "--samples", "300", "--threads", "1", "-q", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert any("made up" in note for note in report["notes"])
    assert all(score["accuracy"] is None for c in report["candidates"] for score in c["tasks"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "1,1,1"], "3 weights were given for 2 networks"),
        (["--weights", "0,0"], "one above 0"),
        (["--distil-weight", "0.5"], "add --labels"),
        (["--into", "nobody"], "is none of"),
    ],
)
def test_settings_that_do_not_fit(arguments, message, perceptrons):
    result = run(perceptrons, "deep.onnx", "shallow.onnx", *arguments, "-o", str(perceptrons / "out"))
    assert result.exit_code == 2 and message in re.sub(r"\s+", " ", result.output)
    assert not (perceptrons / "out").exists()


# --- heterogeneous model transfer -------------------------------------------------------------------------------------


def test_transfer_along_the_longest_chain(tmp_path):
    """The small network's layers stand in the big one's first ones, in order; the rest stays the big one's."""
    write(tmp_path, "big", dense(seed=1, sizes=(6, 8, 8, 8, 8, 4)))
    write(tmp_path, "small", dense(seed=2, sizes=(6, 8, 8, 4)))
    samples(tmp_path)
    arguments = ["--rule", "average", "--match", "none", "--cost", "order", "--balance", "keep", "--weights", "0,1"]
    fused = fuse(tmp_path, "big.onnx", "small.onnx", *arguments)
    weights = [np.asarray(layer.weight.const_value.numpy()) for layer in find_layers(fused)]
    big, small = (
        [layer.weight.const_value.numpy() for layer in find_layers(load(tmp_path / f"{name}.onnx"))]
        for name in ("big", "small")
    )
    wanted = [small[0], small[1], big[2], big[3], small[2]]
    for found, expected in zip(weights, wanted, strict=True):
        expected = expected if expected.shape == found.shape and np.array_equal(expected, found) else expected.T
        np.testing.assert_array_equal(found, expected)
