"""The permutation law for norms and for quantisation."""

import numpy as np
import pytest
from graphs import Net, chain
from onnx import TensorProto
from structures import (
    IMAGE,
    PAIR,
    TOKENS,
    Structures,
    assert_law_catches,
    each_wrong_rule,
    end,
    passes_label,
    several,
    two_swapped,
    without,
)

from onnxmerge.ir.rules import RULES

graph = Structures()


class UncheckedNet(Net):
    """For GroupNormalization, of which onnx's checker refuses the form of opset 18 and infers no shape."""

    def proto(self, infer=True):
        return super().proto(infer=False)


# --- norms ------------------------------------------------------------------------------------------------------------


@graph(6, 5)
def instance_norm():
    net = Net()
    x = net.relu(net.norm(net.conv(net.input(IMAGE), 6), "InstanceNormalization"))
    x = net.relu(net.norm(net.conv(x, 5), "InstanceNormalization"))
    net.head(x)
    return net


@graph(3, 3, 5, blocks=(2,))
def group_norm_with_a_scale_per_group():
    net = UncheckedNet()
    x = net.conv(net.input(PAIR), 6)
    x = net.op("GroupNormalization", x, net.uniform(2), net.normal(2), num_groups=2)
    net.head(net.relu(net.conv(x, 5)))
    return net


@graph(3, 3, 5, blocks=(2,))
def group_norm_with_a_scale_per_channel():
    net = UncheckedNet(opset=21)
    x = net.conv(net.input(PAIR), 6)
    x = net.op("GroupNormalization", x, net.uniform(6), net.normal(6), num_groups=2)
    net.head(net.relu(net.conv(x, 5)))
    return net


@graph(3, 3, 5, blocks=(2,))
def group_norm_as_exported_before():
    net = Net()
    x = net.reshape(net.conv(net.input(IMAGE), 6), 0, 2, -1, channels=2)
    x = net.op("InstanceNormalization", x, net.uniform(2), net.normal(2))
    x = net.reshape(x, 0, 6, 10, 10, channels=6)
    net.head(net.relu(net.conv(net.op("Mul", x, net.uniform(6, 1, 1)), 5)))
    return net


@graph(6, 5)
def one_group_and_groups_of_one():
    net = UncheckedNet()
    x = net.conv(net.input(PAIR), 6)
    x = net.op("GroupNormalization", x, net.uniform(1), net.normal(1), num_groups=1)
    x = net.op("GroupNormalization", net.relu(x), net.uniform(6), net.normal(6), num_groups=6)
    net.head(net.relu(net.conv(x, 5)))
    return net


@graph(6, 5)
def lp_norm_over_channels():
    net = Net()
    x = net.op("LpNormalization", net.conv(net.input(IMAGE), 6), axis=1, p=2)
    net.head(net.relu(net.conv(x, 5)))
    return net


@graph(3, 3, 5, blocks=(2,))
def lp_norm_in_each_head():
    net = Net()
    x = net.reshape(net.matmul(net.input(TOKENS), 6), 0, 7, 2, 3, channels=3)
    x = net.reshape(net.op("LpNormalization", x, axis=-1, p=2), 0, 7, 6, channels=6)
    end(net, net.relu(net.matmul(x, 5)))
    return net


@graph(6, 5)
def mean_variance_norm():
    net = Net()
    x = net.op("MeanVarianceNormalization", net.conv(net.input(PAIR), 6))
    x = net.op("MeanVarianceNormalization", net.relu(net.conv(x, 5)), axes=[1, 2, 3])
    net.head(net.op("Tanh", x))
    return net


# --- quantisation -----------------------------------------------------------------------------------------------------


@graph(6, 8)
def quantized_product():
    net = Net()
    x = net.relu(net.matmul(net.input(TOKENS), 6))
    x, scale, point = several(net, "DynamicQuantizeLinear", [x], [6, 1, 1])
    weight = net.constant(net.generator.integers(-9, 9, (6, 8)).astype(np.int8))
    points = net.constant(net.generator.integers(-9, 9, 8).astype(np.int8))
    x = net.op("MatMulInteger", x, weight, point, points, channels=8)
    end(net, net.relu(net.op("Mul", net.op("Cast", x, to=TensorProto.FLOAT), scale)))
    return net


@graph(6, 5)
def quantized_and_back():
    net = Net()
    x = net.relu(net.conv(net.input(IMAGE), 6))
    scale, zero = net.constant(np.float32(0.02)), net.constant(np.uint8(3))
    x = net.op("DequantizeLinear", net.op("QuantizeLinear", x, scale, zero), scale, zero)
    net.head(net.relu(net.conv(x, 5)))
    return net


@graph(6, 5)
def quantized_by_channel():
    net = Net()
    x = net.relu(net.conv(net.input(IMAGE), 6))
    scale = net.uniform(6, low=0.01, high=0.03)
    zero = net.constant(net.generator.integers(0, 30, 6).astype(np.uint8))
    x = net.op("DequantizeLinear", net.op("QuantizeLinear", x, scale, zero, axis=1), scale, zero, axis=-3)
    net.head(net.relu(net.conv(x, 5)))
    return net


@pytest.mark.parametrize("name", graph.names())
def test_law_holds_for_each_structure(name):
    graph.check(name)


# --- the law can fail -------------------------------------------------------------------------------------------------


@each_wrong_rule(
    (chain, "BatchNormalization", passes_label),
    (group_norm_with_a_scale_per_group, "GroupNormalization", passes_label),
    (group_norm_with_a_scale_per_channel, "GroupNormalization", without(RULES["GroupNormalization"], "use")),
    (group_norm_with_a_scale_per_channel, "GroupNormalization", without(RULES["GroupNormalization"], "bind")),
    (group_norm_as_exported_before, "InstanceNormalization", passes_label),
    (lp_norm_in_each_head, "LpNormalization", passes_label),
    (mean_variance_norm, "MeanVarianceNormalization", two_swapped(RULES["MeanVarianceNormalization"])),
    (instance_norm, "InstanceNormalization", passes_label),
    (quantized_product, "MatMulInteger", RULES["MatMul"]),
    (quantized_by_channel, "QuantizeLinear", passes_label),
    (quantized_by_channel, "DequantizeLinear", passes_label),
)
def test_law_fails_for_a_wrong_rule(build, op_type, wrong, monkeypatch):
    assert_law_catches(build, op_type, wrong, monkeypatch)
