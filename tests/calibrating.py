"""What the tests of calibration share: one-node models judged by onnxruntime, small networks, samples in memory."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from elsewhere import ELSEWHERE, Elsewhere
from onnx import TensorProto, helper, numpy_helper

import onnxmerge.calibration.engine as engine
from onnxmerge.calibration.distillation import calibrate
from onnxmerge.calibration.engine import Outcome
from onnxmerge.calibration.module import GraphModule
from onnxmerge.calibration.settings import Settings
from onnxmerge.data import Batch, Split

onnxruntime.set_default_logger_severity(4)


def run_onnx(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def run_torch(model: onnx_ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What the interpreter gives on the CPU, and on another device the same."""
    module = GraphModule(model)
    with torch.no_grad():
        values = module({name: torch.tensor(array) for name, array in feeds.items()})
        with Elsewhere():
            module.to(ELSEWHERE)
            away = module({name: torch.tensor(array).to(ELSEWHERE) for name, array in feeds.items()})
            for name in module.outputs:
                assert away[name].device == ELSEWHERE
                np.testing.assert_array_equal(away[name].cpu().numpy(), values[name].numpy())
    return [values[name].numpy() for name in module.outputs]


def one_node(
    op: str, inputs: Sequence[np.ndarray | None], opset: int = 18, outputs: int = 1, **attributes: Any
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of one node and its feeds: floats of rank 1 and more are fed, everything else is an initializer."""
    names = [f"i{n}" if array is not None else "" for n, array in enumerate(inputs)]
    present = {name: array for name, array in zip(names, inputs, strict=True) if array is not None}
    fed = {name: array for name, array in present.items() if array.dtype == np.float32 and array.ndim}
    ends = [f"o{n}" for n in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(op, names, ends, name="the_node", **attributes)],
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in fed.items()],
        [helper.make_empty_tensor_value_info(name) for name in ends],
        [numpy_helper.from_array(a, n) for n, a in present.items() if n not in fed],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), fed


def assert_same(found: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float = 1e-4) -> None:
    """Equal shapes and types; errors are relative to the largest expected entry."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        scale = max(float(np.abs(theirs[np.isfinite(theirs)]).max(initial=0.0)), 1.0)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale)


def noise(*shape: int, seed: int = 0, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def scalar(value: float) -> np.ndarray:
    return np.array(value, dtype=np.float32)


def network(
    seed: int, *, classes: int = 3, heads: Sequence[str] = ("",), softmax: bool = False, batch_norm: bool = False
) -> onnx_ir.Model:
    """conv 1->4, (batch norm,) relu, then for each head a Gemm to `classes`; input `x` [N, 1, 6, 6]."""
    arrays = {"conv.weight": noise(4, 1, 3, 3, seed=seed), "conv.bias": noise(4, seed=seed + 1)}
    nodes = [helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["c"], name="conv")]
    if batch_norm:
        arrays |= {name: noise(4, seed=seed + 2, low=0.5, high=1.5) for name in ("scale", "shift", "mean", "variance")}
        nodes.append(
            helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "variance"], ["n"], name="bn")
        )
    nodes.append(helper.make_node("Relu", ["n" if batch_norm else "c"], ["r"], name="relu"))
    nodes.append(helper.make_node("Flatten", ["r"], ["f"], name="flatten"))
    for number, head in enumerate(heads):
        weight, bias, end = f"{head}w", f"{head}b", f"{head}y"
        arrays |= {weight: noise(64, classes, seed=seed + 3 + number) / 4, bias: noise(classes, seed=seed + 4 + number)}
        logits = f"{head}logits" if softmax else end
        nodes.append(helper.make_node("Gemm", ["f", weight, bias], [logits], name=f"{head}gemm"))
        if softmax:
            nodes.append(helper.make_node("Softmax", [logits], [end], name=f"{head}softmax"))
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1, 6, 6])],
        [helper.make_tensor_value_info(f"{head}y", TensorProto.FLOAT, ["N", classes]) for head in heads],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return onnx_ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


def weights(model: onnx_ir.Model) -> dict[str, bytes]:
    return {n: v.const_value.tobytes() for n, v in model.graph.initializers.items() if v.const_value is not None}


PIXELS = noise(5, 1, 6, 6, seed=7)


class Memory:
    """Samples in memory, with random labels."""

    def __init__(self, count: int, seed: int, name: str = "x"):
        self.x, self._name = noise(count, 1, 6, 6, seed=seed), name
        self.labels: np.ndarray | None = np.random.default_rng(seed).integers(0, 3, count)
        self.reads = 0

    @property
    def has_labels(self) -> bool:
        return self.labels is not None

    def __len__(self) -> int:
        return len(self.x)

    def read(self, rows: np.ndarray) -> Batch:
        self.reads += 1
        return Batch({self._name: self.x[rows]}, None if self.labels is None else self.labels[rows])


TASKS = ("a", "b")
TEACHERS = {"a": network(10), "b": network(20)}
OUTPUTS = {task: {f"{task}/y": "y"} for task in TASKS}
INPUTS = {task: {"x": "x"} for task in TASKS}


def merge(**attributes: Any) -> onnx_ir.Model:
    return network(10, heads=("a/", "b/"), **attributes)


def train(merged: onnx_ir.Model, *, one_split: bool = True, **given: Any) -> tuple[Outcome, list[Memory]]:
    """Calibrate on random images; returns the outcome and the training samples of each split."""
    samples = [Memory(256, seed) for seed in ((1,) if one_split else (1, 2))]
    held = [Split(Memory(70, 9))] * 2
    splits = [Split(s) for s in samples]
    data = dict(zip(TASKS, splits * 2 if one_split else splits, strict=False))
    options = {"teachers": TEACHERS, "outputs": OUTPUTS, "inputs": INPUTS, "taps": [], "progress": None} | {
        key: given.pop(key) for key in list(given) if key not in Settings.__dataclass_fields__
    }
    settings = Settings(**{"steps": 60, "rate": 1e-2, "threads": 1, "evaluations": 3} | given)
    held_out = dict(zip(TASKS, held, strict=True))
    return calibrate(merged, data=data, held_out=held_out, settings=settings, **options), samples


def interrupted_at(patch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Let Ctrl-C come where training begins its `count`-th step, once; the steps that were begun, as they come."""
    real, steps = engine._Loop.advance, list[int]()

    def advance(self: engine._Loop, step: int) -> float:
        steps.append(step)
        if len(steps) == count:
            raise KeyboardInterrupt
        return real(self, step)

    patch.setattr(engine._Loop, "advance", advance)
    return steps
