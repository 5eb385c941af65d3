"""The permutation law for each family of label rules around the core.

Every graph says how large its permutable spaces are and which operators freeze; every rule is also broken on purpose.
"""

import numpy as np
import onnx_ir as oir
import pytest
from graphs import Net
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from onnx_ir.passes import common

from onnxmerge.errors import ModelError
from onnxmerge.ir.coverage import permutable_share
from onnxmerge.ir.labels import Trace, carries
from onnxmerge.ir.normalise import normalise
from onnxmerge.ir.rules import RULES
from onnxmerge.ir.rules.registry import required
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.methods import check
from onnxmerge.methods.check import TOLERANCE, check_spaces

IMAGE = ("N", 3, 10, 10)
PAIR = (2, 3, 10, 10)
TOKENS = ("N", 7, 6)

GRAPHS = {}
"""Name -> (builder, sizes of the permutable spaces, operators that freeze)."""


def graph(*sizes: int, frozen: tuple[str, ...] = ()):
    def register(build):
        GRAPHS[build.__name__] = (build, sorted(sizes), sorted(frozen))
        return build

    return register


def several(net, op_type, inputs, channels, **attributes):
    """A node with one output for each entry of `channels`."""
    first = net.op(op_type, *inputs, channels=channels[0], **attributes)
    outputs = [first, *(f"{first}_{number}" for number in range(1, len(channels)))]
    net.nodes[-1].output.extend(outputs[1:])
    net.channels |= dict(zip(outputs, channels, strict=True))
    return outputs


def whole_numbers(net, x, below):
    """Indices 0..below-1 out of a uniform input."""
    return net.op("Cast", net.op("Mul", x, net.constant(np.float32(below))), to=TensorProto.INT64)


def end(net, x, out=5):
    """A dense layer on the mean over tokens of [N, T, C]."""
    net.output(net.matmul(net.op("ReduceMean", x, net.ints(1), keepdims=0), out))
    return net


# --- selecting --------------------------------------------------------------------------------------------------------


@graph(3, 5, 4)
def split_along_channels():
    net = Net()
    parts = several(net, "Split", [net.conv(net.input(IMAGE), 8), net.ints(3, 5)], [3, 5], axis=1)
    joined = net.op("Add", net.conv(parts[0], 4), net.conv(net.op("Tanh", parts[1]), 4))
    net.head(net.relu(joined))
    return net


@graph(6, 5)
def split_along_height():
    net = Net()
    x = net.conv(net.input(IMAGE), 6)
    top, bottom = several(net, "Split", [x], [6, 6], axis=-2, num_outputs=2)
    net.head(net.relu(net.conv(net.op("Mul", top, net.op("Sigmoid", bottom)), 5)))
    return net


@graph(4, 5)
def gated_halves():
    net = Net()
    x = net.conv(net.input(IMAGE), 8)
    left, right = several(net, "Split", [x], [4, 4], axis=1, num_outputs=2)
    net.head(net.relu(net.conv(net.op("Mul", left, net.op("Sigmoid", net.norm(right))), 5)))
    return net


@graph(3, 3, 4)
def slice_backwards_in_steps_of_two():
    net = Net()
    x = net.relu(net.conv(net.input(IMAGE), 6))
    odd = net.op("Slice", x, net.ints(-1), net.ints(-(2**63)), net.ints(1), net.ints(-2), channels=3)
    net.head(net.relu(net.op("Add", net.conv(odd, 4), net.conv(x, 4))))
    return net


@graph(5, 4)
def slices_of_space_and_of_tokens_from_the_end():
    net = Net()
    x = net.conv(net.input(IMAGE), 5)
    x = net.op("Slice", x, net.ints(1, -7), net.ints(100, -1), net.ints(-1, 2))
    net.head(net.relu(net.conv(x, 4)))
    return net


@graph(2, 2, 2, 4)
def focus_by_slices():
    """Four shifted pictures side by side, of a feature map that two halves of the channels make."""
    net = Net()
    x = net.concat(net.conv(net.input(IMAGE), 2), net.relu(net.conv("x", 4)))
    parts = [
        net.op("Slice", x, net.ints(row, column), net.ints(10, 10), net.ints(2, 3), net.ints(2, 2), channels=6)
        for row in (0, 1)
        for column in (0, 1)
    ]
    left = net.op("Slice", x, net.ints(2), net.ints(4), net.ints(1), channels=2)
    pooled = net.op("MaxPool", net.conv(left, 4), kernel_shape=[2, 2], strides=[2, 2])
    net.head(net.relu(net.op("Add", net.conv(net.concat(*parts), 4), pooled)))
    return net


