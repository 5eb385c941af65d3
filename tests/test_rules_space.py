"""The permutation law for operators over space, and for channels that lie elsewhere than on axis 1."""

import numpy as np
import pytest
from graphs import Net
from structures import (
    IMAGE,
    Structures,
    assert_law_catches,
    each_wrong_rule,
    passes_label,
    says_nothing,
    two_swapped,
    without,
)

from onnxmerge.ir.rules import RULES

graph = Structures()


# --- space ------------------------------------------------------------------------------------------------------------


@graph(5, 6)
def pooling_variants():
    net = Net()
    x = net.op("AveragePool", net.conv(net.input(IMAGE), 5), kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    x = net.op("LpPool", net.op("MaxPool", x, kernel_shape=[2, 2]), kernel_shape=[2, 2])
    x = net.conv(x, 6)
    both = net.op("Add", net.op("GlobalMaxPool", x), net.op("GlobalAveragePool", x))
    net.output(net.gemm(net.flatten(both, 6), 4))
    return net


@graph(6, 5)
def regions_and_grids():
    net = Net()
    x = net.conv(net.input((2, 3, 10, 10)), 6)
    grid = net.input((2, 4, 4, 2), "grid")
    x = net.relu(net.conv(net.op("GridSample", x, grid, channels=6), 5))
    boxes = net.constant(np.float32([[0, 0, 3, 3], [1, 0, 2, 3]]))
    net.head(net.op("RoiAlign", x, boxes, net.ints(0, 1), output_height=2, output_width=2, channels=5))
    return net


@graph(4, frozen=("GridSample",))
def grid_out_of_channels():
    net = Net()
    grid = net.op("Transpose", net.conv(net.input(IMAGE), 2), perm=[0, 2, 3, 1])
    net.head(net.relu(net.conv(net.op("GridSample", "x", grid, channels=3), 4)))
    return net


@graph(6, 5)
def resize_of_named_axes():
    net = Net()
    x = net.conv(net.input(IMAGE), 6)
    x = net.op("Resize", x, "", net.constant(np.float32([1.5, 2])), axes=[2, -1], mode="linear", channels=6)
    net.head(net.relu(net.conv(x, 5)))
    return net


@graph(5, frozen=("Resize",))
def resize_of_channels_to_the_same_size():
    net = Net()
    x = net.conv(net.input(IMAGE), 6)
    x = net.op("Resize", x, "", net.constant(np.float32([1, 1.1, 2, 2])), mode="nearest", channels=6)
    net.head(net.relu(net.conv(x, 5)))
    return net


@graph(9, 5)
def max_pool_on_a_map_made_by_a_dense_layer():
    net = Net()
    x = net.reshape(net.gemm(net.input(["N", 6]), 9 * 16), 0, 9, 4, 4, channels=9)
    x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    net.head(net.relu(net.conv(x, 5)))
    return net


@graph(9, 5)
def global_average_pool_on_a_map_made_by_a_dense_layer():
    net = Net()
    x = net.op("Tanh", net.reshape(net.gemm(net.input(["N", 6]), 9 * 4), 0, 9, 2, 2, channels=9))
    x = net.flatten(net.op("GlobalAveragePool", x), 9)
    net.output(net.gemm(net.relu(net.gemm(x, 5)), 3))
    return net


# --- channels last ----------------------------------------------------------------------------------------------------


def island(net, x, out, **attributes):
    """A convolution as TensorFlow's exports have it: [N, H, W, C] outside, [N, C, H, W] inside, its bias outside."""
    channels = net.channels[x]
    x = net.op("Transpose", x, perm=[0, 3, 1, 2], channels=channels)
    x = net.op("Transpose", net.conv(x, out, bias=False, **attributes), perm=[0, 2, 3, 1], channels=out)
    return net.op("Add", x, net.normal(out, scale=0.3), channels=out)


def channels_last_input(net):
    x = net.input(("N", 10, 10, 3))
    net.channels[x] = 3
    return x


@graph(6, 8, 5)
def channels_last_network():
    """An inverted residual with a depthwise convolution, then the mean over space."""
    net = Net()
    x = net.relu(island(net, channels_last_input(net), 6))
    y = net.op("Clip", island(net, x, 8, kernel=1), net.constant(np.float32(0)), net.constant(np.float32(6)))
    y = net.relu(island(net, y, 8, group=8))
    y = net.relu(island(net, net.op("Add", x, island(net, y, 6, kernel=1)), 5))
    y = net.op("ReduceMean", y, net.ints(1, 2), keepdims=0, channels=5)
    net.output(net.matmul(y, 4))
    return net


@graph(6, 7)
def channels_last_depthwise_with_multiplier_2():
    net = Net()
    x = net.relu(island(net, channels_last_input(net), 6))
    x = net.relu(island(net, x, 12, group=6))
    x = net.op("ReduceMean", net.relu(island(net, x, 7)), net.ints(1, 2), keepdims=1)
    x = net.op("Transpose", island(net, x, 4, kernel=1), perm=[0, 3, 1, 2])
    net.output(net.flatten(x, 4))
    return net


@pytest.mark.parametrize("name", graph.names())
def test_law_holds_for_each_structure(name):
    graph.check(name)


# --- the law can fail -------------------------------------------------------------------------------------------------


@each_wrong_rule(
    (regions_and_grids, "GridSample", two_swapped(RULES["GridSample"])),
    (regions_and_grids, "RoiAlign", two_swapped(RULES["RoiAlign"])),
    (grid_out_of_channels, "GridSample", says_nothing),
    (resize_of_named_axes, "Resize", two_swapped(RULES["Resize"])),
    (resize_of_channels_to_the_same_size, "Resize", passes_label),
    (pooling_variants, "LpPool", two_swapped(RULES["LpPool"])),
    (max_pool_on_a_map_made_by_a_dense_layer, "MaxPool", without(RULES["MaxPool"], "unite")),
    (
        global_average_pool_on_a_map_made_by_a_dense_layer,
        "GlobalAveragePool",
        without(RULES["GlobalAveragePool"], "unite"),
    ),
    (channels_last_network, "Transpose", two_swapped(RULES["Transpose"])),
    (channels_last_network, "Add", without(RULES["Add"], "use")),
    (channels_last_network, "Conv", without(RULES["Conv"], "unite")),
    (channels_last_network, "ReduceMean", two_swapped(RULES["ReduceMean"])),
)
def test_law_fails_for_a_wrong_rule(build, op_type, wrong, monkeypatch):
    assert_law_catches(build, op_type, wrong, monkeypatch)
