"""The permutation law for layers with weights: convolutions, dense layers, recurrent layers."""

import numpy as np
import pytest
from graphs import Net, chain, dense
from onnx import TensorProto
from structures import (
    IMAGE,
    Structures,
    assert_law_catches,
    each_wrong_rule,
    several,
    two_swapped,
    without,
    without_rows,
)

from onnxmerge.errors import ModelError
from onnxmerge.ir.rules import RULES
from onnxmerge.ir.rules.registry import required
from onnxmerge.ir.spaces import find_spaces

graph = Structures()


# --- convolutions -----------------------------------------------------------------------------------------------------


@graph(8, 8, 12)
def chain_with_batch_norm():
    return chain()


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


@graph(4, frozen=("Conv",))
def computed_bias():
    net = Net()
    bias = net.op("Exp", net.input([4], "shift"))
    weight = net.normal(4, 3, 3, 3)
    x = net.op("Conv", net.input(IMAGE), weight, bias, channels=4)
    net.head(net.relu(net.conv(x, 4)))
    return net


def transposed(net, x, out, kernel=2, group=1, bias=True, **attributes):
    fan_in = net.channels[x] // group * kernel**2
    weights = [net.normal(net.channels[x], out // group, kernel, kernel, scale=(2 / fan_in) ** 0.5)]
    weights += [net.normal(out, scale=0.3)] if bias else []
    return net.op("ConvTranspose", x, *weights, channels=out, group=group, **attributes)


@graph(6, 4, 5)
def transposed_convolutions():
    net = Net()
    x = net.relu(transposed(net, net.conv(net.input(IMAGE), 6), 4, strides=[2, 2]))
    net.head(net.relu(transposed(net, x, 5, bias=False)))
    return net


@graph(3, 3, 2, 2, 5)
def grouped_transposed_convolution():
    net = Net()
    x = net.relu(transposed(net, net.conv(net.input(IMAGE), 6), 4, group=2, strides=[2, 2]))
    net.head(net.relu(net.conv(x, 5)))
    return net


@graph(6, 5)
def depthwise_transposed_convolution():
    net = Net()
    x = net.relu(transposed(net, net.conv(net.input(IMAGE), 6), 6, group=6, strides=[2, 2]))
    net.head(net.relu(net.conv(x, 5)))
    return net


@graph(6, 5)
def depthwise_transposed_convolution_with_multiplier_2():
    net = Net()
    x = net.relu(transposed(net, net.conv(net.input(IMAGE), 6), 12, group=6))
    net.head(net.relu(net.conv(x, 5)))
    return net


@graph(2, 2, 2)
def depthwise_transposed_convolution_on_the_input():
    net = Net()
    net.head(net.relu(transposed(net, net.input(IMAGE), 6, group=3)))
    return net


@graph(6, 4, 5)
def quantized_convolutions():
    net = Net()

    def weight(out, count):
        return net.constant(net.generator.integers(-9, 9, (out, count, 3, 3)).astype(np.int8))

    half, zero = net.constant(np.float32(0.01)), net.constant(np.uint8(0))
    x, scale, point = several(net, "DynamicQuantizeLinear", [net.relu(net.conv(net.input(IMAGE), 6))], [6, 1, 1])
    x = net.op("ConvInteger", x, weight(4, 6), point, channels=4)
    x = net.op("Mul", net.op("Cast", x, to=TensorProto.FLOAT), scale)
    x = net.op("QuantizeLinear", net.relu(net.op("Mul", x, net.uniform(1, 4, 1, 1))), half, zero)
    bias = net.constant(net.generator.integers(-90, 90, 5).astype(np.int32))
    points = net.constant(np.zeros(5, np.int8))
    scales = [net.uniform(5), points, net.constant(np.float32(8)), zero]
    x = net.op("QLinearConv", x, half, zero, weight(5, 4), *scales, bias, channels=5)
    net.head(net.op("DequantizeLinear", x, net.constant(np.float32(0.1)), zero))
    return net


def test_a_convolution_that_reads_other_channels_than_it_is_given():
    net = Net()
    net.conv(net.input(IMAGE), 4)
    net.channels["x"] = 5  # the next weight expects five
    net.head(net.conv("x", 4))
    with pytest.raises(ModelError, match="reads 5 channels but is given 3"):
        find_spaces(net.model())


def test_a_transposed_convolution_that_reads_other_channels_than_it_is_given():
    net = Net()
    x = net.conv(net.input(IMAGE), 4)
    net.channels[x] = 5  # the next weight expects five
    net.head(transposed(net, x, 4))
    with pytest.raises(ModelError, match="reads 5 channels but is given 4"):
        find_spaces(net.model())


# --- dense layers -----------------------------------------------------------------------------------------------------


@graph(10, 12)
def perceptron():
    return dense()


@graph(8, 12)
def matmul_and_add_on_rank_3():
    net = Net()
    x = net.matmul(net.input(["N", 7, 6]), 8)  # the fan-in is the last axis
    x = net.matmul(net.op("Gelu" if net.opset >= 20 else "Tanh", x), 12)
    net.output(net.matmul(net.relu(x), 3))
    return net


@graph(9, 6, 5)
def convolution_on_a_map_made_by_a_dense_layer():
    """Every map is a block of four columns, which the convolution makes one channel."""
    net = Net()
    x = net.relu(net.reshape(net.gemm(net.input(["N", 6]), 9 * 4), 0, 9, 2, 2, channels=9))
    net.head(net.relu(net.conv(net.conv(x, 6), 5)))
    return net


@graph(9, 9, 5)
def transposed_convolution_on_a_channels_last_map_made_by_a_dense_layer():
    """A generator as TensorFlow has it: a channel's columns are spread over the dense layer's output."""
    net = Net()
    x = net.relu(net.gemm(net.relu(net.gemm(net.input(["N", 6]), 9)), 9 * 4))
    x = net.op("Transpose", net.reshape(x, 0, 2, 2, 9), perm=[0, 3, 1, 2], channels=9)
    net.head(net.relu(transposed(net, x, 5, strides=[2, 2])))
    return net


# --- recurrence -------------------------------------------------------------------------------------------------------


GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def cells(net, kind, x, hidden, directions=1, state=(), peepholes=False, outputs=1, **attributes):
    """A recurrent layer on [T, N, I]; `state` holds the names of the initial states."""
    gates, count = GATES[kind], net.channels[x]
    weights = [net.normal(directions, gates * hidden, count, scale=count**-0.5)]
    weights += [net.normal(directions, gates * hidden, hidden, scale=hidden**-0.5)]
    weights += [net.normal(directions, 2 * gates * hidden, scale=0.3)]
    rest = ["", *state] if state or peepholes else []
    if peepholes:
        rest += [""] * (3 - len(rest)) + [net.normal(directions, 3 * hidden, scale=0.3)]
    if directions == 2:
        attributes["direction"] = "bidirectional"
    return several(net, kind, [x, *weights, *rest], [hidden] * outputs, hidden_size=hidden, **attributes)


def forward(net, x):
    """[T, 1, N, H] to [T, N, H]."""
    return net.op("Squeeze", x, net.ints(1))


@graph(6, 8, 5)
def stacked_lstm():
    net = Net()
    x = net.matmul(net.input((7, "N", 4)), 6)
    x = forward(net, cells(net, "LSTM", x, 8)[0])
    net.output(net.matmul(forward(net, cells(net, "LSTM", x, 5, peepholes=True)[0]), 3))
    return net


@graph(6, 8, 8, 5)
def bidirectional_gru():
    net = Net()
    x = net.matmul(net.input((7, "N", 4)), 6)
    x = cells(net, "GRU", x, 8, directions=2, linear_before_reset=1)[0]
    x = net.reshape(net.op("Transpose", x, perm=[0, 2, 1, 3]), 0, 0, -1, channels=16)
    net.output(net.matmul(net.relu(net.matmul(x, 5)), 3))
    return net


@graph(6, 5, 5, 4)
def rnn_with_initial_states():
    net = Net()
    x = net.matmul(net.input((7, 2, 4)), 6)
    start = net.normal(2, 2, 5)
    _, last = cells(net, "RNN", x, 5, directions=2, state=[start], outputs=2)
    x = net.reshape(net.op("Transpose", last, perm=[1, 0, 2]), 2, 10, channels=10)
    net.output(net.matmul(net.relu(net.matmul(x, 4)), 3))
    return net


@graph(6, 5)
def encoder_and_decoder():
    """The second layer begins with the states in which the first ends."""
    net = Net()
    x = net.matmul(net.input((7, "N", 4)), 6)
    y, hidden, cell = cells(net, "LSTM", x, 5, outputs=3)
    y = cells(net, "LSTM", forward(net, y), 5, state=[hidden, cell])[0]
    net.output(net.matmul(forward(net, y), 3))
    return net


@graph(6, 5)
def state_learnt_and_expanded_to_the_batch():
    net = Net()
    x = net.matmul(net.input((7, "N", 4)), 6)
    batch = net.op("Gather", net.op("Shape", x), net.ints(1))
    shape = net.op("Concat", net.ints(1), batch, net.ints(5), axis=0)
    start = net.op("Expand", net.normal(1, 1, 5), shape, channels=5)
    net.output(net.matmul(forward(net, cells(net, "GRU", x, 5, state=[start])[0]), 3))
    return net


@graph(6, 5)
def state_of_zeros_of_the_batch():
    net = Net()
    x = net.matmul(net.input((7, "N", 4)), 6)
    batch = net.op("Gather", net.op("Shape", x), net.ints(1))
    shape = net.op("Concat", net.ints(1), batch, net.ints(5), axis=0)
    start = net.op("ConstantOfShape", shape, channels=5)
    net.output(net.matmul(forward(net, cells(net, "GRU", x, 5, state=[start])[0]), 3))
    return net


@graph(6, frozen=("LSTM",))
def state_given_as_an_input():
    net = Net()
    x = net.matmul(net.input((7, 2, 4)), 6)
    start = net.input((1, 2, 5), "start")
    net.output(net.matmul(forward(net, cells(net, "LSTM", x, 5, state=[start])[0]), 3))
    return net


@pytest.mark.parametrize("name", graph.names())
def test_law_holds_for_each_structure(name):
    graph.check(name)


# --- the law can fail -------------------------------------------------------------------------------------------------


def columns_first(node, trace):
    """Takes the maps to lie behind space."""
    label = trace.label(required(node, 0))
    _, maps, *space = (int(size) for size in node.outputs[0].shape)
    trace.set_label(node.outputs[0], np.moveaxis(label.reshape(1, *space, maps), -1, 1))


@each_wrong_rule(
    (transposed_convolutions, "ConvTranspose", without(RULES["ConvTranspose"], "use")),
    (grouped_transposed_convolution, "ConvTranspose", without(RULES["ConvTranspose"], "tag")),
    (grouped_transposed_convolution, "ConvTranspose", without_rows(RULES["ConvTranspose"])),
    (depthwise_transposed_convolution, "ConvTranspose", without(RULES["ConvTranspose"], "unite")),
    (quantized_convolutions, "ConvInteger", without(RULES["ConvInteger"], "use")),
    (quantized_convolutions, "QLinearConv", without(RULES["QLinearConv"], "use")),
    (quantized_convolutions, "DynamicQuantizeLinear", two_swapped(RULES["DynamicQuantizeLinear"])),
    (chain, "Conv", without(RULES["Conv"], "use")),
    (depthwise, "Conv", without(RULES["Conv"], "unite")),
    (grouped, "Conv", without(RULES["Conv"], "tag")),
    (matmul_and_add_on_rank_3, "MatMul", without(RULES["MatMul"], "use")),
    (convolution_on_a_map_made_by_a_dense_layer, "Conv", without(RULES["Conv"], "unite")),
    (convolution_on_a_map_made_by_a_dense_layer, "Reshape", columns_first),
    (
        transposed_convolution_on_a_channels_last_map_made_by_a_dense_layer,
        "ConvTranspose",
        without(RULES["ConvTranspose"], "unite"),
    ),
    (stacked_lstm, "LSTM", without(RULES["LSTM"], "use")),
    (encoder_and_decoder, "LSTM", without(RULES["LSTM"], "unite")),
    (state_given_as_an_input, "LSTM", without(RULES["LSTM"], "freeze")),
    (bidirectional_gru, "GRU", without_rows(RULES["GRU"])),
    (rnn_with_initial_states, "RNN", two_swapped(RULES["RNN"])),
)
def test_law_fails_for_a_wrong_rule(build, op_type, wrong, monkeypatch):
    assert_law_catches(build, op_type, wrong, monkeypatch)
