"""Where a network can be cut, and which part of one network does the job of which part of another."""

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from graphs import Net, chain, dense, execute, feeds_for, relative_error, residual

from onnxmerge.ir.compose import cut_out
from onnxmerge.ir.correspond import correspond
from onnxmerge.ir.layers import find_layers, parameter_count
from onnxmerge.ir.load import load
from onnxmerge.ir.normalise import normalise
from onnxmerge.ir.units import find_units


def producer(model: oir.Model, value: str) -> str:
    return next(node.op_type for node in model.graph if node.outputs[0].name == value)


def assert_cuts_separate(model: oir.Model) -> None:
    """Running up to each cut and on from there gives the outputs of the whole."""
    inputs, outputs = ([v.name for v in values] for values in (model.graph.inputs, model.graph.outputs))
    feeds = feeds_for(model)
    wanted = execute(model, feeds)
    for unit in find_units(model):
        middle = execute(cut_out(model, inputs, [unit.cut]), feeds)
        got = execute(cut_out(model, [unit.cut], outputs), middle)
        for name in outputs:
            assert relative_error(wanted[name], got[name]) < 1e-5, unit


# --- units ------------------------------------------------------------------------------------------------------------


def test_a_chain_is_cut_behind_every_norm():
    model = chain().model()
    units = find_units(model)
    layers = find_layers(model)
    assert [unit.kind for unit in units] == ["layer"] * 3
    assert [unit.layers for unit in units] == [(layer.name,) for layer in layers[:3]]  # the classifier is the head
    assert [unit.cut for unit in units] == [layer.pre_activation.name for layer in layers[:3]]
    assert [producer(model, unit.cut) for unit in units] == ["BatchNormalization"] * 3
    assert_cuts_separate(model)


def test_a_perceptron_is_cut_before_every_activation():
    model = dense().model()
    assert [producer(model, unit.cut) for unit in find_units(model)] == ["Gemm", "Gemm"]
    assert_cuts_separate(model)


def test_a_residual_net_is_cut_at_its_sums():
    model = residual().model()
    units = find_units(model)
    assert [(unit.kind, len(unit.layers)) for unit in units] == [("layer", 1), ("block", 2), ("block", 3)]
    assert [producer(model, unit.cut) for unit in units] == ["BatchNormalization", "Add", "Add"]
    assert_cuts_separate(model)


def test_a_shortcut_that_spans_everything_leaves_no_cut():
    net = Net()
    x = net.input(["N", 3, 8, 8])
    y = net.conv(net.relu(net.conv(net.relu(net.conv(x, 4)), 4)), 3)
    net.head(net.op("Add", y, x))
    units = find_units(net.model())
    assert [producer(net.model(), unit.cut) for unit in units] == ["Add"]  # only where the shortcut has ended
    assert len(units[0].layers) == 3

    net = Net()
    x = net.input(["N", 3, 8, 8])
    net.output(net.op("Add", net.conv(net.relu(net.conv(x, 4)), 3), x))
    assert find_units(net.model()) == []


def test_a_u_net_is_one_block_between_its_ends():
    net = Net()
    wide = net.conv(net.input(["N", 3, 8, 8]), 4)
    skip = net.relu(wide)
    deep = net.relu(net.conv(net.relu(net.conv(skip, 6, strides=[2, 2])), 4))
    up = net.op("Resize", deep, "", net.constant(np.float32([1, 1, 2, 2])), mode="nearest", channels=4)
    end = net.conv(net.concat(skip, up), 5)
    net.head(net.relu(end))
    model = net.model()
    units = find_units(model)
    assert [unit.cut for unit in units] == [wide, end]
    assert [len(unit.layers) for unit in units] == [1, 3]
    assert_cuts_separate(model)


def test_an_early_output_stays_alive():
    """A second output that is computed early and read no more crosses every later cut."""
    net = Net()
    x = net.relu(net.conv(net.input(["N", 3, 8, 8]), 4))
    net.output(net.op("GlobalAveragePool", x))
    net.head(net.relu(net.conv(net.relu(net.conv(x, 5)), 6)))
    model = net.model()
    assert [len(unit.layers) for unit in find_units(model)] == [1]


def test_a_unit_is_named_by_what_its_layers_share(shared):
    units = find_units(load(shared("ultraface_slim_320")))
    assert units[0].name.startswith("base_net.0")
    assert len({unit.name for unit in units}) == len(units)


@pytest.mark.parametrize("name", ["resnet20_cifar10", "cnn_mnist", "mnist-net_256x4", "candy_nc8_256", "ppocr_v2_cls"])
def test_cuts_of_real_networks_separate(name, shared):
    model = load(shared(name))
    units = find_units(model)
    assert len(units) >= 3
    inside = [layer for unit in units for layer in unit.layers]
    assert inside == [layer.name for layer in find_layers(model)][: len(inside)]
    if name in ("resnet20_cifar10", "mnist-net_256x4"):
        assert_cuts_separate(model)


def test_resnet_20_has_nine_blocks(shared):
    units = find_units(load(shared("resnet20_cifar10")))
    assert [unit.kind for unit in units] == ["layer"] + ["block"] * 9


# --- layers -----------------------------------------------------------------------------------------------------------


def test_layers_know_norm_activation_and_cost():
    model = chain().model()
    first, *_, last = find_layers(model)
    assert (first.op, first.groups, first.out_channels, first.weight_shape) == ("Conv", 1, 8, (8, 3, 3, 3))
    assert first.norm is not None
    assert first.activation is not None
    assert (first.norm.op_type, first.activation.op_type) == ("BatchNormalization", "Relu")
    assert first.parameters == 8 * 27 + 8 + 4 * 8
    assert first.macs == 8 * 27 * 100
    assert (last.op, last.transposed, last.out_channels, last.macs) == ("Gemm", True, 5, 40)
    assert sum(layer.parameters for layer in find_layers(model)) == parameter_count(model)


def test_a_bias_added_to_a_matrix_product_belongs_to_the_layer():
    net = Net()
    net.output(net.relu(net.matmul(net.input(["N", 7, 6]), 8)))
    (layer,) = find_layers(net.model())
    assert layer.bias is not None
    assert layer.linear.producer().op_type == "Add"
    assert layer.macs == 7 * 48
    assert layer.parameters == 48 + 8


# --- correspondence ---------------------------------------------------------------------------------------------------


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
