"""The permutation law for operators that pick indices of an axis, and for those that repeat them."""

import numpy as np
import pytest
from graphs import Net
from onnx import TensorProto
from structures import (
    IMAGE,
    TOKENS,
    Structures,
    assert_law_catches,
    each_wrong_rule,
    end,
    repeats_each,
    says_nothing,
    several,
    two_swapped,
    without,
    without_moves,
)

from onnxmerge.ir.rules import RULES

graph = Structures()


def whole_numbers(net, x, below):
    """Indices 0..below-1 out of a uniform input."""
    return net.op("Cast", net.op("Mul", x, net.constant(np.float32(below))), to=TensorProto.INT64)


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


@pytest.mark.parametrize("name", graph.names())
def test_law_holds_for_each_structure(name):
    graph.check(name)


# --- the law can fail -------------------------------------------------------------------------------------------------


@each_wrong_rule(
    (split_along_channels, "Split", two_swapped(RULES["Split"])),
    (gated_halves, "Split", two_swapped(RULES["Split"])),
    (slice_backwards_in_steps_of_two, "Slice", two_swapped(RULES["Slice"])),
    (gather_of_channels, "Gather", two_swapped(RULES["Gather"])),
    (gather_that_swaps_two_slots_of_some_channels, "Gather", without_moves(RULES["Gather"])),
    (gather_of_different_slots, "Gather", without_moves(RULES["Gather"])),
    (gather_that_repeats_different_slots, "Gather", without_moves(RULES["Gather"])),
    (tokens_at_computed_places, "Gather", two_swapped(RULES["Gather"])),
    (channels_at_computed_places, "Gather", says_nothing),
    (embedding, "Gather", without(RULES["Gather"], "use")),
    (embedding_looked_up_along_its_last_axis, "Gather", two_swapped(RULES["Gather"])),
    (best_places_of_each_channel, "TopK", two_swapped(RULES["TopK"])),
    (best_places_of_each_channel, "GatherElements", without(RULES["GatherElements"], "unite")),
    (best_tokens_by_repeated_places, "GatherElements", two_swapped(RULES["GatherElements"])),
    (places_of_each_channel_in_a_constant, "GatherElements", without(RULES["GatherElements"], "use")),
    (different_places_for_each_channel, "GatherElements", says_nothing),
    (elements_picked_among_channels, "GatherElements", says_nothing),
    (gather_nd_of_tokens, "GatherND", two_swapped(RULES["GatherND"])),
    (gather_nd_of_channels, "GatherND", says_nothing),
    (greatest_channels_and_their_places, "TopK", says_nothing),
    (place_of_the_greatest_token, "ArgMax", two_swapped(RULES["ArgMax"])),
    (place_of_the_least_channel, "ArgMin", says_nothing),
    (reversed_sequences, "ReverseSequence", two_swapped(RULES["ReverseSequence"])),
    (pooled_and_expanded, "Expand", two_swapped(RULES["Expand"])),
    (tiled_channels, "Tile", repeats_each),
    (tiled_rows, "Tile", without_moves(RULES["Tile"])),
)
def test_law_fails_for_a_wrong_rule(build, op_type, wrong, monkeypatch):
    assert_law_catches(build, op_type, wrong, monkeypatch)
