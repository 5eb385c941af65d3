"""The torch interpreter against onnxruntime, operator by operator and network by network; then the trainer."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxmerge.calibration import FeatureTap, GraphModule, Outcome, Settings, calibrate, losses
from onnxmerge.calibration.roles import Role
from onnxmerge.data import Batch, Split
from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.load import load

SHARED = Path(__file__).parents[1] / "../shared"
onnxruntime.set_default_logger_severity(4)
few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


def run_onnx(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def run_torch(model: onnx_ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    module = GraphModule(model)
    with torch.no_grad():
        values = module({name: torch.tensor(array) for name, array in feeds.items()})
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


def check(op: str, inputs: Sequence[np.ndarray | None], opset: int = 18, outputs: int = 1, **attributes: Any) -> None:
    model, feeds = one_node(op, inputs, opset, outputs, **attributes)
    assert_same(run_torch(onnx_ir.from_proto(model), feeds), run_onnx(model, feeds))


def check_if_accepted(op: str, inputs: Sequence[np.ndarray | None], opset: int = 18, **attributes: Any) -> None:
    """As `check`; a combination that onnxruntime itself refuses is not judged."""
    model, feeds = one_node(op, inputs, opset, **attributes)
    try:
        expected = run_onnx(model, feeds)
    except Exception:
        reject()
    assert_same(run_torch(onnx_ir.from_proto(model), feeds), expected)


def noise(*shape: int, seed: int = 0, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def scalar(value: float) -> np.ndarray:
    return np.array(value, dtype=np.float32)


# ---- operators, one case each ---------------------------------------------------------------------------------------

X = noise(2, 6, 5, 4)
POSITIVE = noise(2, 6, 5, 4, low=0.1)
VECTOR = noise(6, seed=1, low=0.5)

UNARY = ["Relu", "Sigmoid", "Tanh", "Softplus", "Softsign", "HardSwish", "Mish", "Erf", "Exp", "Abs", "Neg", "Sign"]
UNARY += ["Floor", "Ceil", "Round", "Sin", "Cos", "Identity"]
BINARY = ["Add", "Sub", "Mul", "Div", "Min", "Max", "Sum", "Mean", "PRelu"]


@pytest.mark.parametrize("op", UNARY)
def test_unary_operator(op: str) -> None:
    check(op, [X])


@pytest.mark.parametrize("op", ["Log", "Sqrt", "Reciprocal"])
def test_unary_operator_on_positive_numbers(op: str) -> None:
    check(op, [POSITIVE])


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (6, 1, 1), (4,)])
def test_binary_operator(op: str, shape: tuple[int, ...]) -> None:
    check(op, [X, noise(*shape, seed=1, low=0.5)])


CASES: dict[str, tuple[str, list[np.ndarray | None], int, dict[str, Any]]] = {
    "pow": ("Pow", [POSITIVE, VECTOR[:4]], 18, {}),
    "pow of an integer": ("Pow", [POSITIVE, ints(2)], 18, {}),
    "leaky relu": ("LeakyRelu", [X], 18, {"alpha": 0.3}),
    "leaky relu default": ("LeakyRelu", [X], 18, {}),
    "elu": ("Elu", [X], 18, {"alpha": 0.7}),
    "celu": ("Celu", [X], 18, {"alpha": 0.7}),
    "selu": ("Selu", [X], 18, {}),
    "selu other": ("Selu", [X], 18, {"alpha": 1.2, "gamma": 0.9}),
    "thresholded relu": ("ThresholdedRelu", [X], 18, {}),
    "hard sigmoid": ("HardSigmoid", [X], 18, {}),
    "hard sigmoid of Paddle": ("HardSigmoid", [X * 5], 18, {"alpha": 1 / 6, "beta": 0.5}),
    "gelu": ("Gelu", [X], 20, {}),
    "gelu tanh": ("Gelu", [X], 20, {"approximate": "tanh"}),
    "softmax": ("Softmax", [X], 18, {}),
    "softmax over channels": ("Softmax", [X], 18, {"axis": 1}),
    "log softmax": ("LogSoftmax", [X], 18, {"axis": -2}),
    "clip": ("Clip", [X, scalar(-0.5), scalar(1.0)], 18, {}),
    "clip below": ("Clip", [X, scalar(-0.5)], 18, {}),
    "clip above": ("Clip", [X, None, scalar(0.5)], 18, {}),
    "mod": ("Mod", [X, VECTOR[:4]], 18, {"fmod": 1}),
    "where": ("Where", [X[0] > 0, X, VECTOR[:4]], 18, {}),
    "gemm": ("Gemm", [noise(3, 6), noise(6, 4), noise(4)], 18, {}),
    "gemm all attributes": (
        "Gemm",
        [noise(6, 3), noise(4, 6), noise(3, 4)],
        18,
        {"alpha": 0.5, "beta": 2.0, "transA": 1, "transB": 1},
    ),
    "gemm bias column": ("Gemm", [noise(3, 6), noise(4, 6), noise(3, 1)], 18, {"transB": 1}),
    "gemm without bias": ("Gemm", [noise(3, 6), noise(6, 4)], 18, {"alpha": 2.0}),
    "matmul": ("MatMul", [X, noise(4, 7)], 18, {}),
    "matmul of a vector": ("MatMul", [X, noise(4)], 18, {}),
    "einsum": ("Einsum", [noise(2, 3, 4), noise(2, 4, 5)], 18, {"equation": "bij, bjk -> bik"}),
    "einsum upper case": ("Einsum", [X, noise(7, 6)], 18, {"equation": "nChw,MC->nMhw"}),
    "batch norm": ("BatchNormalization", [X, VECTOR, VECTOR, noise(6), POSITIVE[0, :, 0, 0]], 18, {"epsilon": 1e-2}),
    "batch norm of a matrix": ("BatchNormalization", [noise(3, 6), VECTOR, VECTOR, noise(6), VECTOR], 15, {}),
    "instance norm": ("InstanceNormalization", [X, VECTOR, noise(6)], 18, {"epsilon": 1e-3}),
    "layer norm": ("LayerNormalization", [X, VECTOR[:4], noise(4)], 18, {}),
    "layer norm from axis 1": ("LayerNormalization", [X, noise(6, 5, 4)], 18, {"axis": 1}),
    "layer norm broadcasting": ("LayerNormalization", [X, VECTOR[:4], noise(4)], 18, {"axis": 2}),
    "group norm": ("GroupNormalization", [X, VECTOR[:3], noise(3)], 18, {"num_groups": 3}),
    "group norm by channel": ("GroupNormalization", [X, VECTOR, noise(6)], 21, {"num_groups": 2}),
    "lp norm": ("LpNormalization", [X], 18, {"axis": 1, "p": 2}),
    "local response": ("LRN", [POSITIVE], 18, {"size": 3, "alpha": 0.5, "beta": 0.6, "bias": 1.5}),
    "local response default": ("LRN", [POSITIVE], 18, {"size": 5}),
    "global average pool": ("GlobalAveragePool", [X], 18, {}),
    "global max pool": ("GlobalMaxPool", [X], 18, {}),
    "reshape": ("Reshape", [X, ints(0, -1, 2)], 18, {}),
    "flatten": ("Flatten", [X], 18, {}),
    "flatten from axis 0": ("Flatten", [X], 18, {"axis": 0}),
    "flatten from the end": ("Flatten", [X], 18, {"axis": -2}),
    "transpose": ("Transpose", [X], 18, {}),
    "transpose to last": ("Transpose", [X], 18, {"perm": [0, 2, 3, 1]}),
    "squeeze": ("Squeeze", [noise(1, 3, 1, 2)], 18, {}),
    "squeeze one": ("Squeeze", [noise(1, 3, 1, 2), ints(-2)], 18, {}),
    "unsqueeze": ("Unsqueeze", [noise(3, 2), ints(-1, 0)], 18, {}),
    "expand": ("Expand", [noise(3, 1), ints(2, 1, 4)], 18, {}),
    "tile": ("Tile", [noise(2, 3), ints(2, 1)], 18, {}),
    "concat": ("Concat", [X, noise(2, 3, 5, 4)], 18, {"axis": -3}),
    "depth to space": ("DepthToSpace", [noise(2, 8, 3, 4)], 18, {"blocksize": 2}),
    "depth to space CRD": ("DepthToSpace", [noise(2, 8, 3, 4)], 18, {"blocksize": 2, "mode": "CRD"}),
    "space to depth": ("SpaceToDepth", [noise(2, 3, 4, 6)], 18, {"blocksize": 2}),
    "gather": ("Gather", [X, ints(-1, 0)], 18, {"axis": 1}),
    "gather matrix": ("Gather", [X, ints(3, 0, -1, 1).reshape(2, 2)], 18, {"axis": -1}),
    "gather scalar": ("Gather", [X, np.array(2, dtype=np.int64)], 18, {"axis": 2}),
    "gather elements": ("GatherElements", [noise(3, 2), ints(0, -1, 1, 0).reshape(2, 2)], 18, {"axis": 0}),
    "shape": ("Shape", [X], 18, {}),
    "shape slice": ("Shape", [X], 18, {"start": 1, "end": -1}),
    "size": ("Size", [X], 18, {}),
    "constant of shape": ("ConstantOfShape", [ints(2, 3)], 18, {"value": numpy_helper.from_array(ints(7))}),
    "constant of shape default": ("ConstantOfShape", [ints(2, 3)], 18, {}),
    "range": ("Range", [np.array(v, dtype=np.int64) for v in (1, 10, 3)], 18, {}),
    "range of floats": ("Range", [scalar(1.0), scalar(-1.0), scalar(-0.5)], 18, {}),
    "cast to integer": ("Cast", [X], 18, {"to": TensorProto.INT64}),
    "cast to bool": ("Cast", [X], 18, {"to": TensorProto.BOOL}),
    "constant tensor": ("Constant", [], 18, {"value": numpy_helper.from_array(X)}),
    "constant float": ("Constant", [], 18, {"value_float": 1.5}),
    "constant integers": ("Constant", [], 18, {"value_ints": [1, 2]}),
    "dropout": ("Dropout", [X, scalar(0.5)], 18, {}),
    "argmax": ("ArgMax", [X], 18, {"axis": 1}),
    "argmax last": ("ArgMax", [np.round(X)], 18, {"axis": -1, "keepdims": 0, "select_last_index": 1}),
    "argmin": ("ArgMin", [np.round(X)], 18, {"axis": 1}),
    "integer division": ("Div", [ints(-7, 7), ints(2, 2)], 18, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_operator(name: str) -> None:
    op, inputs, opset, attributes = CASES[name]
    check(op, inputs, opset, **attributes)


@pytest.mark.parametrize("op", ["Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"])
def test_comparison(op: str) -> None:
    check(op, [np.round(X), np.round(noise(4, seed=3))])


@pytest.mark.parametrize("op", ["And", "Or", "Xor"])
def test_logic(op: str) -> None:
    check(op, [X > 0, X[:, :, :, :1] < 1])
    check("Not", [X > 0])


@pytest.mark.parametrize(
    ("inputs", "outputs", "attributes"),
    [
        ([X, ints(1, 2, 3)], 3, {"axis": 1}),
        ([X], 2, {"axis": 1, "num_outputs": 2}),
        ([X], 3, {"axis": 2, "num_outputs": 3}),
    ],
    ids=["sizes", "even", "uneven"],
)
def test_split(inputs: list[np.ndarray | None], outputs: int, attributes: dict[str, Any]) -> None:
    check("Split", inputs, outputs=outputs, **attributes)


def test_split_before_opset_18() -> None:
    check("Split", [X], opset=13, outputs=3, axis=1)


# ---- operators whose attributes interact: onnxruntime judges random combinations -------------------------------------


@st.composite
def windows(draw: st.DrawFn, *, pools: bool) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """(spatial size, kernel, attributes) of a convolution or pooling over one to three axes."""
    rank = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank)))

    kernel = each(1, 3)
    attributes: dict[str, Any] = {"strides": each(1, 3), "dilations": each(1, 2)}
    auto = draw(st.sampled_from(["NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if auto == "NOTSET":
        # A pool may not pad by its kernel's size or more: a window would hold nothing but padding.
        begins, ends = (
            tuple(min(p, k - 1) if pools else p for p, k in zip(each(0, 2), kernel, strict=True)) for _ in "be"
        )
        attributes["pads"] = begins + ends
    else:
        attributes["auto_pad"] = auto
        attributes["dilations"] = (1,) * rank  # onnxruntime refuses SAME with dilations
    return each(5, 9), kernel, attributes


@few
@given(windows(pools=False), st.sampled_from([1, 2, 4]), st.booleans(), st.integers(0, 99))
def test_convolution(window: Any, group: int, biased: bool, seed: int) -> None:
    spatial, kernel, attributes = window
    weight, bias = noise(8, 4 // group, *kernel, seed=seed), noise(8, seed=seed) if biased else None
    check_if_accepted("Conv", [noise(2, 4, *spatial, seed=seed), weight, bias], group=group, **attributes)


@few
@given(windows(pools=False), st.sampled_from([1, 2]), st.booleans(), st.data())
def test_transposed_convolution(window: Any, group: int, biased: bool, data: st.DataObject) -> None:
    spatial, kernel, attributes = window
    if data.draw(st.booleans(), label="output_padding"):
        pairs = zip(attributes["strides"], attributes["dilations"], strict=True)
        attributes["output_padding"] = [max(pair) - 1 for pair in pairs]
    if data.draw(st.booleans(), label="output_shape"):
        attributes["output_shape"] = [n * s for n, s in zip(spatial, attributes["strides"], strict=True)]
    weight, bias = noise(4, 6 // group, *kernel), noise(6 // group * group) if biased else None
    check_if_accepted("ConvTranspose", [noise(2, 4, *spatial), weight, bias], group=group, **attributes)


@few
@given(windows(pools=True), st.booleans())
def test_max_pool(window: Any, ceil: bool) -> None:
    spatial, kernel, attributes = window
    check_if_accepted("MaxPool", [noise(2, 3, *spatial)], kernel_shape=kernel, ceil_mode=int(ceil), **attributes)


@few
@given(windows(pools=True), st.booleans(), st.booleans())
def test_average_pool(window: Any, ceil: bool, include: bool) -> None:
    spatial, kernel, attributes = window
    attributes |= {"kernel_shape": kernel, "ceil_mode": int(ceil), "count_include_pad": int(include)}
    check_if_accepted("AveragePool", [noise(2, 3, *spatial)], opset=20, **attributes)


@few
@given(st.lists(st.integers(-1, 2), min_size=8, max_size=8), st.sampled_from(["constant", "reflect", "edge", "wrap"]))
def test_pad(amounts: list[int], mode: str) -> None:
    value = scalar(0.5) if mode == "constant" else None
    check_if_accepted("Pad", [noise(4, 3, 5, 6), ints(*amounts), value], opset=19, mode=mode)


@few
@given(st.lists(st.integers(0, 3), min_size=4, max_size=4), st.sampled_from(["constant", "reflect", "edge"]))
def test_pad_chosen_axes(amounts: list[int], mode: str) -> None:
    check_if_accepted("Pad", [noise(2, 3, 5, 6), ints(*amounts), None, ints(-1, 2)], mode=mode)


@few
@given(
    mode=st.sampled_from(["nearest", "linear", "cubic"]),
    place=st.sampled_from(["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric"]),
    nearest=st.sampled_from(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]),
    scales=st.tuples(*[st.sampled_from([0.5, 0.75, 1.0, 1.6, 2.0, 3.0])] * 2),
    by_size=st.booleans(),
    outside=st.booleans(),
)
def test_resize(mode: str, place: str, nearest: str, scales: tuple[float, float], by_size: bool, outside: bool) -> None:
    x, attributes = noise(2, 3, 8, 12), {"mode": mode, "coordinate_transformation_mode": place}
    if mode == "nearest":
        attributes["nearest_mode"] = nearest
    if mode == "cubic":
        attributes |= {"exclude_outside": int(outside), "cubic_coeff_a": -0.6}
    factors = np.array([1.0, 1.0, *scales], dtype=np.float32)
    sizes = ints(2, 3, int(8 * scales[0]), int(12 * scales[1]))
    inputs = [x, None, None, sizes] if by_size else [x, None, factors]
    check_if_accepted("Resize", inputs, opset=19, **attributes)


@pytest.mark.parametrize("policy", ["not_larger", "not_smaller"])
def test_resize_keeps_the_aspect_ratio(policy: str) -> None:
    check("Resize", [X, None, None, ints(11, 7)], mode="linear", axes=[2, 3], keep_aspect_ratio_policy=policy)


REDUCTIONS = ["Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSum", "LogSumExp"]


@few
@given(st.sampled_from(REDUCTIONS), st.sets(st.integers(0, 3)), st.booleans(), st.booleans(), st.booleans())
def test_reduction(name: str, axes: set[int], keep: bool, as_input: bool, noop: bool) -> None:
    x = noise(2, 3, 4, 2, low=0.1)
    signed = [axis - 4 if axis % 2 else axis for axis in sorted(axes)]
    if as_input:
        chosen = [x, ints(*signed)] if axes else [x]
        check("Reduce" + name, chosen, keepdims=int(keep), noop_with_empty_axes=int(noop))
    elif name != "Sum":
        check("Reduce" + name, [x], opset=13, keepdims=int(keep), **({"axes": signed} if axes else {}))


@st.composite
def slices(draw: st.DrawFn) -> list[np.ndarray]:
    axes = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
    rows = []
    for axis in axes:
        step = draw(st.sampled_from([1, 2, 3, -1, -2]))
        # "To the end" is the largest number forwards and the smallest backwards; other uses are onnxruntime's own.
        end = np.iinfo(np.int64).max if step > 0 else np.iinfo(np.int64).min + 1
        rows.append([draw(st.integers(-8, 8)), draw(st.one_of(st.integers(-8, 8), st.just(end))), axis, step])
    return [ints(*column) for column in zip(*rows, strict=True)]


@few
@given(slices())
def test_slice(operands: list[np.ndarray]) -> None:
    check("Slice", [noise(4, 5, 6), *operands])


@few
@given(hnp.mutually_broadcastable_shapes(num_shapes=3, min_dims=1, max_dims=4, max_side=4), st.integers(0, 9))
def test_broadcasting(shapes: hnp.BroadcastableShapes, seed: int) -> None:
    check("Sum", [noise(*shape, seed=seed + n) for n, shape in enumerate(shapes.input_shapes)])


# ---- whole networks -------------------------------------------------------------------------------------------------


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
    model, _ = one_node("Hardmax", [X])
    with pytest.raises(ModelError, match=r"'the_node'.*Hardmax"):
        GraphModule(onnx_ir.from_proto(model))


def test_a_node_that_fails_is_named() -> None:
    model, feeds = one_node("Resize", [X, None, np.array([1, 1, 0.5, 0.5], np.float32)], mode="linear", antialias=1)
    with pytest.raises(ModelError, match=r"'the_node' \(Resize\): antialias"):
        run_torch(onnx_ir.from_proto(model), feeds)


def test_names_that_do_not_exist() -> None:
    with pytest.raises(UsageError, match="'nowhere'"):
        GraphModule(network(0), ["nowhere"])
    with pytest.raises(UsageError, match="'x'"):
        GraphModule(network(0))({})


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    z, z_t = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0 * math.log(3.0), 0.0]])
    # Softened by T = 2 the teacher says 3/4 to 1/4 and the student 1/2 to 1/2.
    assert losses.kl(z, z_t, 2.0).item() == pytest.approx(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))
    assert losses.kl(z_t, z_t, 2.0).item() == pytest.approx(0.0, abs=1e-7)
    f, f_t = torch.tensor([1.0, -1.0, 3.0]), torch.tensor([2.0, -2.0, 2.0])
    assert losses.logit_error(f, f_t, variance=2.0).item() == pytest.approx(0.5)
    assert losses.feature_l1(f, f_t).item() == pytest.approx(0.5)
    assert losses.feature_l2(f, f_t).item() == pytest.approx(0.25)
    assert losses.cross_entropy(z, torch.tensor([1])).item() == pytest.approx(math.log(2.0))


# ---- the trainer ----------------------------------------------------------------------------------------------------


class Memory:
    """Samples in memory."""

    has_labels = True

    def __init__(self, count: int, seed: int, name: str = "x"):
        self._x, self._name = noise(count, 1, 6, 6, seed=seed), name
        self._labels = np.random.default_rng(seed).integers(0, 3, count)
        self.reads = 0

    def __len__(self) -> int:
        return len(self._x)

    def read(self, rows: np.ndarray) -> Batch:
        self.reads += 1
        return Batch({self._name: self._x[rows]}, self._labels[rows])


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


@pytest.mark.parametrize("one_split", [True, False], ids=["same data", "own data"])
def test_training_lowers_the_held_out_loss(one_split: bool) -> None:
    merged = merge()
    outcome, _ = train(merged, one_split=one_split)
    assert [step for step, _ in outcome.losses] == [0, 20, 40, 60]
    assert min(loss for _, loss in outcome.losses) < 0.5 * outcome.losses[0][1]
    assert outcome.best_step == min(outcome.losses, key=lambda pair: pair[1])[0]
    again, _ = train(merged, one_split=one_split, steps=0)
    # The model holds what was judged best.
    assert again.losses[0][1] == pytest.approx(min(loss for _, loss in outcome.losses), rel=1e-4)


def test_the_very_same_split_is_read_once_for_both_tasks() -> None:
    _, (together,) = train(merge(), steps=7)
    assert together.reads == 7
    _, apart = train(merge(), steps=7, one_split=False)
    assert [samples.reads for samples in apart] == [7, 7]


def test_the_start_is_a_candidate() -> None:
    merged = merge()
    before = weights(merged)
    outcome, _ = train(merged, rate=1e4, steps=12)
    assert outcome.best_step == 0 and weights(merged) == before


def test_no_steps_change_nothing() -> None:
    merged = merge()
    before = weights(merged)
    outcome, _ = train(merged, steps=0)
    assert outcome.best_step == 0 and len(outcome.losses) == 1 and weights(merged) == before


@pytest.mark.parametrize("bfloat16", [True, False])
def test_one_seed_gives_the_same_bytes(bfloat16: bool) -> None:
    first, second, other = merge(), merge(), merge()
    runs = [train(model, bfloat16=bfloat16, steps=20, seed=s)[0] for model, s in ((first, 3), (second, 3), (other, 4))]
    assert runs[0] == runs[1] and weights(first) == weights(second)
    assert weights(first) != weights(other)


def test_running_statistics_stay() -> None:
    merged = merge(batch_norm=True)
    before = weights(merged)
    outcome, _ = train(merged)
    changed = {name for name, data in weights(merged).items() if data != before[name]}
    assert outcome.best_step > 0 and changed == set(before) - {"mean", "variance"}


def test_interruption_keeps_the_best_so_far() -> None:
    def interrupt(step: int, steps: int, loss: float | None) -> None:
        if step == 33:
            raise KeyboardInterrupt

    merged = merge()
    before = weights(merged)
    outcome, _ = train(merged, progress=interrupt)
    assert outcome.interrupted and outcome.best_step == 20 and weights(merged) != before
    again, _ = train(merged, steps=0)
    assert again.losses[0][1] == pytest.approx(outcome.losses[1][1], rel=1e-4)


def test_taps_pull_features_towards_the_permuted_original() -> None:
    order = np.array([2, 0, 3, 1])
    tap = FeatureTap("b", "r", "r", order)
    target = GraphModule(TEACHERS["b"], ["r"])({"x": torch.tensor(PIXELS)})["r"][:, order]

    def distance(model: onnx_ir.Model) -> float:
        return float((GraphModule(model, ["r"])({"x": torch.tensor(PIXELS)})["r"] - target).detach().square().mean())

    def near_the_permuted_original() -> onnx_ir.Model:
        model = merge()
        for number, name in enumerate(("conv.weight", "conv.bias")):
            value, original = model.graph.initializers[name], TEACHERS["b"].graph.initializers[name].const_value
            assert original is not None
            array = original.numpy()[order]
            value.const_value = onnx_ir.tensor(array + noise(*array.shape, seed=number) / 10, name=name)
        return model

    with_taps, without, ignored = (near_the_permuted_original() for _ in range(3))
    train(with_taps, taps=[tap], feature_weight=100.0)
    train(without)
    train(ignored, taps=[tap], feature_weight=0.0)
    assert distance(with_taps) < 0.5 * distance(without)
    assert weights(ignored) == weights(without)


def test_a_final_softmax_is_left_out() -> None:
    plain, soft = merge(), merge(softmax=True)
    train(plain)
    train(soft, teachers={"a": network(10, softmax=True), "b": network(20, softmax=True)})
    assert weights(plain) == weights(soft)


def test_labels_join_the_loss() -> None:
    without, with_labels = train(merge(), steps=0)[0], train(merge(), steps=0, use_labels=True)[0]
    assert with_labels.losses[0][1] > without.losses[0][1]


def test_inputs_of_another_name_are_found_when_there_is_one() -> None:
    merged = merge()
    splits = {task: Split(Memory(64, 1, name="pixels")) for task in TASKS}
    outcome = calibrate(merged, TEACHERS, OUTPUTS, INPUTS, [], splits, splits, Settings(steps=5, threads=1))
    assert outcome.losses[-1][1] < outcome.losses[0][1]


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    train(merge(), steps=1, threads=before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"batch": 0}, {"rate": 0.0}, {"threads": 0}, {"evaluations": 0}])
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Settings(**{"steps": 1} | wrong)


def test_shapes_that_differ_are_named() -> None:
    with pytest.raises(ModelError, match=r"task 'b'.*\[64, 3\].*\[64, 5\]"):
        train(merge(), teachers={"a": TEACHERS["a"], "b": network(20, classes=5)})


def stacked() -> onnx_ir.Model:
    """Tasks stacked on the batch axis: the shared conv is run once on both tasks' inputs, so each needs the other's."""
    model = onnx_ir.to_proto(merge())
    graph = model.graph
    del graph.input[:]
    graph.input.extend(helper.make_tensor_value_info(f"{t}/x", TensorProto.FLOAT, ["N", 1, 6, 6]) for t in TASKS)
    graph.node[0].input[0] = "both"
    graph.node.insert(0, helper.make_node("Concat", ["a/x", "b/x"], ["both"], axis=0))
    position = next(i for i, node in enumerate(graph.node) if node.op_type == "Flatten")
    graph.node.insert(position + 1, helper.make_node("Split", ["f"], ["a/f", "b/f"], axis=0, num_outputs=2))
    for node in graph.node:
        if node.op_type == "Gemm":
            node.input[0] = f"{node.name[0]}/f"
    return onnx_ir.from_proto(model)


def test_tasks_stacked_on_the_batch_axis_are_fed_together() -> None:
    merged = stacked()
    outcome, _ = train(merged, one_split=False, inputs={task: {f"{task}/x": "x"} for task in TASKS})
    assert outcome.losses[-1][1] < 0.5 * outcome.losses[0][1]
