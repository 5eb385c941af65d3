"""The permutation law: permuting channel spaces leaves a network's function alone, judged by onnxruntime."""

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from graphs import Net, chain, dense, residual
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxmerge.errors import ModelError
from onnxmerge.ir.coverage import permutable_share
from onnxmerge.ir.labels import Trace
from onnxmerge.ir.load import load
from onnxmerge.ir.rules import RULES
from onnxmerge.ir.rules.registry import required
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.methods import check
from onnxmerge.methods.check import TOLERANCE, check_spaces

IMAGE = ("N", 3, 10, 10)


def law(model: oir.Model) -> check.Check:
    return check_spaces(model, find_spaces(model), seed=0, threads=1)


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


# --- small graphs, one structure each ---------------------------------------------------------------------------------

GRAPHS = {}
"""Name -> (builder, sizes of the permutable spaces, operators that freeze)."""


def graph(*sizes: int, frozen: tuple[str, ...] = ()):
    def register(build):
        GRAPHS[build.__name__] = (build, sorted(sizes), sorted(frozen))
        return build

    return register


@graph(8, 8, 12)
def chain_with_batch_norm():
    return chain()


@graph(8, 8, 16, 16)
def residual_with_1x1_shortcut():
    return residual()


@graph(10, 12)
def perceptron():
    return dense()


