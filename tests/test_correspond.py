"""Which value of one network does the job of which value of another: names, order, spelling and widths may differ."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from graphs import Net, assert_same_outputs, chain, feeds_for, residual
from onnx import helper

from onnxmerge.ir.correspond import correspond
from onnxmerge.ir.load import load
from onnxmerge.ir.normalise import normalise
from onnxmerge.ir.weights import is_float

# --- names and order --------------------------------------------------------------------------------------------------


def two_branches(order: str, width: int = 6) -> oir.Model:
    """Two branches of different kernels, summed; `order` tells in which order the nodes stand."""
    net = Net(seed=len(order))
    x = net.input(["N", 4, 8, 8])
    ends = {}
    for branch in order:
        kernel = {"a": 3, "b": 1}[branch]
        middle = net.op("Relu", net.conv(x, width, kernel=kernel), name=f"{branch}1")
        ends[branch] = net.conv(middle, 5, kernel=kernel)
    net.head(net.op("Add", ends["a"], ends["b"], name="sum"))
    return net.model()


def test_reordered_nodes_correspond():
    first, second = two_branches("ab"), two_branches("ba")
    assert [node.name for node in first.graph] != [node.name for node in second.graph]
    found = correspond(first, second)
    assert not found.stopped
    assert found.values["a1"] == "a1"
    assert found.values["sum"] == "sum"
    assert set(found.values) == {"x"} | {v.name for node in first.graph for v in node.outputs}
    shapes = [
        (first.graph.initializers[a].shape, second.graph.initializers[b].shape) for a, b in found.constants.items()
    ]
    assert len(shapes) == len(first.graph.initializers)
    assert all(a == b for a, b in shapes)


def test_every_value_of_a_network_corresponds_to_itself_under_other_names(shared):
    for name in ("resnet20_cifar10", "ppocr_v2_cls", "ultraface_rfb_320"):
        proto = onnx.load(shared(name))
        for node in proto.graph.node:
            for names in (node.input, node.output):
                names[:] = [f"{n}_" if n else n for n in names]
        for values in (proto.graph.input, proto.graph.output, proto.graph.initializer, proto.graph.value_info):
            for value in values:
                value.name += "_"
        model = load(shared(name))
        found = correspond(model, normalise(oir.from_proto(proto)))
        assert not found.stopped
        computed = {v.name for node in model.graph for v in node.outputs}
        assert computed <= set(found.values)
        assert set(found.constants) == set(model.graph.initializers)


def test_siblings_correspond(shared):
    first, second = load(shared("candy_nc8_256")), load(shared("udnie_nc8_256"))
    found = correspond(first, second)
    assert not found.stopped
    assert set(found.constants) == set(first.graph.initializers)


def test_a_differing_width_is_reported_and_stops_there(shared):
    found = correspond(two_branches("ab"), two_branches("ab", width=7))
    assert len(found.stopped) == 2
    assert "has shape [6, 4, 3, 3] in one network and [7, 4, 3, 3] in the other" in found.stopped[0]
    assert set(found.values) == {"x"}

    found = correspond(two_branches("ab"), two_branches("ab", width=7), same_sizes=False)
    assert not found.stopped
    assert "sum" in found.values

    cifar10, cifar100 = load(shared("resnet8_cifar10")), load(shared("resnet8_cifar100"))
    found = correspond(cifar10, cifar100)
    assert len(found.stopped) == 1
    assert found.stopped[0].startswith("Gemm ")
    assert "has shape [10, 256] in one network and [100, 256] in the other" in found.stopped[0]


def test_a_differing_operator_attribute_or_depth_is_reported():
    def small(activation: str = "Relu", **attributes: list[int]) -> oir.Model:
        net = Net()
        net.head(net.op(activation, net.conv(net.input(["N", 3, 8, 8]), 4, **attributes)))
        return net.model()

    assert "the other network has Tanh" in correspond(small(), small("Tanh")).stopped[0]
    assert "only one of the two sets the attribute 'strides'" in correspond(small(), small(strides=[2, 2])).stopped[0]
    assert "the attribute 'strides' differs" in correspond(small(strides=[2, 1]), small(strides=[2, 2])).stopped[0]
    shallow, deep = chain(norm=False).model(), residual().model()
    assert correspond(shallow, deep).stopped


# --- spelling ---------------------------------------------------------------------------------------------------------


def spelled(proto: onnx.ModelProto, in_full: bool) -> oir.Model:
    """The model with every attribute that says what its absence says set, or with none of them."""
    for node in proto.graph.node:
        silent = {name: a.default_value for name, a in onnx.defs.get_schema(node.op_type, 18).attributes.items()}
        silent = {name: value for name, value in silent.items() if value.name}
        if node.op_type == "Conv":
            silent |= {name: helper.make_attribute(name, [1, 1]) for name in ("dilations", "strides")}
            silent["pads"] = helper.make_attribute("pads", [0] * 4)
        said = [a for a in node.attribute if a != silent.get(a.name)]
        if not in_full:
            said = [a for a in said if a.name != "kernel_shape" or node.op_type != "Conv"]
        else:
            said += [value for name, value in silent.items() if name not in {a.name for a in said}]
        node.ClearField("attribute")
        node.attribute.extend(said)
    return normalise(oir.from_proto(proto))


@pytest.mark.parametrize("same_sizes", [True, False])
@pytest.mark.parametrize("in_full", [True, False])
def test_an_attribute_at_its_default_is_none(in_full, same_sizes):
    def net() -> onnx.ModelProto:
        net = Net()
        x = net.norm(net.conv(net.input(["N", 3, 8, 8]), 4, kernel=1))
        x = net.op("AveragePool", net.relu(net.conv(x, 4, strides=[2, 2])), kernel_shape=[3, 3])
        x = net.op("LeakyRelu", net.conv(x, 4, group=4))
        net.output(net.op("Softmax", net.gemm(net.flatten(x, 16), 5, transposed=False)))
        return net.proto()

    first, second = spelled(net(), in_full), spelled(net(), not in_full)
    count = [sum(len(node.attributes) for node in model.graph) for model in (first, second)]
    assert abs(count[0] - count[1]) > 15
    assert_same_outputs(first, second, feeds_for(first))
    found = correspond(first, second, same_sizes=same_sizes)
    assert not found.stopped
    assert {o.name for o in first.graph.outputs} <= found.values.keys()


# --- widths -----------------------------------------------------------------------------------------------------------


def image(width: int) -> tuple[Net, str]:
    net = Net(width)
    return net, net.relu(net.conv(net.input(["N", 3, 6, 6]), width))


def ended(net: Net, x: str) -> oir.Model:
    net.head(net.relu(net.conv(x, net.channels[x], kernel=1)))
    return net.model()


def depthwise(width: int) -> oir.Model:
    net, x = image(width)
    return ended(net, net.conv(x, 2 * width, group=width))


def flat(width: int) -> oir.Model:
    """Reshape makes columns of channels, and channels of columns."""
    net, x = image(width)
    columns = net.gemm(net.reshape(x, 0, 36 * width, channels=36 * width), 36 * width)
    return ended(net, net.reshape(columns, 0, width, 6, 6, channels=width))


def shortcut(width: int) -> oir.Model:
    """More channels by zeros before and behind, as in the first residual networks."""
    net, x = image(width)
    return ended(net, net.op("Add", net.pad_channels(x, width // 2, width // 2), net.conv(x, 2 * width)))


def halves(width: int, places: Callable[[int], tuple[int, int]] = lambda width: (0, width)) -> oir.Model:
    """A Slice passes the first half of the channels by; both are cut at places that hang on the width."""
    net, x = image(2 * width)
    start, stop = places(width)
    kept = net.op("Slice", x, net.ints(start), net.ints(stop), net.ints(1), channels=width)
    behind = net.op("Slice", x, net.ints(width), net.ints(2 * width), net.ints(1), channels=width)
    return ended(net, net.concat(kept, net.relu(net.conv(behind, width))))


def picked(width: int) -> oir.Model:
    """A Gather exchanges the halves."""
    net, x = image(2 * width)
    order = np.roll(np.arange(2 * width), width)
    return ended(net, net.op("Gather", x, net.constant(order), axis=1))


def enlarged(width: int) -> oir.Model:
    net, x = image(width)
    return ended(net, net.op("Resize", x, "", "", net.ints(1, width, 12, 12), mode="nearest"))


def spread(width: int) -> oir.Model:
    """One number for each channel, expanded to the image and in tiles."""
    net, x = image(width)
    pooled = net.conv(net.op("GlobalAveragePool", x), width, kernel=1)
    first = net.op("Expand", pooled, net.ints(1, width, 6, 6))
    second = net.op("Tile", pooled, net.ints(1, 1, 6, 6))
    return ended(net, net.op("Add", net.op("Mul", first, x), second))


def computed(width: int, heads: int = 2) -> oir.Model:
    """Shapes put together from computed and constant sizes, as exporters write attention for any batch and length."""
    net = Net(width)
    x = net.matmul(net.input(["N", "T", 6]), width)
    sizes = [net.op("Gather", net.op("Shape", x), net.ints(axis)) for axis in (0, 1)]
    by_head = net.op("Concat", *sizes, net.ints(heads, width // heads), axis=0)
    y = net.op("Transpose", net.op("Reshape", x, by_head), perm=[0, 2, 1, 3])
    scores = net.op("Softmax", net.op("MatMul", y, net.op("Transpose", y, perm=[0, 1, 3, 2])))
    y = net.op("Transpose", net.op("MatMul", scores, y), perm=[0, 2, 1, 3])
    y = net.op("Reshape", y, net.op("Concat", *sizes, net.ints(width), axis=0), channels=width)
    net.output(net.matmul(y, 5))
    return net.model()


def token(width: int) -> oir.Model:
    """A weight that is expanded to the batch."""
    net = Net(width)
    x = net.matmul(net.input(["N", 7, 6]), width)
    shape = net.op("Concat", net.op("Gather", net.op("Shape", x), net.ints(0)), net.ints(1, width), axis=0)
    x = net.op("Concat", net.op("Expand", net.normal(1, 1, width), shape), x, axis=1)
    net.output(net.matmul(net.op("ReduceMean", net.op("Tanh", x), net.ints(1), keepdims=0), 5))
    return normalise(oir.from_proto(net.proto(infer=False)))  # as yet nobody can tell the length


@pytest.mark.parametrize(
    "build", [depthwise, flat, shortcut, halves, picked, enlarged, spread, computed, token], ids=lambda b: b.__name__
)
def test_numbers_of_channels_may_differ(build):
    for ours, theirs in ((4, 8), (8, 4), (6, 10)):
        first, second = build(ours), build(theirs)
        assert correspond(first, second).stopped
        found = correspond(first, second, same_sizes=False)
        assert not found.stopped
        weights = {name for name, value in first.graph.initializers.items() if is_float(value)}
        assert weights <= found.constants.keys()
        assert {o.name for o in first.graph.outputs} <= found.values.keys()


def test_what_is_read_elsewhere_is_not_the_same():
    """The two halves of the channels change places in one network."""

    def swapped(width: int) -> oir.Model:
        return halves(width, lambda width: (width, 2 * width))

    for other in (swapped(4), swapped(6)):
        assert correspond(halves(4), other, same_sizes=False).stopped


# --- what else differs ------------------------------------------------------------------------------------------------


def with_op(op_type: str, *constants: list[int], width: int = 4, **attributes: object) -> oir.Model:
    net, x = image(width)
    return ended(net, net.op(op_type, x, *(net.ints(*own) for own in constants), name="it", **attributes))


def with_conv(width: int = 4, **attributes: object) -> oir.Model:
    net, x = image(width)
    return ended(net, net.conv(x, width, **attributes))


def in_groups(groups: int) -> oir.Model:
    """Of the input's own channels."""
    net = Net()
    net.head(net.conv(net.input(["N", 4, 6, 6]), 4, group=groups))
    return net.model()