@graph(2, 3, 4)
def gather_of_channels():
    net = Net()
    x = net.relu(net.conv(net.input(IMAGE), 5))
    x = net.op("Gather", x, net.ints(-1, 0, 2), axis=1, channels=3)
    net.head(net.relu(net.conv(x, 4)))
    return net


@graph(2, 2, 5)
def gather_that_swaps_two_slots_of_some_channels():
    """Four channels of two columns each; those of the last two change places."""
    net = Net()
    x = net.op("AveragePool", net.conv(net.input(IMAGE), 4), kernel_shape=[10, 5], strides=[10, 5])
    x = net.op("Gather", net.flatten(x, 8), net.ints(0, 1, 2, 3, 5, 4, 7, 6), axis=1)
    net.output(net.gemm(net.relu(net.gemm(x, 5)), 3))
    return net


@graph(2, 2, 5)
def gather_of_different_slots():
    """Of four channels with two columns each, the first column of two and the second of the others."""
    net = Net()
    x = net.op("AveragePool", net.conv(net.input(IMAGE), 4), kernel_shape=[10, 5], strides=[10, 5])
    x = net.op("Gather", net.flatten(x, 8), net.ints(0, 2, 5, 7), axis=1, channels=4)
    net.output(net.gemm(net.relu(net.gemm(x, 5)), 3))
    return net


@graph(2, 2, 5)
def gather_that_repeats_different_slots():
    net = Net()
    x = net.op("AveragePool", net.conv(net.input(IMAGE), 4), kernel_shape=[10, 5], strides=[10, 5])
    index = net.ints(0, 0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 7)
    x = net.op("Gather", net.flatten(x, 8), index, axis=1, channels=12)
    net.output(net.gemm(net.relu(net.gemm(x, 5)), 3))
    return net


@graph(6, 8)
def first_token():
    net = Net()
    x = net.relu(net.matmul(net.input(TOKENS), 6))
    first = net.op("Gather", x, net.constant(np.int64(0)), axis=1)
    net.output(net.matmul(net.relu(net.matmul(first, 8)), 3))
    return net


@graph(6, 8)
def tokens_at_computed_places():
    net = Net()
    x = net.relu(net.matmul(net.input(TOKENS), 6))
    order = whole_numbers(net, net.input([3], "places"), 7)
    end(net, net.relu(net.matmul(net.op("Gather", x, order, axis=1, channels=6), 8)))
    return net


@graph(4, frozen=("Gather",))
def channels_at_computed_places():
    net = Net()
    x = net.relu(net.conv(net.input(IMAGE), 6))
    order = whole_numbers(net, net.input([5], "places"), 6)
    net.head(net.relu(net.conv(net.op("Gather", x, order, axis=1, channels=5), 4)))
    return net


@graph(6, 8)
def embedding():
    net = Net()
    tokens = whole_numbers(net, net.input(["N", 7]), 9)
    x = net.op("Gather", net.normal(9, 6), tokens, channels=6)
    x = net.op("Add", x, net.normal(7, 6))
    end(net, net.relu(net.matmul(x, 8)))
    return net


@graph(6, 8)
def embedding_looked_up_along_its_last_axis():
    net = Net()
    tokens = whole_numbers(net, net.input(["N", 7]), 9)
    x = net.op("Transpose", net.op("Gather", net.normal(6, 9), tokens, axis=1, channels=6), perm=[1, 2, 0])
    end(net, net.relu(net.matmul(x, 8)))
    return net


@graph(4, 8)
def best_places_of_each_channel():
    net = Net()
    x = net.relu(net.matmul(net.input(TOKENS), 4))
    other = net.op("Tanh", net.matmul(x, 4))
    values, places = several(net, "TopK", [x, net.ints(3)], [4, 4], axis=1)
    picked = net.op("GatherElements", other, places, axis=1, channels=4)
    end(net, net.relu(net.op("Add", net.matmul(picked, 8), net.matmul(values, 8))))
    return net


