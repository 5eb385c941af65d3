"""The permutation law for operators that act on each element alone."""

import numpy as np
import pytest
from graphs import Net, residual
from structures import IMAGE, Structures, assert_law_catches, each_wrong_rule, passes_label, two_swapped, without

from onnxmerge.ir.rules import RULES

graph = Structures()


@graph(8, 8, 16, 16)
def residual_with_1x1_shortcut():
    return residual()


@graph(8, 4)
def squeeze_and_excitation():
    net = Net()
    x = net.op("HardSwish", net.norm(net.conv(net.input(IMAGE), 8)))
    pooled = net.op("ReduceMean", x, net.ints(2, 3), keepdims=1)
    gate = net.op("Sigmoid", net.conv(net.relu(net.conv(pooled, 4, kernel=1)), 8, kernel=1))
    net.head(net.op("Mul", x, gate))
    return net


@graph(4, 4, 6)
def two_halves_with_different_activations():
    net = Net()
    x = net.concat(net.conv(net.input(IMAGE), 4), net.conv("x", 4))
    left = net.op("Tanh", net.op("Mul", x, net.constant(np.float32([1, 1, 1, 1, 0, 0, 0, 0]).reshape(1, 8, 1, 1))))
    net.head(net.relu(net.conv(net.op("Add", left, net.relu(x)), 6)))
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


@graph(3, 3)
def mask_read_twice():
    net = Net()
    mask = net.constant(np.array([True, False, True]).reshape(1, 3, 1, 1))
    x = net.op("Where", mask, net.conv(net.input(IMAGE), 3), net.constant(np.float32(0.5)))
    net.head(net.op("Where", mask, net.conv(x, 3), net.constant(np.float32(-0.5))))
    return net


@graph(4, frozen=("Add",))
def input_added_to_a_feature_map():
    net = Net()
    x = net.op("Add", net.conv(net.input(IMAGE), 3), "x")
    net.head(net.relu(net.conv(x, 4)))
    return net


@graph(6, 5)
def swish_as_a_product_with_its_sigmoid():
    net = Net()
    x = net.conv(net.input(IMAGE), 6)
    x = net.conv(net.op("Mul", x, net.op("Sigmoid", x)), 5)
    net.head(net.op("Mul", net.op("Sigmoid", x), x))
    return net


@graph(6, 5)
def hard_swish_out_of_its_parts():
    """As exported before it was an operator: x * min(max(x + 3, 0), 6) / 6."""
    net = Net()

    def number(value):
        return net.constant(np.float32(value))

    x = net.norm(net.conv(net.input(IMAGE), 6))
    x = net.op("Div", net.op("Mul", x, net.op("Clip", net.op("Add", x, number(3)), number(0), number(6))), number(6))
    x = net.conv(x, 5)
    gate = net.op("Div", net.op("Clip", net.op("Add", number(3), x), number(0), number(6)), number(6))
    net.head(net.op("Mul", gate, x))
    return net


@graph(6, 5)
def two_inputs_each_with_its_own_convolution():
    net = Net()
    left, right = net.conv(net.input(IMAGE), 6), net.conv(net.input(("N", 2, 10, 10), "y"), 6)
    net.head(net.relu(net.conv(net.relu(net.op("Add", left, right)), 5)))
    return net


@pytest.mark.parametrize("name", graph.names())
def test_law_holds_for_each_structure(name):
    graph.check(name)


# --- the law can fail -------------------------------------------------------------------------------------------------


@each_wrong_rule(
    (residual_with_1x1_shortcut, "Add", without(RULES["Add"], "unite")),
    (squeeze_and_excitation, "Mul", without(RULES["Mul"], "unite")),
    (scalars_per_channel, "Mul", without(RULES["Mul"], "use")),
    (prelu_with_a_slope_per_channel, "PRelu", without(RULES["PRelu"], "use")),
    (input_added_to_a_feature_map, "Add", passes_label),
    (swish_as_a_product_with_its_sigmoid, "Mul", two_swapped(RULES["Mul"])),
    (hard_swish_out_of_its_parts, "Div", two_swapped(RULES["Div"])),
    (two_inputs_each_with_its_own_convolution, "Add", without(RULES["Add"], "unite")),
)
def test_law_fails_for_a_wrong_rule(build, op_type, wrong, monkeypatch):
    assert_law_catches(build, op_type, wrong, monkeypatch)
