"""Whole networks in the torch interpreter against onnxruntime; what is learnt, and what is refused."""

import math
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import torch
from calibrating import PIXELS, assert_same, network, noise, one_node, run_onnx, run_torch
from onnx import TensorProto, helper, numpy_helper

from onnxmerge.calibration.module import GraphModule
from onnxmerge.calibration.roles import Role
from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.load import load

SHARED = Path(__file__).parents[1] / "../shared"


def shared_models() -> list[Path]:
    models = sorted((SHARED / "models").glob("*.onnx"))
    return [path for path in models if path.stem != "super_resolution"]  # onnxruntime refuses that one


def realistic_inputs(model: onnx_ir.Model, largest: float) -> dict[str, np.ndarray]:
    """Smooth blobs in 0..`largest`, two samples where the batch is free, 48 pixels where the size is."""
    feeds = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        sizes = [2 if axis == 0 else 48 for axis in range(len(value.shape))]
        shape = [size if isinstance(size, int) else free for size, free in zip(value.shape, sizes, strict=True)]
        waves = np.sin(np.arange(math.prod(shape)) / 9.0) + noise(math.prod(shape), low=-0.3, high=0.3)
        feeds[str(value.name)] = (largest * (waves.reshape(shape) + 1.3) / 2.6).astype(np.float32)
    return feeds


@pytest.mark.skipif(not shared_models(), reason="the real networks of ../shared/models are not here")
@pytest.mark.parametrize("path", shared_models(), ids=lambda path: path.stem)
def test_real_network(path: Path) -> None:
    model = load(path)
    feeds = realistic_inputs(model, 255.0 if path.stem.endswith("nc8_256") else 1.0)
    expected = run_onnx(onnx_ir.to_proto(model), feeds)
    assert_same(run_torch(model, feeds), expected)

    module = GraphModule(model)
    with torch.autocast("cpu", torch.bfloat16):
        values = module({name: torch.tensor(array) for name, array in feeds.items()})
    torch.stack([values[name].float().square().mean() for name in module.outputs]).sum().backward()
    for parameter in module.trainable():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()


def named(module: GraphModule, role: Role) -> set[str]:
    return {name for name, found in module.roles.items() if found is role}


def test_roles_follow_the_slot_not_the_type() -> None:
    module = GraphModule(network(0, batch_norm=True))
    assert {name for name, role in module.roles.items() if role is Role.WEIGHT} == {
        "conv.weight",
        "conv.bias",
        "w",
        "b",
    }
    assert named(module, Role.NORM) == {"scale", "shift"}
    assert len(module.trainable()) == 6
    assert len(module.trainable(roles=["norm"])) == 2
    assert len(list(module.parameters())) == 6 and len(list(module.buffers())) == 2


def test_an_added_bias_is_a_weight_and_an_added_scalar_is_not() -> None:
    arrays = {
        "w": noise(6, 4),
        "bias": noise(4),
        "shift": noise(1),
        "k": noise(5, 1, 1, 1),
        "channel": noise(1, 5, 1, 1),
    }
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"]),
            helper.make_node("Add", ["bias", "m"], ["a"]),
            helper.make_node("Add", ["a", "shift"], ["y"]),
            helper.make_node("Conv", ["image", "k"], ["c"]),
            helper.make_node("Add", ["c", "channel"], ["z"]),
        ],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 6]),
            helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 2, 2]),
        ],
        [helper.make_empty_tensor_value_info("y"), helper.make_empty_tensor_value_info("z")],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    module = GraphModule(onnx_ir.from_proto(model))
    assert named(module, Role.WEIGHT) == {"w", "bias", "k", "channel"}


def test_intermediate_values_and_only_the_nodes_they_need() -> None:
    model = network(0, heads=("a/", "b/"))
    module = GraphModule(model, ["r"])
    values = module({"x": torch.tensor(PIXELS)}, ["r", "b/y"])
    assert set(values) == {"r", "b/y"} and values["r"].shape == (5, 4, 4, 4)
    values["b/y"].sum().backward()
    without_gradient = [name for name, p in zip(module.roles, module.trainable(), strict=True) if p.grad is None]
    assert without_gradient == ["a/w", "a/b"]
    assert module.feeds() == ("x",)


def test_write_back_gives_onnxruntime_the_module() -> None:
    model = network(0, batch_norm=True)
    module = GraphModule(model)
    with torch.no_grad():
        for parameter in module.trainable():
            parameter.mul_(0.9).add_(0.05)
        expected = module({"x": torch.tensor(PIXELS)})["y"].numpy()
    module.write_back(model)
    assert_same(run_onnx(onnx_ir.to_proto(model), {"x": PIXELS}), [expected])


def test_unknown_operator_is_named() -> None:
    model, _ = one_node("Hardmax", [PIXELS])
    with pytest.raises(ModelError, match=r"'the_node'.*Hardmax"):
        GraphModule(onnx_ir.from_proto(model))


def test_a_node_that_fails_is_named() -> None:
    model, feeds = one_node(
        "Resize", [PIXELS, None, np.array([1, 1, 0.5, 0.5], np.float32)], mode="linear", antialias=1
    )
    with pytest.raises(ModelError, match=r"'the_node' \(Resize\): antialias"):
        run_torch(onnx_ir.from_proto(model), feeds)


def test_names_that_do_not_exist() -> None:
    with pytest.raises(UsageError, match="'nowhere'"):
        GraphModule(network(0), ["nowhere"])
    with pytest.raises(UsageError, match="'x'"):
        GraphModule(network(0))({})
