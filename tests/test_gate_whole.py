"""gate on networks some of whose channels cannot be chosen: they are kept whole, said so, and all others are gated."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from gating import Wide, with_gates
from graphs import Array, Net, execute, relative_error
from zoo.exporting import examples, export

import onnxmerge
from onnxmerge.ir.load import load
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.ir.weights import get_array, set_array
from onnxmerge.methods.check import check_spaces
from onnxmerge.passes.fold_gates import FoldGates
from onnxmerge.passes.gate_places import find_gate_places
from onnxmerge.passes.prune import Prune
from onnxmerge.passes.widen import Widen

pytestmark = pytest.mark.usefixtures("one_thread")

HIDDEN = {"vit_fused": 82, "vit_matmul": 82, "vit_torch": 82, "bert": 100, "mlp_mixer": 82, "gpt": 144, "swin": 46}
"""Architectures of the zoo and the hidden channels of the first dense pair that is gated."""
SLOW = {"vit_torch", "gpt", "swin"}
CASES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else []) for name in HIDDEN]


def other_weights(model: oir.Model, seed: int) -> oir.Model:
    """The network with all that layers and norms learn drawn around what it is."""
    changed, generator = model.clone(), np.random.default_rng(seed)
    for node in changed.graph:
        learnt = node.op_type in ("Conv", "Gemm", "MatMul", "LayerNormalization", "Gather")
        for value in node.inputs if learnt else ():
            if value is not None and value.const_value is not None and value.dtype is oir.DataType.FLOAT:
                array = get_array(value)
                set_array(value, array + 0.3 * array.std() * generator.standard_normal(array.shape))
    return changed


@cache
def wide(name: str) -> tuple[Wide, dict[str, Array]]:
    """Two networks of the zoo side by side, and what they are fed."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "raw.onnx"
        export(name, "legacy", 17, path)
        model = load(path)
    other = other_weights(model, 1)
    feeds = {key: tensor.numpy() for key, tensor in examples(name, "legacy", 17).items()}
    both = Widen([other])(model).model
    return Wide([model, other], both, find_gate_places(both, model, 2, 0.5)), feeds


@pytest.mark.parametrize("name", CASES)
def test_transformers_side_by_side_are_their_average(name):
    own, feeds = wide(name)
    first, second = (next(iter(execute(network, feeds).values())) for network in own.networks)
    assert relative_error(first, second) > 1e-2
    (got,) = execute(own.model, feeds).values()
    assert relative_error((first + second) / 2, got) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_the_hidden_channels_of_a_dense_pair_are_gated_and_the_rest_is_kept_with_the_reason(name):
    own, _ = wide(name)
    assert own.places.spaces[0].space.size == 2 * HIDDEN[name]
    reasons = set(own.places.whole.values())
    assert any("LayerNormalization" in reason and "normalises over channels" in reason for reason in reasons)
    assert not any("@" in reason or "groups of a convolution" in reason for reason in reasons)


@pytest.mark.parametrize("name", CASES)
def test_the_pruned_transformer_is_the_widened_one_with_closed_gates(name):
    own, feeds = wide(name)
    importance = np.random.default_rng(0).uniform(0.1, 1.0, own.places.count)
    kept = own.places.kept(importance)
    gates = np.where(own.places.closed(kept), 0, importance)
    pruned = Prune(kept, own.places.all_spaces)(FoldGates(own.places, gates)(own.model).model).model
    (wanted,) = with_gates(own, gates, feeds=feeds).values()
    (got,) = execute(pruned, feeds).values()
    assert relative_error(wanted, got) < 1e-5
    smaller = [sum(get_array(v).size for v in m.graph.initializers.values()) for m in (pruned, own.model)]
    assert smaller[0] < smaller[1]
    assert check_spaces(pruned, find_spaces(pruned), seed=0, threads=1).passed


# --- the method -------------------------------------------------------------------------------------------------------


def block(seed: int) -> Net:
    """A dense layer, a normalised dense pair beside a skip, and a head over tokens."""
    net = Net(seed)
    x = net.matmul(net.input(["N", 5, 6]), 8)
    y = net.op("LayerNormalization", x, net.uniform(8), net.normal(8), channels=8, axis=-1)
    x = net.op("Add", x, net.matmul(net.relu(net.matmul(y, 12)), 8), channels=8)
    net.output(net.matmul(net.relu(net.matmul(x, 10)), 4))
    return net


def test_what_is_kept_whole_is_told_in_plan_and_report_and_the_rest_is_learned(tmp_path):
    for number, name in enumerate("ab"):
        onnx.save(block(number).proto(), tmp_path / f"{name}.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((120, 5, 6)).astype(np.float32))
    settings = onnxmerge.GateSettings(measure=False, threads=1, gate_steps=30, steps=30)
    files = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    result = onnxmerge.gate_models(files, tmp_path / "data.npz", tmp_path / "out", settings=settings)
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    gated = [(space["channels"], space["keep"]) for space in plan["spaces"] if space["reason"] is None]
    assert gated == [(24, 12), (20, 10)]
    whole = [space for space in plan["spaces"] if space["reason"] is not None]
    assert [space["channels"] for space in whole] == [8, 8]
    (note,) = [note for note in result.notes if "kept" in note]
    assert "LayerNormalization" in note and "normalises over channels" in note and note.count("c0") == 2
    merged = load(tmp_path / "out" / "merged.onnx")
    losses = [loss for _, loss in result.candidates[0].losses]
    assert losses[-1] < losses[0]
    assert check_spaces(merged, find_spaces(merged), seed=0, threads=1).passed