def summed(width: int) -> oir.Model:
    """Sums over the channels so far keep their order."""
    net, x = image(width)
    return ended(net, net.op("CumSum", x, net.constant(np.array(1)), name="it"))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: (with_conv(4, group=2), with_conv(8, group=4)), "channel spaces in one network and"),
        (lambda: (with_conv(4, group=2), with_conv(8, group=8)), "channel spaces in one network and"),
        (lambda: (in_groups(2), in_groups(4)), "the attribute 'group' differs"),
        (lambda: (with_conv(), with_conv(8, pads=[0, 2, 1, 1])), "the attribute 'pads' differs"),
        (
            lambda: (with_conv(2, pads=[2] * 4, dilations=[2, 2]), with_conv(4, pads=[4] * 4, dilations=[4, 4])),
            "'dilations'",
        ),
        (lambda: (with_conv(auto_pad="SAME_UPPER"), with_conv(6, kernel=5, auto_pad="SAME_UPPER")), r"[6, 6, 5, 5]"),
        (
            lambda: (with_op("Slice", [0], [4], [2]), with_op("Slice", [1], [5], [2], width=6)),
            "the constant",
        ),
        (
            lambda: (with_op("Slice", [0, 0], [4, 2], [1, 2]), with_op("Slice", [0, 0], [6, 3], [1, 2], width=6)),
            "the constant",
        ),
        (lambda: (with_op("Pad", [0, 0, 1, 0, 0, 0, 0, 0]), with_op("Pad", [0] * 6 + [1, 0], width=6)), "the constant"),
        (lambda: (with_op("Gather", [5, 4, 3], axis=2), with_op("Gather", [3, 4, 5], width=6, axis=2)), "the constant"),
        (
            lambda: (with_op("Reshape", [0, 4, 9, 4]), with_op("Reshape", [0, 6, 4, 9], width=6)),
            "has shape [2, 4, 9, 4]",
        ),
        (lambda: (with_op("ReduceMean", [2]), with_op("ReduceMean", [3], width=6)), "the constant"),
        (lambda: (summed(4), summed(6)), "because of CumSum 'CumSum_it'"),
        (
            lambda: (computed(8, heads=2), computed(16, heads=4)),
            "carries 2 channel spaces in one network and 4 in the other",
        ),
        (
            lambda: (computed(8, heads=2), computed(8, heads=4)),
            "carries 2 channel spaces in one network and 4 in the other",
        ),
    ],
)
def test_what_is_no_number_of_channels_may_not_differ(build, reason):
    first, second = build()
    for ours, theirs in ((first, second), (second, first)):
        found = correspond(ours, theirs, same_sizes=False)
        assert len(found.stopped) == 1
        if ours is first:
            assert reason in found.stopped[0]