@graph(4, 8)
def best_tokens_by_repeated_places():
    net = Net()
    x = net.relu(net.matmul(net.input(TOKENS), 4))
    score = net.op("ReduceMax", x, net.ints(2), keepdims=0)
    _, places = several(net, "TopK", [score, net.ints(3)], [1, 1], axis=1)
    wide = net.op("Tile", net.op("Unsqueeze", places, net.ints(2)), net.ints(1, 1, 4))
    end(net, net.relu(net.matmul(net.op("GatherElements", x, wide, axis=1, channels=4), 8)))
    return net


@graph(4, 8)
def places_of_each_channel_in_a_constant():
    net = Net()
    x = net.relu(net.matmul(net.input((1, 7, 6)), 4))
    places = net.constant(net.generator.integers(0, 7, (1, 2, 4)))
    end(net, net.relu(net.matmul(net.op("GatherElements", x, places, axis=1, channels=4), 8)))
    return net


@graph(frozen=("GatherElements",))
def different_places_for_each_channel():
    net = Net()
    x = net.relu(net.matmul(net.input((1, 7, 6)), 4))
    places = whole_numbers(net, net.input((1, 3, 4), "places"), 7)
    net.output(net.op("GatherElements", x, places, axis=1, channels=4))
    return net


@graph(8, frozen=("GatherElements",))
def elements_picked_among_channels():
    net = Net()
    x = net.relu(net.matmul(net.input((1, 7, 6)), 4))
    places = whole_numbers(net, net.input((1, 7, 3), "places"), 4)
    end(net, net.relu(net.matmul(net.op("GatherElements", x, places, axis=2, channels=3), 8)))
    return net


@graph(4, 8)
def gather_nd_of_tokens():
    net = Net()
    x = net.relu(net.matmul(net.input(TOKENS), 4))
    places = net.constant(np.array([[0, 2], [1, 5], [1, 0]], np.int64))
    picked = net.op("GatherND", x, places, channels=4)
    net.output(net.matmul(net.relu(net.matmul(picked, 8)), 3))
    return net


@graph(8, frozen=("GatherND",))
def gather_nd_of_channels():
    net = Net()
    x = net.relu(net.matmul(net.input((1, 7, 6)), 4))
    places = net.constant(np.array([[[0, 2], [1, 3], [5, 0]]], np.int64))
    picked = net.op("GatherND", x, places, batch_dims=1, channels=3)
    net.output(net.matmul(net.relu(net.matmul(picked, 8)), 3))
    return net


@graph(5, 4)
def greatest_channels_without_their_places():
    net = Net()
    x = net.relu(net.conv(net.input(IMAGE), 5))
    best, _ = several(net, "TopK", [x, net.ints(3)], [3, 3], axis=1)
    net.head(net.relu(net.conv(best, 4)))
    return net


@graph(frozen=("TopK",))
def greatest_channels_and_their_places():
    net = Net()
    pooled = net.op("GlobalAveragePool", net.relu(net.conv(net.input(IMAGE), 5)))
    best, places = several(net, "TopK", [net.flatten(pooled, 5), net.ints(3)], [3, 3], axis=1)
    net.output(best, net.op("Cast", places, to=TensorProto.FLOAT))
    return net


@graph(4, 8)
def place_of_the_greatest_token():
    net = Net()
    x = net.matmul(net.input(TOKENS), 4)
    place = net.op("Cast", net.op("ArgMax", x, axis=1, keepdims=0), to=TensorProto.FLOAT)
    net.output(net.matmul(net.relu(net.matmul(place, 8)), 3))
    return net


@graph(frozen=("ArgMin",))
def place_of_the_least_channel():
    net = Net()
    x = net.matmul(net.input(TOKENS), 4)
    net.output(net.op("Cast", net.op("ArgMin", x, axis=-1), to=TensorProto.FLOAT))
    return net


@graph(4, 5)
def reversed_sequences():
    net = Net()
    x = net.matmul(net.input((7, 2, 6)), 4)
    x = net.op("ReverseSequence", x, net.ints(2, 1), time_axis=0, batch_axis=1)
    end(net, net.relu(net.matmul(x, 5)))
    return net


# --- spreading --------------------------------------------------------------------------------------------------------


@graph(6, 5)
def pooled_and_expanded():
    net = Net()
    x = net.conv(net.input(IMAGE), 6)
    wide = net.op("Expand", net.op("GlobalAveragePool", x), net.ints(1, 1, 10, 10))
    net.head(net.relu(net.conv(net.concat(wide, x), 5)))
    return net


