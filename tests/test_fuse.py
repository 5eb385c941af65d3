"""fuse: permuted copies give the network itself, depths and widths may differ, and what does not fit is refused."""

import json

import numpy as np
import onnx
import pytest
from graphs import Net, chain, dense, execute, relative_error, residual
from typer.testing import CliRunner

import onnxmerge
from onnxmerge.cli.app import app
from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.load import load
from onnxmerge.ir.save import save
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.methods.fuse.choices import Matching, Rule
from onnxmerge.passes.permute import Permute

NETS = {"dense": dense, "chain": chain, "residual": residual}
SHAPES = {"dense": (6,), "chain": (3, 10, 10), "residual": (3, 10, 10)}


@pytest.fixture
def folder(tmp_path):
    """Two networks `a.onnx` and `b.onnx`, the second a permuted copy, and `data.npz`, for a kind of network."""

    def make(kind: str, samples: int = 300):
        onnx.save(NETS[kind]().proto(), tmp_path / "a.onnx")
        model = load(tmp_path / "a.onnx")
        spaces = {space.name: space for space in find_spaces(model).permutable()}
        generator = np.random.default_rng(3)
        Permute({name: generator.permutation(space.size) for name, space in spaces.items()}, spaces)(model)
        save(model, tmp_path / "b.onnx")
        write_data(tmp_path, SHAPES[kind], samples)
        return tmp_path

    return make


def write_data(folder, shape, samples: int = 300) -> None:
    images = np.random.default_rng(0).standard_normal((samples, *shape)).astype(np.float32)
    np.savez(folder / "data.npz", x=images)


def fuse(folder, *names: str, **settings):
    settings = onnxmerge.FuseSettings(**{"measure": False, "samples": 300, "threads": 1} | settings)
    paths = [folder / f"{name}.onnx" for name in names]
    return onnxmerge.fuse_models(paths, folder / "data.npz", folder / "out", settings=settings, overwrite=True)


def outputs(path) -> dict[str, np.ndarray]:
    model = load(path)
    shape = [d if isinstance(d, int) else 8 for d in model.graph.inputs[0].shape]
    return execute(model, {"x": np.random.default_rng(5).standard_normal(shape).astype(np.float32)})


def assert_same(folder, name: str, tolerance: float) -> None:
    wanted, got = outputs(folder / f"{name}.onnx"), outputs(folder / "out" / "merged.onnx")
    for a, b in zip(wanted.values(), got.values(), strict=True):
        assert relative_error(a, b) < tolerance


@pytest.mark.parametrize("match", [Matching.ACTIVATIONS, Matching.WEIGHTS])
@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("kind", NETS)
def test_a_network_fused_with_a_permuted_copy_is_itself(kind, rule, match, folder):
    path = folder(kind)
    result = fuse(path, "a", "b", rule=rule, match=match)
    assert_same(path, "a", 1e-3 if rule == Rule.LEAST_SQUARES else 1e-4)
    assert result.candidates[0].tasks["b"].agreement == 1.0
    assert result.candidates[0].parameters == result.inputs[0].parameters or kind != "dense"


def perceptron(widths, seed: int) -> Net:
    return dense(seed=seed, sizes=(6, *widths, 4))


@pytest.mark.parametrize(("into", "layers"), [(None, 4), ("deep", 4), ("shallow", 3)])
def test_unequal_depth_and_width(into, layers, tmp_path):
    onnx.save(perceptron((12, 10, 8), 0).proto(), tmp_path / "deep.onnx")
    onnx.save(perceptron((9, 7), 1).proto(), tmp_path / "shallow.onnx")
    write_data(tmp_path, (6,))
    result = fuse(tmp_path, "shallow", "deep", into=into)
    fused = load(tmp_path / "out" / "merged.onnx")
    assert len(find_layers(fused)) == layers
    assert {score.agreement is not None for score in result.candidates[0].tasks.values()} == {True}
    for rule in (Rule.AVERAGE, Rule.TRANSPORT, Rule.MTZ, Rule.REPAIR):
        fuse(tmp_path, "shallow", "deep", into=into, rule=rule)
        assert len(find_layers(load(tmp_path / "out" / "merged.onnx"))) == layers


