"""gate --layerwise: gates of one space learned from what is read of it; the networks are never put side by side."""

import json

import numpy as np
import onnx
import pytest
import torch
from graphs import chain, dense, execute, residual
from typer.testing import CliRunner

import onnxmerge
from onnxmerge.calibration.gates import HardConcrete
from onnxmerge.calibration.local_gates import learn_local_gates
from onnxmerge.cli.app import app
from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.load import load
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.methods.check import check_spaces
from onnxmerge.passes.select_channels import Reading, predictions, select_channels

NETS = {"dense": (dense, (6,)), "chain": (chain, (3, 10, 10)), "residual": (residual, (3, 10, 10))}


def reading(channels: int, rank: int, seed: int = 0) -> Reading:
    """Channels that are mixtures of a few sources, and random readers."""
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((channels, rank)) * np.linspace(1, 0.2, rank)
    covariance = mixing @ mixing.T + 0.01 * np.eye(channels)
    return Reading(covariance, generator.standard_normal((channels, 6)))


def error(own: Reading, chosen) -> float:
    """What of the readings cannot be predicted from the chosen channels, as a share."""
    left = own.root - np.eye(len(own.covariance))[:, chosen] @ predictions([own], chosen).T @ own.root
    return float(np.trace(left.T @ own.covariance @ left) / np.trace(own.root.T @ own.covariance @ own.root))


def chosen_by_gates(own: Reading, count: int, seed: int = 0) -> np.ndarray:
    found = learn_local_gates(own, count / len(own.covariance), seed)
    return np.argsort(-found.log_alpha, kind="stable")[:count]


def test_moments_are_those_of_what_is_drawn():
    gates = HardConcrete(5, seed=0)
    with torch.no_grad():
        gates.scaled.copy_(torch.linspace(-0.5, 2.5, 5))
    torch.manual_seed(0)
    drawn = gates.draw(100_000).detach()
    mean, variance = (tensor.detach() for tensor in gates.moments())
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.01)
    np.testing.assert_allclose(drawn.var(0), variance, atol=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_gates_select_channels_that_tell_what_is_read(seed):
    own = reading(24, 10, seed)
    generator = np.random.default_rng(seed)
    by_chance = [error(own, np.sort(generator.choice(24, 8, replace=False))) for _ in range(50)]
    assert error(own, chosen_by_gates(own, 8)) < np.quantile(by_chance, 0.2)
    assert error(own, chosen_by_gates(own, 8)) < 3 * error(own, select_channels([own], 8)) + 0.01


def test_what_nobody_reads_is_closed():
    own = reading(12, 6)
    own.root[6:] = 0
    covariance = np.zeros((12, 12))
    covariance[:6, :6], covariance[6:, 6:] = own.covariance[:6, :6], own.covariance[6:, 6:]
    assert set(chosen_by_gates(Reading(covariance, own.root), 6)) == set(range(6))


@pytest.fixture
def folder(tmp_path):
    def make(kind: str, count: int = 2, labels: bool = True):
        build, shape = NETS[kind]
        for number in range(count):
            onnx.save(build(seed=number).proto(), tmp_path / f"{'abc'[number]}.onnx")
        x = np.random.default_rng(0).standard_normal((200, *shape)).astype(np.float32)
        (logits,) = execute(load(tmp_path / "a.onnx"), {"x": x}).values()
        np.savez(tmp_path / "data.npz", x=x, **({"labels": logits.argmax(1)} if labels else {}))
        return tmp_path

    return make


def gate(path, names="ab", **more):
    own = onnxmerge.GateSettings(**{"measure": False, "threads": 1, "layerwise": True, "steps": 8} | more)
    files = [path / f"{name}.onnx" for name in names]
    return onnxmerge.gate_models(files, path / "data.npz", path / "out", settings=own, overwrite=True)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(("kind", "names"), [("dense", "abc"), ("chain", "ab"), ("residual", "ab")])
def test_the_result_is_as_wide_as_one_network(kind, names, labels, folder):
    path = folder(kind, len(names), labels)
    result = gate(path, names)
    merged, first = (load(file) for file in (path / "out" / "merged.onnx", path / "a.onnx"))
    sizes = [sorted(space.size for space in find_spaces(model).spaces) for model in (merged, first)]
    assert sizes[0] == sizes[1]
    assert check_spaces(merged, find_spaces(merged), seed=0, threads=1).passed
    assert [len(space.kept) * len(names) for space in result.candidates[0].gates] == [
        len(space.probability) for space in result.candidates[0].gates
    ]
    kept = json.loads((path / "out" / "plan.json").read_text())["spaces"]
    assert all(sum(map(len, space["kept"].values())) == space["keep"] for space in kept)
    assert result.chosen == "student"


def test_the_same_seed_gives_the_same_bytes(folder):
    path = folder("chain")
    first, second = ((gate(path), (path / "out" / "merged.onnx").read_bytes())[1] for _ in range(2))
    assert first == second


def test_the_widened_network_is_never_made(folder, monkeypatch):
    def refuse(*_):
        raise AssertionError("the networks were put side by side")

    monkeypatch.setattr("onnxmerge.passes.widen.Widen.call", refuse)
    assert gate(folder("chain")).chosen == "student"


def test_another_width_or_architecture_is_refused(folder):
    path = folder("chain")
    with pytest.raises(UsageError, match="--layerwise"):
        gate(path, width=0.25)
    onnx.save(chain(seed=1, width=6).proto(), path / "b.onnx")
    with pytest.raises(ModelError, match=r"b\.onnx: is not of the same architecture as .*a\.onnx.*fuse"):
        gate(path)


def test_the_command(folder):
    path = folder("dense")
    files = [str(path / f"{name}.onnx") for name in "ab"]
    done = CliRunner().invoke(app, ["gate", *files, "--layerwise", "--dry-run", "--json"])
    assert [space["keep"] for space in json.loads(done.stdout)["spaces"]] == [12, 10]