@graph(6, 5)
def expanded_to_the_shape_of_another_map():
    net = Net()
    x = net.conv(net.input(("N", 3, "H", "W")), 6)
    wide = net.op("Expand", net.op("GlobalAveragePool", x), net.op("Shape", x), channels=6)
    net.head(net.relu(net.conv(net.op("Mul", x, net.op("Sigmoid", wide)), 5)))
    return net


@graph(4, 5)
def tiled_channels():
    net = Net()
    x = net.conv(net.input(IMAGE), 4)
    x = net.op("Tile", x, net.ints(1, 3, 1, 2), channels=12)
    net.head(net.relu(net.conv(net.norm(x), 5)))
    return net


@graph(2, 5)
def tiled_rows():
    """Rows [p, q, q] and [p, r, r] twice beside themselves: the slots of p then come in another order than q's."""
    net = Net()
    x = net.op("Gather", net.matmul(net.input(TOKENS), 3), net.ints(0, 1, 1, 0, 2, 2), axis=2)
    x = net.reshape(net.op("Mul", x, net.uniform(6)), 0, 7, 2, 3, channels=3)
    x = net.reshape(net.op("Tile", x, net.ints(1, 1, 1, 2)), 0, 7, 12, channels=12)
    end(net, net.relu(net.matmul(x, 5)))
    return net


# --- convolutions -----------------------------------------------------------------------------------------------------


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


# --- blocks -----------------------------------------------------------------------------------------------------------


@graph(6, 5)
def depth_to_space_depth_first():
    net = Net()
    x = net.op("DepthToSpace", net.conv(net.input(IMAGE), 24), blocksize=2, channels=6)
    net.head(net.relu(net.conv(net.norm(x), 5)))
    return net


@graph(6, 5)
def depth_to_space_column_first():
    net = Net()
    x = net.op("DepthToSpace", net.conv(net.input(IMAGE), 24), blocksize=2, mode="CRD", channels=6)
    net.head(net.relu(net.conv(net.norm(x), 5)))
    return net


@graph(6, 5)
def space_to_depth():
    net = Net()
    x = net.op("SpaceToDepth", net.conv(net.input(IMAGE), 6), blocksize=2, channels=24)
    net.head(net.relu(net.conv(net.norm(x), 5)))
    return net


@graph(4, 5)
def space_to_depth_and_back():
    net = Net()
    x = net.op("SpaceToDepth", net.conv(net.input(IMAGE), 4), blocksize=2, channels=16)
    x = net.op("DepthToSpace", net.op("Tanh", x), blocksize=2, channels=4)
    net.head(net.relu(net.conv(x, 5)))
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


# --- norms ------------------------------------------------------------------------------------------------------------


@graph(2, 3, 3, 5)
def group_norm_with_a_scale_per_group():
    net = Net()
    x = net.conv(net.input(PAIR), 6)
    x = net.op("GroupNormalization", x, net.uniform(2), net.normal(2), num_groups=2)
    net.head(net.relu(net.conv(x, 5)))
    return net


@graph(2, 3, 3, 5)
def group_norm_with_a_scale_per_channel():
    net = Net(opset=21)
    x = net.conv(net.input(PAIR), 6)
    x = net.op("GroupNormalization", x, net.uniform(6), net.normal(6), num_groups=2)
    net.head(net.relu(net.conv(x, 5)))
    return net


@graph(2, 3, 3, 5)
def group_norm_as_exported_before():
    net = Net()
    x = net.reshape(net.conv(net.input(IMAGE), 6), 0, 2, -1, channels=2)
    x = net.op("InstanceNormalization", x, net.uniform(2), net.normal(2))
    x = net.reshape(x, 0, 6, 10, 10, channels=6)
    net.head(net.relu(net.conv(net.op("Mul", x, net.uniform(6, 1, 1)), 5)))
    return net


@graph(6, 5)
def one_group_and_groups_of_one():
    net = Net()
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


@graph(2, 3, 3, 5)
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


# --- space ------------------------------------------------------------------------------------------------------------


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


# --- side by side -----------------------------------------------------------------------------------------------------


@graph(6, 8)
def class_token():
    net = Net()
    x = net.matmul(net.input(TOKENS), 6)
    batch = net.op("Gather", net.op("Shape", x), net.ints(0))
    token = net.op("Expand", net.normal(1, 1, 6), net.op("Concat", batch, net.ints(1, 1), axis=0), channels=6)
    x = net.op("Add", net.op("Concat", token, x, axis=1), net.normal(1, 8, 6))
    end(net, net.relu(net.matmul(x, 8)))
    return net


