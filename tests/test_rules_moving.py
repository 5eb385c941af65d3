"""The permutation law for operators that move channels, lay them side by side, or trade them for space."""

import numpy as np
import pytest
from graphs import Net
from structures import (
    IMAGE,
    TOKENS,
    Structures,
    assert_law_catches,
    each_wrong_rule,
    end,
    repeats_each,
    says_nothing,
    two_swapped,
    without,
    without_moves,
)

from onnxmerge.ir.rules import RULES
from onnxmerge.ir.rules.registry import required

graph = Structures()


# --- moving -----------------------------------------------------------------------------------------------------------


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


@graph(2, 5)
def shuffle_that_reorders_the_two_copies_of_a_channel():
    """Three groups over [x, tanh x]: of x's channel 1 the copies change places, of 0 and 2 they do not."""
    net = Net()
    x = net.conv(net.input(IMAGE), 3)
    x = net.reshape(net.concat(x, net.op("Tanh", x)), 0, 3, 2, 10, 10)
    x = net.reshape(net.op("Transpose", x, perm=[0, 2, 1, 3, 4]), 0, 6, 10, 10, channels=6)
    net.head(net.relu(net.conv(x, 5)))
    return net


# --- blocks of space --------------------------------------------------------------------------------------------------


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


# --- side by side -----------------------------------------------------------------------------------------------------


@graph(6, 4, 4)
def densely_connected():
    net = Net()
    x = net.conv(net.input(IMAGE), 6)
    for _ in range(2):
        x = net.concat(x, net.conv(net.relu(net.norm(x)), 4))
    net.head(x)
    return net


@graph(4, 4, 4)
def concat_of_two_activations_of_one_map():
    net = Net()
    x = net.conv(net.input(IMAGE), 4)
    other = net.conv(x, 4)
    net.head(net.relu(net.conv(net.concat(net.relu(x), net.op("Sigmoid", other)), 4)))
    return net


@graph(6, 4)
def one_channel_maps_side_by_side():
    net = Net()
    x = net.conv(net.input(IMAGE), 6)
    pair = net.concat(net.norm(net.conv(x, 1)), net.conv(x, 1))
    net.head(net.relu(net.conv(net.conv(pair, 2, group=2), 4)))
    return net


@graph(5, 5, 5)
def resize_and_skip():
    net = Net()
    wide = net.relu(net.conv(net.input(IMAGE), 5))
    deep = net.relu(net.conv(wide, 5, strides=[2, 2]))
    up = net.op("Resize", deep, "", net.constant(np.float32([1, 1, 2, 2])), mode="nearest", channels=5)
    net.output(net.conv(net.relu(net.conv(net.concat(up, wide), 5)), 2))
    return net


@graph(2, 6, 2, 10)
def zero_padded_shortcut():
    net = Net()
    x = net.relu(net.norm(net.conv(net.input(IMAGE), 6)))
    shortcut = net.pad_channels(net.op("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2]), 2, 2)
    branch = net.norm(net.conv(net.relu(net.conv(x, 10, strides=[2, 2])), 10))
    net.head(net.relu(net.op("Add", branch, shortcut)))
    return net


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


@graph(3, 3, 2, 2, 4, blocks=(2,))
def heads_joined_by_width():
    net = Net()
    left = net.reshape(net.matmul(net.input(TOKENS), 6), 0, 7, 2, 3, channels=3)
    right = net.reshape(net.op("Tanh", net.matmul("x", 4)), 0, 7, 2, 2, channels=2)
    x = net.op("Softmax", net.concat(left, right, axis=3), axis=3)
    end(net, net.relu(net.matmul(net.reshape(x, 0, 7, 10, channels=10), 4)))
    return net


@graph(2, 2, 3, 3, 4, blocks=(2,))
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


@pytest.mark.parametrize("name", graph.names())
def test_law_holds_for_each_structure(name):
    graph.check(name)


# --- the law can fail -------------------------------------------------------------------------------------------------


def transpose_without_permutation(node, trace):
    label = trace.label(required(node, 0))
    perm = node.attributes["perm"].as_ints()
    trace.set_label(node.outputs[0], label.reshape([label.shape[axis] for axis in perm]))


def flatten_channels_last(node, trace):
    label = trace.label(required(node, 0))
    columns = int(node.outputs[0].shape[1])
    trace.set_label(node.outputs[0], np.tile(label.ravel(), columns // label.size).reshape(1, -1))


def other_mode(node, trace):
    """DepthToSpace that takes the blocks of the other mode."""
    label = trace.label(required(node, 0))
    block = node.attributes["blocksize"].as_int() ** 2
    column_first = "mode" in node.attributes and node.attributes["mode"].as_string() == "CRD"
    parts = label.reshape(block, -1).T if column_first else label.reshape(-1, block)
    trace.unite(parts, parts[:, :1])
    trace.set_label(node.outputs[0], parts[:, 0].reshape(1, -1, 1, 1))


def concat_without_offset(node, trace):
    label = trace.label(required(node, 0))
    trace.set_label(node.outputs[0], np.concatenate([label] * len(node.inputs), node.attributes["axis"].as_int()))


@each_wrong_rule(
    (flatten_to_gemm, "Gemm", without(RULES["Gemm"], "use")),
    (flatten_to_gemm, "Flatten", flatten_channels_last),
    (channel_shuffle, "Transpose", transpose_without_permutation),
    (depth_to_space_depth_first, "DepthToSpace", other_mode),
    (depth_to_space_column_first, "DepthToSpace", other_mode),
    (space_to_depth_and_back, "DepthToSpace", two_swapped(RULES["DepthToSpace"])),
    (space_to_depth, "SpaceToDepth", repeats_each),
    (class_token, "Concat", without(RULES["Concat"], "use")),
    (tokens_without_channels_before_tokens, "Concat", says_nothing),
    (learnt_channels_beside_a_map, "Concat", without(RULES["Concat"], "use")),
    (input_beside_a_map, "Concat", without(RULES["Concat"], "fix")),
    (heads_joined_with_themselves_in_another_order, "Concat", without_moves(RULES["Concat"])),
    (heads_padded, "Pad", two_swapped(RULES["Pad"])),
    (channels_padded_with_their_mirror_image, "Pad", says_nothing),
    (resize_and_skip, "Concat", concat_without_offset),
)
def test_law_fails_for_a_wrong_rule(build, op_type, wrong, monkeypatch):
    assert_law_catches(build, op_type, wrong, monkeypatch)
