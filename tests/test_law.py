"""The permutation law: permuting channel spaces leaves a network's function alone, judged by onnxruntime."""

import numpy as np
import onnx
import pytest
from graphs import Net
from hypothesis import strategies as st
from onnx import TensorProto, helper
from structures import IMAGE, Structures, assert_law_catches, each_wrong_rule, hold_over, passes_label

from onnxmerge.ir.coverage import permutable_share
from onnxmerge.ir.load import load
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.methods.check import check_spaces

graph = Structures()


# --- real networks ----------------------------------------------------------------------------------------------------


def test_law_holds_for_real_networks(real_model):
    model = load(real_model)
    spaces = find_spaces(model)
    share = permutable_share(model, spaces)
    result = check_spaces(model, spaces, seed=0, threads=2)
    frozen = ", ".join(sorted({node.op for node in spaces.frozen}))
    print(
        f"\n{real_model.stem:24}{len(spaces.permutable()):4} spaces {share:9.2%}  error {result.max_relative_error:.1e}"
        f"  {len(spaces.frozen)} frozen {frozen}"
    )
    assert result.passed
    assert result.max_relative_error < 1e-5  # these are well conditioned: far below the tolerance
    assert share >= 0.95


# --- what has no rule -------------------------------------------------------------------------------------------------


@graph(5, frozen=("LRN",))
def operator_without_a_rule():
    net = Net()
    x = net.op("LRN", net.conv(net.input(IMAGE), 6), size=3, alpha=1.0)
    net.head(net.relu(net.conv(x, 5)))
    return net


@graph(frozen=("If",))
def branch_that_captures_a_feature_map():
    net = Net()
    x = net.relu(net.conv(net.input(IMAGE), 4))

    def branch(op_type: str) -> onnx.GraphProto:
        out = f"{op_type}_out"
        return helper.make_graph(
            [helper.make_node(op_type, [x], [out])],
            op_type,
            [],
            [helper.make_tensor_value_info(out, TensorProto.FLOAT, ["N", 4, 10, 10])],
        )

    total = net.op("ReduceSum", "x", keepdims=0)
    positive = net.op("Greater", total, net.constant(np.float32(0)))
    y = net.op("If", positive, then_branch=branch("Tanh"), else_branch=branch("Neg"), channels=4)
    net.head(y)
    return net


@pytest.mark.parametrize("name", graph.names())
def test_law_holds_for_each_structure(name):
    graph.check(name)


@each_wrong_rule(
    (operator_without_a_rule, "LRN", passes_label),
)
def test_law_fails_for_a_wrong_rule(build, op_type, wrong, monkeypatch):
    assert_law_catches(build, op_type, wrong, monkeypatch)


# --- random graphs ----------------------------------------------------------------------------------------------------


ACTIVATIONS = ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSwish", "Softplus")


STEPS = (
    *("conv", "conv", "grouped", "depthwise", "norm", "activation", "slope", "softmax", "add", "add", "concat", "pad"),
    *("scale", "gate", "shuffle", "pool"),
)


@st.composite
def random_nets(draw) -> Net:
    """A random graph of four to twelve steps over feature maps, every map used in the end."""
    net = Net(seed=draw(st.integers(0, 99)))
    net.input(("N", 4, 8, 8))
    sizes = {net.conv("x", draw(st.integers(1, 6))): 8}  # feature map -> height and width
    unread = set(sizes)

    def pick(like: str | None = None, channels: bool = False) -> str:
        fits = [
            name
            for name, size in sizes.items()
            if like is None or (size == sizes[like] and (not channels or net.channels[name] == net.channels[like]))
        ]
        name = draw(st.sampled_from(fits))
        unread.discard(name)
        return name

    for _ in range(draw(st.integers(4, 12))):
        x = pick()
        count, size = net.channels[x], sizes[x]
        step = draw(st.sampled_from(STEPS))
        if step == "conv":
            made = net.conv(x, draw(st.integers(1, 6)), kernel=draw(st.sampled_from([1, 3])), bias=draw(st.booleans()))
        elif step == "grouped":
            group = draw(st.sampled_from([g for g in range(1, count + 1) if count % g == 0]))
            made = net.conv(x, group * draw(st.integers(1, 3)), group=group)
        elif step == "depthwise":
            made = net.conv(x, count * draw(st.integers(1, 2)), group=count)
        elif step == "norm":
            made = net.norm(x, draw(st.sampled_from(["BatchNormalization", "InstanceNormalization"])))
        elif step == "activation":
            made = net.op(draw(st.sampled_from(ACTIVATIONS)), x)
        elif step == "slope":
            made = net.op("PRelu", x, net.uniform(count, 1, 1, low=0, high=1))
        elif step == "softmax":
            made = net.op("Softmax", x, axis=1)
        elif step == "add":
            made = net.op("Add", x, pick(like=x, channels=True))
        elif step == "concat":
            made = net.concat(x, *(pick(like=x) for _ in range(draw(st.integers(1, 2)))))
        elif step == "pad":
            made = net.pad_channels(x, draw(st.integers(0, 2)), draw(st.integers(0, 2)))
        elif step == "scale":
            made = net.op("Mul", net.uniform(1, count, 1, 1), x)
        elif step == "gate":
            made = net.op("Mul", net.op("Sigmoid", net.conv(x, draw(st.sampled_from([1, count])), kernel=1)), x)
        elif step == "shuffle":
            group = draw(st.sampled_from([g for g in range(1, count + 1) if count % g == 0]))
            split = net.op("Transpose", net.reshape(x, 0, group, count // group, size, size), perm=[0, 2, 1, 3, 4])
            made = net.reshape(split, 0, count, size, size, channels=count)
        else:
            made = net.op(draw(st.sampled_from(["MaxPool", "AveragePool"])), x, kernel_shape=[2, 2], strides=[1, 1])
            size -= 1
        sizes[made] = size
        unread.add(made)
        if size == 4:
            break
    ends = []
    for x in sorted(unread):
        if draw(st.booleans()):
            ends.append(net.flatten(net.op("GlobalAveragePool", x), net.channels[x]))
        else:
            ends.append(net.flatten(x, net.channels[x] * sizes[x] ** 2))
    net.output(net.gemm(net.relu(net.gemm(net.concat(*ends), 7)), 4, transposed=False))
    return net


def test_law_holds_for_random_graphs(monkeypatch):
    seen = hold_over(random_nets(), 150, monkeypatch)
    assert np.mean([share for share, _ in seen]) > 0.9  # the law is not kept by freezing everything