@graph(6, 8, frozen=("Concat",))
def tokens_without_channels_before_tokens():
    net = Net()
    x = net.matmul(net.input(TOKENS), 6)
    end(net, net.relu(net.matmul(net.op("Concat", "x", net.relu(net.matmul(x, 6)), axis=1), 8)))
    return net


@graph(6, 2, 5)
def learnt_channels_beside_a_map():
    net = Net()
    x = net.conv(net.input((1, 3, 10, 10)), 6)
    more = net.normal(1, 2, 10, 10)
    net.channels[more] = 2
    net.head(net.relu(net.conv(net.concat(x, more), 5)))
    return net


@graph(6, 5)
def input_beside_a_map():
    net = Net()
    net.head(net.relu(net.conv(net.concat(net.conv(net.input(IMAGE), 6), "x"), 5)))
    return net


@graph(2, 3, 3, 2, 2, 4)
def heads_joined_by_width():
    net = Net()
    left = net.reshape(net.matmul(net.input(TOKENS), 6), 0, 7, 2, 3, channels=3)
    right = net.reshape(net.op("Tanh", net.matmul("x", 4)), 0, 7, 2, 2, channels=2)
    x = net.op("Softmax", net.concat(left, right, axis=3), axis=3)
    end(net, net.relu(net.matmul(net.reshape(x, 0, 7, 10, channels=10), 4)))
    return net


@graph(2, 2, 2, 3, 3, 4)
def heads_padded():
    net = Net()
    x = net.reshape(net.matmul(net.input(TOKENS), 6), 0, 7, 2, 3, channels=3)
    x = net.op("Pad", x, net.ints(1, 0, 2, 1), "", net.ints(-1, 1), channels=6)
    x = net.op("Softmax", x, axis=3)
    end(net, net.relu(net.matmul(net.reshape(x, 0, 8, 12, channels=12), 4)))
    return net


@graph(3, 3, 4)
def heads_joined_with_themselves_in_another_order():
    """The two slots of a channel lie in one order for the first head, in the other for the second."""
    net = Net()
    x = net.reshape(net.matmul(net.input(TOKENS), 6), 0, 7, 2, 3, channels=3)
    x = net.op("Concat", x, net.op("Tanh", net.op("Gather", x, net.ints(1, 0), axis=2)), axis=3)
    end(net, net.relu(net.matmul(net.reshape(x, 0, 7, 12, channels=12), 4)))
    return net


@graph(4, frozen=("Pad",))
def channels_padded_with_their_mirror_image():
    net = Net()
    x = net.op("Pad", net.conv(net.input(IMAGE), 6), net.ints(0, 1, 0, 0, 0, 1, 0, 0), mode="reflect", channels=8)
    net.head(net.relu(net.conv(x, 4)))
    return net


def ready(net):
    """The normal form, with the shapes that onnx's inference does not find: these operators keep their input's."""
    model = normalise(oir.from_proto(net.proto(infer=False)))
    for node in model.graph:
        if node.op_type in ("GroupNormalization", "MeanVarianceNormalization"):
            node.outputs[0].shape = node.inputs[0].shape
            node.outputs[0].type = node.inputs[0].type
            common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    return model


def law(model):
    return check_spaces(model, find_spaces(model), seed=0, threads=1)


@pytest.mark.parametrize("name", GRAPHS)
def test_law_holds_for_each_structure(name):
    build, sizes, frozen = GRAPHS[name]
    model = ready(build())
    spaces = find_spaces(model)
    assert law(model).passed
    assert sorted(space.size for space in spaces.permutable()) == sizes
    assert sorted(node.op for node in spaces.frozen) == frozen


# --- random moves -----------------------------------------------------------------------------------------------------

MOVES = ("slice", "gather", "split", "tile", "expand", "join", "pad", "transpose", "flatten", "fold", "dense")
MOVES += ("add", "Softmax", "LpNormalization", "Relu", "TopK", "ReduceMax")