@graph(2, 6, 2, 10)
def zero_padded_shortcut():
    net = Net()
    x = net.relu(net.norm(net.conv(net.input(IMAGE), 6)))
    shortcut = net.pad_channels(net.op("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2]), 2, 2)
    branch = net.norm(net.conv(net.relu(net.conv(x, 10, strides=[2, 2])), 10))
    net.head(net.relu(net.op("Add", branch, shortcut)))
    return net


@graph(6)
def depthwise():
    net = Net()
    x = net.relu(net.norm(net.conv(net.input(IMAGE), 6)))
    net.head(net.relu(net.norm(net.conv(x, 6, group=6))))
    return net


@graph(6, 7)
def depthwise_with_multiplier_2():
    net = Net()
    x = net.relu(net.conv(net.input(IMAGE), 6))
    x = net.relu(net.norm(net.conv(x, 12, group=6)))
    net.head(net.relu(net.conv(x, 7, kernel=1)))
    return net


@graph(2, 2, 2)
def depthwise_on_the_input():
    net = Net()
    net.head(net.relu(net.conv(net.input(IMAGE), 6, group=3)))
    return net


@graph(4, 4, 3, 3)
def grouped():
    net = Net()
    x = net.relu(net.norm(net.conv(net.input(IMAGE), 8)))
    net.head(net.relu(net.norm(net.conv(x, 6, group=2))))
    return net


@graph(8, 4)
def squeeze_and_excitation():
    net = Net()
    x = net.op("HardSwish", net.norm(net.conv(net.input(IMAGE), 8)))
    pooled = net.op("ReduceMean", x, net.ints(2, 3), keepdims=1)
    gate = net.op("Sigmoid", net.conv(net.relu(net.conv(pooled, 4, kernel=1)), 8, kernel=1))
    net.head(net.op("Mul", x, gate))
    return net


@graph(6, 4, 4)
def densely_connected():
    net = Net()
    x = net.conv(net.input(IMAGE), 6)
    for _ in range(2):
        x = net.concat(x, net.conv(net.relu(net.norm(x)), 4))
    net.head(x)
    return net


@graph(4, 9)
def flatten_to_gemm():
    net = Net()
    x = net.op("MaxPool", net.relu(net.conv(net.input(IMAGE), 4)), kernel_shape=[2, 2], strides=[2, 2])
    x = net.relu(net.gemm(net.flatten(x, 4 * 25), 9))
    net.output(net.gemm(x, 5, transposed=False))
    return net


@graph(4, 9)
def flatten_channels_last_to_gemm():
    net = Net()
    x = net.op("Transpose", net.relu(net.conv(net.input(IMAGE), 4)), perm=[0, 2, 3, 1])
    x = net.reshape(x, 0, -1, channels=400)
    net.output(net.gemm(net.relu(net.gemm(x, 9, transposed=False)), 5))
    return net


@graph(8, 5)
def channel_shuffle():
    net = Net()
    x = net.relu(net.conv(net.input(IMAGE), 8))
    x = net.reshape(x, 0, 2, 4, 10, 10)
    x = net.reshape(net.op("Transpose", x, perm=[0, 2, 1, 3, 4]), 0, 8, 10, 10, channels=8)
    net.head(net.relu(net.conv(x, 5)))
    return net


@graph(2, 2, 2, 2, 2, 2, 3, 3)
def channel_shuffle_between_groups():
    net = Net()
    x = net.relu(net.conv(net.conv(net.input(IMAGE), 6), 8, group=2))
    x = net.reshape(x, 0, 2, 4, 10, 10)
    x = net.reshape(net.op("Transpose", x, perm=[0, 2, 1, 3, 4]), 0, 8, 10, 10, channels=8)
    net.head(net.relu(net.conv(x, 4, group=2)))
    return net


@graph(6, 5)
def instance_norm():
    net = Net()
    x = net.relu(net.norm(net.conv(net.input(IMAGE), 6), "InstanceNormalization"))
    x = net.relu(net.norm(net.conv(x, 5), "InstanceNormalization"))
    net.head(x)
    return net


@graph(8, 12)
def matmul_and_add_on_rank_3():
    net = Net()
    x = net.matmul(net.input(["N", 7, 6]), 8)  # the fan-in is the last axis
    x = net.matmul(net.op("Gelu" if net.opset >= 20 else "Tanh", x), 12)
    net.output(net.matmul(net.relu(x), 3))
    return net


@graph(4, 4, 6)
def two_halves_with_different_activations():
    net = Net()
    x = net.concat(net.conv(net.input(IMAGE), 4), net.conv("x", 4))
    left = net.op("Tanh", net.op("Mul", x, net.constant(np.float32([1, 1, 1, 1, 0, 0, 0, 0]).reshape(1, 8, 1, 1))))
    net.head(net.relu(net.conv(net.op("Add", left, net.relu(x)), 6)))
    return net


@graph(4, 4, 4)
def concat_of_two_activations_of_one_map():
    net = Net()
    x = net.conv(net.input(IMAGE), 4)
    other = net.conv(x, 4)
    net.head(net.relu(net.conv(net.concat(net.relu(x), net.op("Sigmoid", other)), 4)))
    return net


@graph(5, 6)
def pooling_variants():
    net = Net()
    x = net.op("AveragePool", net.conv(net.input(IMAGE), 5), kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    x = net.op("LpPool", net.op("MaxPool", x, kernel_shape=[2, 2]), kernel_shape=[2, 2])
    x = net.conv(x, 6)
    both = net.op("Add", net.op("GlobalMaxPool", x), net.op("GlobalAveragePool", x))
    net.output(net.gemm(net.flatten(both, 6), 4))
    return net


@graph(5, 5, 5)
def resize_and_skip():
    net = Net()
    wide = net.relu(net.conv(net.input(IMAGE), 5))
    deep = net.relu(net.conv(wide, 5, strides=[2, 2]))
    up = net.op("Resize", deep, "", net.constant(np.float32([1, 1, 2, 2])), mode="nearest", channels=5)
    net.output(net.conv(net.relu(net.conv(net.concat(up, wide), 5)), 2))
    return net


@graph(6, 4)
def prelu_with_a_slope_per_channel():
    net = Net()
    x = net.op("PRelu", net.conv(net.input(IMAGE), 6), net.uniform(6, 1, 1, low=0, high=1))
    net.head(net.op("PRelu", net.conv(x, 4), net.uniform(1)))
    return net


@graph(6)
def scalars_per_channel():
    net = Net()
    x = net.op("Mul", net.uniform(1, 6, 1, 1), net.conv(net.input(IMAGE), 6))
    x = net.op("Clip", net.op("Add", x, net.normal(6, 1, 1)), net.constant(np.float32(-1)), net.constant(np.float32(2)))
    net.head(net.op("Pow", net.op("Abs", x), net.uniform(6, 1, 1, low=1, high=2)))
    return net


@graph(6, 5)
def layer_norm_spelled_out():
    net = Net()
    x = net.matmul(net.input(["N", 6, 6]), 6)
    centred = net.op("Sub", x, net.op("ReduceMean", x, net.ints(-1)))
    variance = net.op("ReduceMean", net.op("Mul", centred, centred), net.ints(-1))
    x = net.op("Div", centred, net.op("Sqrt", net.op("Add", variance, net.constant(np.float32(1e-5)))))
    x = net.op("Add", net.op("Mul", x, net.uniform(6)), net.normal(6))
    net.output(net.matmul(net.relu(net.matmul(x, 5)), 3))
    return net


@graph(6, 7)
def spatial_attention_named_first():
    net = Net()
    x = net.conv(net.input(IMAGE), 6)
    x = net.op("Mul", net.op("Sigmoid", net.conv(x, 1)), x)
    net.head(net.relu(net.conv(net.conv(x, 6, group=6), 7)))
    return net


@graph(6, 4)
def one_channel_maps_side_by_side():
    net = Net()
    x = net.conv(net.input(IMAGE), 6)
    pair = net.concat(net.norm(net.conv(x, 1)), net.conv(x, 1))
    net.head(net.relu(net.conv(net.conv(pair, 2, group=2), 4)))
    return net


@graph(3, 3)
def mask_read_twice():
    net = Net()
    mask = net.constant(np.array([True, False, True]).reshape(1, 3, 1, 1))
    x = net.op("Where", mask, net.conv(net.input(IMAGE), 3), net.constant(np.float32(0.5)))
    net.head(net.op("Where", mask, net.conv(x, 3), net.constant(np.float32(-0.5))))
    return net


@graph(2, 5)
def shuffle_that_reorders_the_two_copies_of_a_channel():
    """Three groups over [x, tanh x]: of x's channel 1 the copies change places, of 0 and 2 they do not."""
    net = Net()
    x = net.conv(net.input(IMAGE), 3)
    x = net.reshape(net.concat(x, net.op("Tanh", x)), 0, 3, 2, 10, 10)
    x = net.reshape(net.op("Transpose", x, perm=[0, 2, 1, 3, 4]), 0, 6, 10, 10, channels=6)
    net.head(net.relu(net.conv(x, 5)))
    return net


@graph(5, frozen=("LRN",))
def operator_without_a_rule():
    net = Net()
    x = net.op("LRN", net.conv(net.input(IMAGE), 6), size=3, alpha=1.0)
    net.head(net.relu(net.conv(x, 5)))
    return net


@graph(4, frozen=("Add",))
def input_added_to_a_feature_map():
    net = Net()
    x = net.op("Add", net.conv(net.input(IMAGE), 3), "x")
    net.head(net.relu(net.conv(x, 4)))
    return net


@graph(4, frozen=("Conv",))
def computed_bias():
    net = Net()
    bias = net.op("Exp", net.input([4], "shift"))
    weight = net.normal(4, 3, 3, 3)
    x = net.op("Conv", net.input(IMAGE), weight, bias, channels=4)
    net.head(net.relu(net.conv(x, 4)))
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


@pytest.mark.parametrize("name", GRAPHS)
def test_law_holds_for_each_structure(name):
    build, sizes, frozen = GRAPHS[name]
    model = build().model()
    spaces = find_spaces(model)
    assert law(model).passed
    assert sorted(space.size for space in spaces.permutable()) == sizes
    assert sorted(node.op for node in spaces.frozen) == frozen
    assert len({space.name for space in spaces.spaces}) == len(spaces.spaces)


# --- random graphs ----------------------------------------------------------------------------------------------------

ACTIVATIONS = ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSwish", "Softplus")


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


STEPS = (
    *("conv", "conv", "grouped", "depthwise", "norm", "activation", "slope", "softmax", "add", "add", "concat", "pad"),
    *("scale", "gate", "shuffle", "pool"),
)


def test_law_holds_for_random_graphs(monkeypatch):
    monkeypatch.setattr(check, "ALONE_LIMIT", 0)
    shares = []

    @settings(max_examples=150)
    @given(random_nets())
    def holds(net):
        model = net.model()
        spaces = find_spaces(model)
        result = check_spaces(model, spaces, seed=1, threads=1)
        assert result.passed, result
        shares.append(permutable_share(model, spaces))

    holds()
    assert len(shares) >= 100
    assert np.mean(shares) > 0.9  # the law is not kept by freezing everything


# --- the law can fail -------------------------------------------------------------------------------------------------


def concat_without_offset(node, trace):
    label = trace.label(required(node, 0))
    trace.set_label(node.outputs[0], np.concatenate([label] * len(node.inputs), node.attributes["axis"].as_int()))


def passes_label_only(node, trace):
    trace.set_label(node.outputs[0], trace.label(required(node, 0)))


def transpose_without_permutation(node, trace):
    label = trace.label(required(node, 0))
    perm = node.attributes["perm"].as_ints()
    trace.set_label(node.outputs[0], label.reshape([label.shape[axis] for axis in perm]))


def flatten_channels_last(node, trace):
    label = trace.label(required(node, 0))
    columns = int(node.outputs[0].shape[1])
    trace.set_label(node.outputs[0], np.tile(label.ravel(), columns // label.size).reshape(1, -1))


def without(original, forgotten):
    """The rule `original` that forgets one thing it should say of the trace."""

    def rule(node, trace):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trace, forgotten, lambda *_: None)
            original(node, trace)

    return rule


MUTANTS = {
    "Concat forgets to offset": (resize_and_skip, "Concat", concat_without_offset),
    "BatchNormalization records no parameters": (chain, "BatchNormalization", passes_label_only),
    "InstanceNormalization records no parameters": (instance_norm, "InstanceNormalization", passes_label_only),
    "Add does not unite": (residual, "Add", without(RULES["Add"], "unite")),
    "Mul does not unite": (squeeze_and_excitation, "Mul", without(RULES["Mul"], "unite")),
    "Mul forgets its constant": (scalars_per_channel, "Mul", without(RULES["Mul"], "use")),
    "PRelu forgets its slope": (prelu_with_a_slope_per_channel, "PRelu", without(RULES["PRelu"], "use")),
    "Conv forgets its weight and bias": (chain, "Conv", without(RULES["Conv"], "use")),
    "Conv ignores that it is depthwise": (depthwise, "Conv", without(RULES["Conv"], "unite")),
    "Conv ignores its groups": (grouped, "Conv", without(RULES["Conv"], "tag")),
    "Gemm forgets its matrix": (flatten_to_gemm, "Gemm", without(RULES["Gemm"], "use")),
    "MatMul forgets its matrix": (matmul_and_add_on_rank_3, "MatMul", without(RULES["MatMul"], "use")),
    "Flatten takes channels to be last": (flatten_to_gemm, "Flatten", flatten_channels_last),
    "Transpose gives the shape but moves nothing": (channel_shuffle, "Transpose", transpose_without_permutation),
    "Add ignores that a graph input is in channel order": (
        input_added_to_a_feature_map,
        "Add",
        passes_label_only,
    ),
    "an unknown operator passes channels": (operator_without_a_rule, "LRN", passes_label_only),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_law_fails_for_a_wrong_rule(name, monkeypatch):
    build, op_type, wrong = MUTANTS[name]
    model = build().model()
    assert law(model).passed
    monkeypatch.setitem(RULES, op_type, wrong)
    result = law(model)
    assert not result.passed
    assert result.max_relative_error > 100 * TOLERANCE
    assert result.worst_space in {space.name for space in find_spaces(model).permutable()}


def test_a_convolution_that_reads_other_channels_than_it_is_given():
    net = Net()
    net.conv(net.input(IMAGE), 4)
    net.channels["x"] = 5  # the next weight expects five
    net.head(net.conv("x", 4))
    with pytest.raises(ModelError, match="reads 5 channels but is given 3"):
        find_spaces(net.model())