def test_three_networks_and_weights(tmp_path):
    for seed, name in enumerate("abc"):
        onnx.save(dense(seed=seed).proto(), tmp_path / f"{name}.onnx")
    write_data(tmp_path, (6,))
    fuse(tmp_path, "a", "b", "c", weights=(1.0, 0.0, 0.0), rule=Rule.AVERAGE)
    assert_same(tmp_path, "a", 1e-5)
    result = fuse(tmp_path, "a", "b", "c")
    assert set(result.candidates[0].tasks) == {"a", "b", "c"}


def test_same_seed_same_bytes(folder):
    path = folder("chain")
    fuse(path, "a", "b", seed=4)
    first = (path / "out" / "merged.onnx").read_bytes()
    fuse(path, "a", "b", seed=4)
    assert (path / "out" / "merged.onnx").read_bytes() == first


def test_calibration_never_ends_worse_than_it_began(folder):
    path = folder("dense")
    onnx.save(dense(seed=9).proto(), path / "c.onnx")
    losses = fuse(path, "a", "c", steps=20).candidates[-1].losses
    assert losses[0][0] == 0
    assert min(loss for _, loss in losses) <= losses[0][1]


def test_maps_of_unequal_size_are_refused(tmp_path):
    for seed, (name, strides) in enumerate({"deep": (2, 1, 2), "shallow": (2, 1)}.items()):
        net = Net(seed)
        value = net.input(["N", 3, 10, 10])
        for stride in strides:
            value = net.relu(net.conv(value, 6, strides=[stride, stride]))
        net.head(value)
        onnx.save(net.proto(), tmp_path / f"{name}.onnx")
    write_data(tmp_path, (3, 10, 10), samples=60)
    with pytest.raises(UsageError, match=r"has 5x5 positions and stands for .* of deep, which has 3x3"):
        fuse(tmp_path, "deep", "shallow", into=str(tmp_path / "shallow.onnx"))


def test_networks_of_different_tasks_are_refused(folder):
    path = folder("dense")
    onnx.save(dense(sizes=(6, 12, 10, 3)).proto(), path / "c.onnx")
    with pytest.raises(ModelError, match="for different tasks use zip"):
        fuse(path, "a", "c")
    arguments = ["fuse", str(path / "a.onnx"), str(path / "c.onnx"), "--data", str(path / "data.npz")]
    result = CliRunner().invoke(app, [*arguments, "-o", str(path / "out")])
    assert result.exit_code == 3
    assert not (path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"into": "x"}, "--into x: is none of"),
        ({"weights": (1.0,)}, "--weights"),
        ({"weights": (-1.0, 2.0)}, "--weights"),
    ],
)
def test_settings_that_do_not_fit(settings, message, folder):
    with pytest.raises(UsageError, match=message):
        fuse(folder("dense"), "a", "b", **settings)


def test_the_command_writes_the_contract(folder):
    path = folder("dense")
    arguments = ["fuse", str(path / "a.onnx"), str(path / "b.onnx"), "--data", str(path / "data.npz")]
    arguments += ["-o", str(path / "out"), "--samples", "300", "--json", "-q"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["method"] == "fuse"
    names = ["least-squares-mean", "least-squares-selected", "heads"]
    assert [candidate["name"] for candidate in report["candidates"]] == names
    assert report["chosen"] in names
    models = {f"{name}{suffix}" for name in names for suffix in (".onnx", ".json")}
    wanted = {"merged.onnx", "plan.json", "report.html", "report.json"} | models
    assert {file.name for file in (path / "out").iterdir()} == wanted
    assert CliRunner().invoke(app, arguments).exit_code == 2  # nothing is overwritten