@st.composite
def random_moves(draw):
    """Tensors that are cut, joined, repeated and reordered at random; the first axis is the batch."""
    net = Net(seed=draw(st.integers(0, 99)))
    first = net.matmul(net.input(("N", 4)), draw(st.integers(2, 6)))
    shapes = {first: [net.channels[first]]}

    def keep(name, shape):
        """Scaled entry by entry, so that copies of a channel differ."""
        shape = [int(size) for size in shape]
        scaled = net.op("Mul", name, net.uniform(1, *shape), channels=shape[-1])
        shapes[scaled] = shape

    steps = draw(st.lists(st.sampled_from(MOVES), min_size=1, max_size=5, unique=True))
    for _ in range(draw(st.integers(3, 9))):
        x = draw(st.sampled_from(list(shapes)[-3:]))
        shape = list(shapes[x])
        axis = draw(st.integers(0, len(shape) - 1))
        size, others = shape[axis], [*shape]
        number = net.ints(axis + 1)
        step = draw(st.sampled_from(steps))
        if step == "slice":
            start, stop = draw(st.integers(-9, 9)), draw(st.integers(-9, 9))
            stride = draw(st.sampled_from([-3, -2, -1, 1, 2, 3]))
            others[axis] = len(range(size)[start:stop:stride])
            if others[axis]:
                keep(net.op("Slice", x, net.ints(start), net.ints(stop), number, net.ints(stride)), others)
        elif step == "gather":
            some = st.lists(st.integers(-size, size - 1), min_size=1, max_size=8)
            index = np.array(draw(some | st.permutations(range(size))))
            index = index.reshape(2, -1) if index.size % 2 == 0 and draw(st.booleans()) else index
            made = net.op("Gather", x, net.constant(index.astype(np.int64)), axis=axis + 1)
            keep(made, [*shape[:axis], *index.shape, *shape[axis + 1 :]])
        elif step == "split" and size > 1:
            cut = draw(st.integers(1, size - 1))
            parts = several(net, "Split", [x, net.ints(cut, size - cut)], [1, 1], axis=axis + 1)
            for part, own in zip(parts, (cut, size - cut), strict=True):
                keep(part, [*shape[:axis], own, *shape[axis + 1 :]])
        elif step == "tile":
            counts = [draw(st.integers(1, 2)) for _ in shape]
            keep(net.op("Tile", x, net.ints(1, *counts)), np.multiply(shape, counts))
        elif step == "expand" and len(shape) < 3:
            others.insert(axis, 2)
            keep(net.op("Expand", net.op("Unsqueeze", x, number), net.ints(1, *others)), others)
        elif step == "join":
            fits = [y for y, own in shapes.items() if own[:axis] + own[axis + 1 :] == shape[:axis] + shape[axis + 1 :]]
            fits = [y for y in fits if len(shapes[y]) == len(shape)]
            parts = [x, draw(st.sampled_from(fits))]
            others[axis] = sum(shapes[y][axis] for y in parts)
            keep(net.op("Concat", *parts, axis=axis + 1), others)
        elif step == "pad":
            before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
            others[axis] += before + after
            keep(net.op("Pad", x, net.ints(before, after), "", number), others)
        elif step == "transpose":
            order = draw(st.permutations(range(len(shape))))
            keep(net.op("Transpose", x, perm=[0, *(a + 1 for a in order)]), [shape[a] for a in order])
        elif step == "flatten":
            keep(net.reshape(x, 0, -1), [np.prod(shape)])
        elif step == "fold" and len(shape) < 3:
            halves = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
            others[axis : axis + 1] = [halves, size // halves]
            keep(net.reshape(x, 0, *others), others)
        elif step == "dense":
            out = draw(st.integers(1, 6))
            keep(net.matmul(x, out), [*shape[:-1], out])
        elif step == "add":
            keep(net.op("Add", x, draw(st.sampled_from([y for y, own in shapes.items() if own == shape]))), shape)
        elif step in ("Softmax", "LpNormalization"):
            keep(net.op(step, x, axis=axis + 1), shape)
        elif step == "Relu":
            keep(net.relu(x), shape)
        elif step == "TopK":
            others[axis] = draw(st.integers(1, size))
            values, _ = several(net, "TopK", [x, net.ints(others[axis])], [1, 1], axis=axis + 1)
            keep(values, others)
        elif step == "ReduceMax" and len(shape) > 1:
            keep(net.op("ReduceMax", x, number, keepdims=0), [*shape[:axis], *shape[axis + 1 :]])
        if max(np.prod(own) for own in shapes.values()) > 200:
            break
    ends = [net.gemm(net.reshape(x, 0, -1, channels=int(np.prod(own))), 4) for x, own in shapes.items()]
    net.output(net.gemm(net.op("Tanh", net.op("Sum", *ends)), 3))
    return net


@pytest.mark.slow
def test_law_holds_for_random_moves(monkeypatch):
    monkeypatch.setattr(check, "ALONE_LIMIT", 0)
    shares = []

    @settings(max_examples=200)
    @given(random_moves())
    def holds(net):
        model = net.model()
        spaces = find_spaces(model)
        result = check_spaces(model, spaces, seed=1, threads=1)
        assert result.passed, result
        shares.append(permutable_share(model, spaces))

    holds()
    assert len(shares) >= 150
    assert np.mean(shares) > 0.5  # the law is not kept by freezing everything


# --- the law can fail -------------------------------------------------------------------------------------------------


def says_nothing(node, trace):
    """Lets all channels go, as if the result were the same in any order."""


def passes_label(node, trace):
    trace.set_label(node.outputs[0], trace.label(required(node, 0)))


def two_swapped(op_type):
    """The rule that then mixes up the first two channels of each output."""

    def rule(node, trace):
        RIGHT[op_type](node, trace)
        for output in node.outputs:
            label = trace.label(output)
            if carries(label):
                first, second = list(dict.fromkeys(label.ravel().tolist()))[:2]
                swapped = np.where(label == second, first, label)
                trace.set_label(output, np.where(label == first, second, swapped))

    return rule


def without(op_type, *forgotten):
    """The rule that forgets some of what it should say of the trace."""

    def rule(node, trace):
        with pytest.MonkeyPatch.context() as patch:
            for name in forgotten:
                patch.setattr(Trace, name, lambda *_: None)
            RIGHT[op_type](node, trace)

    return rule


def without_moves(op_type):
    def rule(node, trace):
        before = len(trace.moves)
        RIGHT[op_type](node, trace)
        del trace.moves[before:]

    return rule


def without_rows(op_type):
    """Takes the slots of all rows to belong to the channels of one group or direction."""
    use = Trace.use

    def rule(node, trace):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trace, "use", lambda self, constant, axes, atoms, _=None: use(self, constant, axes, atoms))
            RIGHT[op_type](node, trace)

    return rule


