"""The permutation law for tensors that are cut, joined, repeated and reordered at random."""

import numpy as np
import pytest
from graphs import Net
from hypothesis import strategies as st
from structures import hold_over, several

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
    seen = hold_over(random_moves(), 200, monkeypatch)
    assert np.mean([share for share, _ in seen]) > 0.5  # the law is not kept by freezing everything
