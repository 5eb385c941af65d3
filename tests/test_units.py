"""Where a network can be cut."""

import numpy as np
import onnx_ir as oir
import pytest
from graphs import Net, chain, dense, execute, feeds_for, relative_error, residual

from onnxmerge.ir.compose import cut_out
from onnxmerge.ir.layers import find_layers, parameter_count
from onnxmerge.ir.load import load
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
