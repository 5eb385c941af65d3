"""Each operator of the torch interpreter against onnxruntime."""

from collections.abc import Sequence
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import onnx_ir
import pytest
from calibrating import assert_same, ints, noise, one_node, run_onnx, run_torch, scalar
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


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