def repeats_each(node, trace):
    label = trace.label(required(node, 0))
    count = int(node.outputs[0].shape[1]) // label.size
    trace.set_label(node.outputs[0], np.repeat(label, count, axis=1))


def other_mode(node, trace):
    """DepthToSpace that takes the blocks of the other mode."""
    label = trace.label(required(node, 0))
    block = node.attributes["blocksize"].as_int() ** 2
    column_first = "mode" in node.attributes and node.attributes["mode"].as_string() == "CRD"
    parts = label.reshape(block, -1).T if column_first else label.reshape(-1, block)
    trace.unite(parts, parts[:, :1])
    trace.set_label(node.outputs[0], parts[:, 0].reshape(1, -1, 1, 1))


RIGHT = dict(RULES)

MUTANTS = [
    *((build, "Split", two_swapped("Split")) for build in (split_along_channels, gated_halves)),
    (slice_backwards_in_steps_of_two, "Slice", two_swapped("Slice")),
    (gather_of_channels, "Gather", two_swapped("Gather")),
    (gather_that_swaps_two_slots_of_some_channels, "Gather", without_moves("Gather")),
    (gather_of_different_slots, "Gather", without_moves("Gather")),
    (gather_that_repeats_different_slots, "Gather", without_moves("Gather")),
    (tokens_at_computed_places, "Gather", two_swapped("Gather")),
    (channels_at_computed_places, "Gather", says_nothing),
    (embedding, "Gather", without("Gather", "use")),
    (embedding_looked_up_along_its_last_axis, "Gather", two_swapped("Gather")),
    (best_places_of_each_channel, "TopK", two_swapped("TopK")),
    (best_places_of_each_channel, "GatherElements", without("GatherElements", "unite")),
    (best_tokens_by_repeated_places, "GatherElements", two_swapped("GatherElements")),
    (places_of_each_channel_in_a_constant, "GatherElements", without("GatherElements", "use")),
    (different_places_for_each_channel, "GatherElements", says_nothing),
    (elements_picked_among_channels, "GatherElements", says_nothing),
    (gather_nd_of_tokens, "GatherND", two_swapped("GatherND")),
    (gather_nd_of_channels, "GatherND", says_nothing),
    (greatest_channels_and_their_places, "TopK", says_nothing),
    (place_of_the_greatest_token, "ArgMax", two_swapped("ArgMax")),
    (place_of_the_least_channel, "ArgMin", says_nothing),
    (reversed_sequences, "ReverseSequence", two_swapped("ReverseSequence")),
    (pooled_and_expanded, "Expand", two_swapped("Expand")),
    (tiled_channels, "Tile", repeats_each),
    (tiled_rows, "Tile", without_moves("Tile")),
    (transposed_convolutions, "ConvTranspose", without("ConvTranspose", "use")),
    (grouped_transposed_convolution, "ConvTranspose", without("ConvTranspose", "tag")),
    (grouped_transposed_convolution, "ConvTranspose", without_rows("ConvTranspose")),
    (depthwise_transposed_convolution, "ConvTranspose", without("ConvTranspose", "unite")),
    (quantized_convolutions, "ConvInteger", without("ConvInteger", "use")),
    (quantized_convolutions, "QLinearConv", without("QLinearConv", "use")),
    (quantized_convolutions, "DynamicQuantizeLinear", two_swapped("DynamicQuantizeLinear")),
    (depth_to_space_depth_first, "DepthToSpace", other_mode),
    (depth_to_space_column_first, "DepthToSpace", other_mode),
    (space_to_depth_and_back, "DepthToSpace", two_swapped("DepthToSpace")),
    (space_to_depth, "SpaceToDepth", repeats_each),
    (stacked_lstm, "LSTM", without("LSTM", "use")),
    (encoder_and_decoder, "LSTM", without("LSTM", "unite")),
    (state_given_as_an_input, "LSTM", without("LSTM", "freeze")),
    (bidirectional_gru, "GRU", without_rows("GRU")),
    (rnn_with_initial_states, "RNN", two_swapped("RNN")),
    (quantized_product, "MatMulInteger", RIGHT["MatMul"]),
    (quantized_by_channel, "QuantizeLinear", passes_label),
    (quantized_by_channel, "DequantizeLinear", passes_label),
    (group_norm_with_a_scale_per_group, "GroupNormalization", passes_label),
    (group_norm_with_a_scale_per_channel, "GroupNormalization", without("GroupNormalization", "use")),
    (group_norm_with_a_scale_per_channel, "GroupNormalization", without("GroupNormalization", "bind")),
    (group_norm_as_exported_before, "InstanceNormalization", passes_label),
    (lp_norm_in_each_head, "LpNormalization", passes_label),
    (mean_variance_norm, "MeanVarianceNormalization", two_swapped("MeanVarianceNormalization")),
    (regions_and_grids, "GridSample", two_swapped("GridSample")),
    (regions_and_grids, "RoiAlign", two_swapped("RoiAlign")),
    (grid_out_of_channels, "GridSample", says_nothing),
    (resize_of_named_axes, "Resize", two_swapped("Resize")),
    (resize_of_channels_to_the_same_size, "Resize", passes_label),
    (class_token, "Concat", without("Concat", "use")),
    (tokens_without_channels_before_tokens, "Concat", says_nothing),
    (learnt_channels_beside_a_map, "Concat", without("Concat", "use")),
    (input_beside_a_map, "Concat", without("Concat", "fix")),
    (heads_joined_with_themselves_in_another_order, "Concat", without_moves("Concat")),
    (heads_padded, "Pad", two_swapped("Pad")),
    (channels_padded_with_their_mirror_image, "Pad", says_nothing),
]


@pytest.mark.parametrize("number", range(len(MUTANTS)), ids=lambda n: f"{MUTANTS[n][0].__name__}-{MUTANTS[n][1]}")
def test_law_fails_for_a_wrong_rule(number, monkeypatch):
    build, op_type, wrong = MUTANTS[number]
    model = ready(build())
    assert law(model).passed
    monkeypatch.setitem(RULES, op_type, wrong)
    result = law(model)
    assert not result.passed
    assert result.max_relative_error > 100 * TOLERANCE


def test_a_transposed_convolution_that_reads_other_channels_than_it_is_given():
    net = Net()
    x = net.conv(net.input(IMAGE), 4)
    net.channels[x] = 5  # the next weight expects five
    net.head(transposed(net, x, 4))
    with pytest.raises(ModelError, match="reads 5 channels but is given 4"):
        find_spaces(net.model())
