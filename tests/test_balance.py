"""Balancing depth: added steps change nothing and match node by node; collapsed layers are what the formulas say."""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import numpy as np
import onnx_ir as oir
import pytest
from graphs import Net, assert_same_outputs, execute, feeds_for

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.correspond import correspond
from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.load import load
from onnxmerge.ir.stages import find_steps
from onnxmerge.ir.weights import get_array, set_array
from onnxmerge.methods.fuse.balance import Balanced, balance
from onnxmerge.passes.collapse import Collapse, Signs, find_signs
from onnxmerge.passes.ensure_biases import EnsureBiases
from onnxmerge.passes.fold_batch_norm import FoldBatchNorm
from onnxmerge.passes.insert_like import InsertLike

IMAGE = ("N", 3, 10, 10)
DEEPEST = 5


class Feeds:
    """Samples of a network with one input."""

    def __init__(self, array: np.ndarray, name: str = "x"):
        self.array, self.name = array, name

    def batches(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(self.array), size):
            yield {self.name: self.array[start : start + size]}


def sized(name: str, model: oir.Model, count: int = 64) -> Feeds:
    return Feeds(next(iter(feeds_for(model, batch=count).values())), name)


# --- networks of a given number of steps ------------------------------------------------------------------------------


def dense(depth: int, width: int, seed: int, norm: bool) -> Net:
    net = Net(seed)
    x = net.input(["N", 6])
    for number in range(depth):
        x = net.gemm(x, width + number, transposed=not norm)
        x = net.relu(net.norm(x) if norm else x)
    net.output(net.gemm(x, 4))
    return net


def tokens(depth: int, width: int, seed: int, norm: bool) -> Net:
    """Matrices on the last of three axes, where no batch norm fits."""
    net = Net(seed)
    x = net.input(["N", 5, 6])
    for _ in range(depth):
        x = net.relu(net.matmul(x, width))
    net.output(net.matmul(x, 4))
    return net


def convolutions(depth: int, width: int, seed: int, norm: bool) -> Net:
    """The first one strided; kernels of 3 and, dilated, of 5 places."""
    net = Net(seed)
    x = net.input(IMAGE)
    for number in range(depth):
        attributes = {"strides": [2, 2]} if number == 0 else {"dilations": [2, 2], "pads": [2] * 4}
        x = net.conv(x, width, **attributes)
        x = net.op("Clip", net.norm(x) if norm else x, net.constant(np.float32(0)), net.constant(np.float32(6)))
    net.head(x)
    return net


def block(net: Net, x: str, width: int, norm: bool, stride: int = 1) -> str:
    def layer(x: str, out: int, **attributes: object) -> str:
        made = net.conv(x, out, **attributes)
        return net.norm(made) if norm else made

    inner = net.relu(layer(x, max(width // 2, 1), kernel=1))
    branch = layer(net.relu(layer(inner, width, strides=[stride] * 2)), width)
    shortcut = x if stride == 1 else layer(x, width, kernel=1, strides=[stride] * 2)
    return net.relu(net.op("Add", branch, shortcut))


def blocks(depth: int, width: int, seed: int, norm: bool) -> Net:
    """A stem layer, a strided block that begins a stage, and more blocks in it."""
    net = Net(seed)
    x = net.relu(net.conv(net.input(IMAGE), width))
    for number in range(depth - 1):
        x = block(net, x, 2 * width, norm, stride=2 if number == 0 else 1)
    net.head(x)
    return net


FAMILIES: dict[str, Callable[[int, int, int, bool], Net]] = {
    f.__name__: f for f in (dense, tokens, convolutions, blocks)
}
MAPS = [
    (m, chosen)
    for m in range(2, DEEPEST + 1)
    for n in range(1, m)
    for chosen in combinations(range(m), n)
    if chosen[0] == 0
]


def ready(net: Net | oir.Model, fold: bool = True) -> oir.Model:
    model = net.model() if isinstance(net, Net) else net
    if fold:
        FoldBatchNorm()(model)
    EnsureBiases()(model)
    return model


def matched(deep: oir.Model, shallow: oir.Model, chosen: Sequence[int]) -> list:
    steps = find_steps(deep)
    return list(zip([steps[place] for place in chosen], find_steps(shallow), strict=True))


def assert_balanced(result: Balanced) -> None:
    """Every node and array of one network has its partner in the other, and every step."""
    found = correspond(result.deep, result.shallow, same_sizes=False)
    assert found.stopped == []
    for names, pick in ((found.values, values), (found.constants, lambda m: set(m.graph.initializers))):
        assert set(names) == pick(result.deep)
        assert set(names.values()) == pick(result.shallow)
    assert [a for a, _ in result.pairs] == find_steps(result.deep)
    assert [b for _, b in result.pairs] == find_steps(result.shallow)
    for a, b in result.pairs:
        assert (a.kind, a.block, found.values[a.cut]) == (b.kind, b.block, b.cut)
        assert [found.constants[layer] for layer in a.layers] == list(b.layers)


def values(model: oir.Model) -> set[str]:
    return {v.name for v in [*model.graph.inputs, *(o for node in model.graph for o in node.outputs)]}


def add(deep: oir.Model, shallow: oir.Model, chosen: Sequence[int]) -> Balanced:
    """Balance by adding; nothing may change but the depth, and the arguments not at all."""
    before = [values(deep), values(shallow)]
    result = balance(deep, shallow, matched(deep, shallow, chosen))
    assert [values(deep), values(shallow)] == before
    assert_balanced(result)
    assert_same_outputs(shallow, result.shallow, feeds_for(shallow))
    assert_same_outputs(deep, result.deep, feeds_for(deep))
    return result


# --- adding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "depth", "chosen"),
    [(f, *case) for f in FAMILIES for case in MAPS if f != "blocks" or case[1][1:2] == (1,)],  # the strided block stays
    ids=str,
)
def test_every_increasing_map(family, depth, chosen):
    build = FAMILIES[family]
    result = add(ready(build(depth, 8, 0, False)), ready(build(len(chosen), 6, 1, False)), chosen)
    assert len(result.pairs) == depth


@pytest.mark.parametrize("family", ["dense", "convolutions", "blocks"])
@pytest.mark.parametrize("fold", [True, False], ids=["folded", "norms"])
def test_batch_norms(family, fold):
    deep, shallow = (ready(FAMILIES[family](d, w, s, True), fold) for d, w, s in ((4, 8, 0), (2, 6, 1)))
    result = add(deep, shallow, (0, 1))
    norms = sum(node.op_type == "BatchNormalization" for node in result.shallow.graph)
    assert (norms > 0) == (not fold)


def pooled(*layers: str) -> oir.Model:
    """c: convolution and ReLU; p: pooling; f: flatten; d: dense and ReLU."""
    net = Net(len(layers))
    x = net.input(["N", 3, 8, 8])
    for layer in layers:
        if layer == "c":
            x = net.relu(net.conv(x, 4))
        elif layer == "p":
            x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
        elif layer == "f":
            x = net.flatten(x, 4 * 64 // 4 ** layers.count("p"))
        else:
            x = net.relu(net.gemm(x, 7))
    net.output(net.gemm(x, 5))
    return ready(net)


@pytest.mark.parametrize(
    ("deep", "shallow", "chosen"),
    [
        ("ccpfd", "cpfd", (0, 2)),  # before the pooling
        ("cpcfd", "cpfd", (0, 2)),  # behind it
        ("ccpccfd", "cpfd", (0, 4)),  # both
        ("cpcpcfd", "cpcpfd", (0, 1, 3)),
        ("cpcfdd", "cpfd", (0, 3)),  # a dense layer as wide as all places times channels
        ("cpfdd", "cpfd", (0, 1)),  # behind the last
    ],
)
def test_before_and_behind_pooling(deep, shallow, chosen):
    add(pooled(*deep), pooled(*shallow), chosen)


def preactivated(depth: int, width: int, slopes: bool) -> oir.Model:
    """Blocks on a stream that no activation touches, as in super-resolution: with slopes for each channel inside."""
    net = Net(width)
    x = net.conv(net.input(IMAGE), width)
    for _ in range(depth):
        inner = net.conv(x, 2 * width)
        inner = net.op("PRelu", inner, net.uniform(2 * width, 1, 1)) if slopes else net.op("Sigmoid", inner)
        x = net.op("Add", x, net.conv(inner, width))
    net.output(net.conv(x, 2))
    return ready(net)


@pytest.mark.parametrize("slopes", [True, False])
def test_blocks_with_other_activations_inside(slopes):
    result = add(preactivated(3, 4, slopes), preactivated(1, 6, slopes), (0, 2))
    (inner,) = {layer.out_channels for layer in find_layers(result.shallow) if "added" in layer.name} - {6}
    assert inner == 12


@pytest.mark.parametrize("layer", ["matmul", "gemm", "transposed gemm"])
def test_dense_blocks(layer):
    """Residual blocks of two matrices, the first one narrower."""

    def linear(net: Net, x: str, out: int) -> str:
        return net.matmul(x, out) if layer == "matmul" else net.gemm(x, out, transposed=layer != "gemm")

    def build(depth: int, width: int) -> oir.Model:
        net = Net(depth)
        x = net.relu(linear(net, net.input(["N", 4, 6] if layer == "matmul" else ["N", 6]), width))
        for _ in range(depth):
            inner = net.relu(linear(net, x, width // 2))
            x = net.relu(net.op("Add", x, linear(net, inner, width)))
        net.output(linear(net, x, 3))
        return ready(net)

    result = add(build(3, 8), build(1, 6), (0, 2))
    assert {layer.out_channels for layer in find_layers(result.shallow)} == {6, 3}


def test_even_kernels_and_automatic_padding():
    def build(depth: int, **attributes: object) -> oir.Model:
        net = Net(depth)
        x = net.relu(net.conv(net.input(IMAGE), 4))
        for _ in range(depth):
            x = net.relu(net.conv(x, 4, **attributes))
        net.head(x)
        return ready(net)

    for attributes in (
        {"kernel": 2, "pads": [0, 1, 1, 0]},
        {"kernel": 4, "auto_pad": "SAME_UPPER"},
        {"kernel": 4, "auto_pad": "SAME_LOWER"},
        {"kernel": 3, "group": 2},
        {"kernel": 3, "group": 4},
    ):
        add(build(2, **attributes), build(1, **attributes), (0, 1))


def test_balanced_twice():
    """A network that has been added to can be added to again."""
    five, three, two = (ready(dense(depth, 8, depth, False)) for depth in (5, 3, 2))
    once = add(three, two, (0, 1))
    add(five, once.shallow, (0, 2, 4))


def test_steps_that_cannot_be_added_are_named():
    strided = ready(blocks(3, 4, 0, False))
    inside = ready(blocks(2, 4, 1, False))
    with pytest.raises(ModelError, match="identity skip"):
        balance(strided, inside, matched(strided, inside, (0, 2)))

    def layers(*strides: int, activation: str = "Relu") -> oir.Model:
        net = Net(len(strides))
        x = net.input(IMAGE)
        for stride in strides:
            x = net.op(activation, net.conv(x, 4, strides=[stride] * 2))
        net.head(x)
        return ready(net)

    for deep, shallow, message in [
        (layers(1, 2, 1), layers(1, 1), "places"),
        (layers(1, 1, 1, activation="Tanh"), layers(1, 1, activation="Tanh"), "not idempotent"),
        (layers(1, 1, 1), layers(1, 1, activation="Tanh"), "lies before it"),
        (layers(1, 1, 2), layers(1, 1), "differ in more than their depth"),
    ]:
        with pytest.raises(ModelError, match=message):
            balance(deep, shallow, matched(deep, shallow, (0, 2)))
    deep, shallow = layers(1, 1), layers(1)
    with pytest.raises(ModelError, match="first steps"):
        balance(deep, shallow, matched(deep, shallow, (1,)))


def test_maps_that_are_none():
    deep, shallow = ready(dense(4, 8, 0, False)), ready(dense(2, 8, 1, False))
    steps, own = find_steps(deep), find_steps(shallow)
    for pairs, message in [
        ([(steps[0], own[0])], "every step"),
        ([(steps[2], own[0]), (steps[1], own[1])], "must increase"),
        ([(steps[1], own[0]), (steps[1], own[1])], "must increase"),
    ]:
        with pytest.raises(UsageError, match=message):
            balance(deep, shallow, pairs)
    with pytest.raises(UsageError, match="samples"):
        balance(deep, shallow, matched(deep, shallow, (0, 3)), "collapse")


def test_a_copy_refuses_a_value_of_another_rank():
    deep, shallow = pooled("c", "f", "d"), ready(dense(2, 8, 0, False))
    node = next(node for node in deep.graph if node.op_type == "Conv")
    with pytest.raises(ModelError, match="does not fit"):
        InsertLike(find_steps(shallow)[0].cut, [node], again=False, name="added")(shallow)


# --- collapsing: the formulas -----------------------------------------------------------------------------------------


def test_the_three_estimates():
    """Mostly off but large when on; mostly on; half on; always zero."""
    rows = np.array([[9, 1, 1, 0], [-1, 1, -1, 0], [-1, 1, 1, 0], [-1, -9, -1, 0]], np.float32)
    net = Net()
    net.output(net.op("Gemm", net.relu(net.op("Gemm", net.input(["N", 4]), net.constant(np.eye(4, dtype="f4")))),
                      net.constant(np.ones((4, 2), np.float32))))  # fmt: skip
    model = net.model()
    signs = find_signs(model, find_layers(model)[0].name, Feeds(rows), threads=1)
    np.testing.assert_array_equal(signs.share_on("sign-of-sum"), [1, 0, 1, 1])
    np.testing.assert_array_equal(signs.share_on("majority"), [0, 1, 1, 0])
    np.testing.assert_array_equal(signs.share_on("mean-sign"), [0.25, 0.75, 0.5, 1])
    with pytest.raises(UsageError, match="no estimate"):
        signs.share_on("median")


def fixed(count: int, on: np.ndarray) -> Signs:
    """Signs that never change."""
    return Signs(count, np.where(on, 1.0, -1.0), np.where(on, count, 0), np.where(on, 0, count))


@pytest.mark.parametrize("estimate", ["sign-of-sum", "majority", "mean-sign"])
@pytest.mark.parametrize("transposed", [(True, True), (True, False), (False, True), (False, False)])
def test_the_merged_weight(estimate, transposed):
    """Against numpy, whatever the orientation; nothing is left of the layer."""
    net = Net(3)
    x = net.relu(net.gemm(net.input(["N", 6]), 8, transposed=transposed[0]))
    net.output(net.gemm(x, 5, transposed=transposed[1]))
    model = net.model()
    first, second = find_layers(model)
    generator = np.random.default_rng(0)
    positive = generator.integers(0, 11, 8)
    signs = Signs(10, generator.standard_normal(8), positive, 10 - positive)
    w1, w2 = (get_array(layer.weight).astype(float) for layer in (first, second))
    w1, w2 = (w if flip else w.T for w, flip in zip((w1, w2), transposed, strict=True))
    b1, b2 = get_array(first.bias), get_array(second.bias)
    d = {"sign-of-sum": signs.total >= 0, "majority": positive >= 5, "mean-sign": positive / 10}[estimate]
    Collapse(first.name, signs, estimate)(model)
    (left,) = find_layers(model)
    assert left.name == second.name and len(model.graph.initializers) == 2
    feeds = feeds_for(model)
    wanted = feeds["x"] @ (w2 @ np.diag(d) @ w1).T + w2 @ (d * b1) + b2
    np.testing.assert_allclose(next(iter(execute(model, feeds).values())), wanted, rtol=1e-4, atol=1e-5)


def collapse_first(model: oir.Model, on: np.ndarray) -> oir.Model:
    model = model.clone()
    Collapse(find_layers(model)[0].name, fixed(4, on), "mean-sign")(model)
    return model


def linear_regime(model: oir.Model, seed: int = 0) -> np.ndarray:
    """Give the first layer biases so large that no pre-activation changes its sign; which neurons are on."""
    first = find_layers(model)[0]
    on = np.random.default_rng(seed).integers(0, 2, first.out_channels) == 1
    set_array(first.bias, np.where(on, 30.0, -30.0).reshape(get_array(first.bias).shape))
    return on


def two_layers(first: Callable[[Net, str], str], second: Callable[[Net, str], str], shape: Sequence, act: str) -> Net:
    net = Net(5)
    x = first(net, net.input(shape))
    if act == "PRelu":
        x = net.op("PRelu", x, net.uniform(*((8, 1, 1) if len(shape) == 4 else (8,))))
    elif act:
        x = net.op(act, x, **({"alpha": 0.3} if act == "LeakyRelu" else {}))
    net.output(second(net, x))
    return net


@pytest.mark.parametrize("act", ["Relu", "LeakyRelu", "PRelu", ""])
@pytest.mark.parametrize("kind", ["gemm", "matmul", "gemm, matmul", "1x1, 3x3", "3x3, 1x1", "1x1, 1x1"])
def test_exact_where_no_sign_changes(act, kind):
    convolutions = {
        "1x1, 3x3": ({"kernel": 1}, {"kernel": 3, "pads": [0] * 4, "strides": [2, 1], "dilations": [1, 2]}),
        "3x3, 1x1": ({"kernel": 3, "strides": [2, 2], "dilations": [2, 1]}, {"kernel": 1}),
        "1x1, 1x1": ({"kernel": 1}, {"kernel": 1, "strides": [2, 2]}),
    }
    if kind in convolutions:
        a, b = convolutions[kind]
        net = two_layers(lambda n, x: n.conv(x, 8, **a), lambda n, x: n.conv(x, 5, **b), IMAGE, act)
    else:
        first, second = (Net.matmul if name == "matmul" else Net.gemm for name in (kind.split(", ") * 2)[:2])
        shape = ["N", 6] if "gemm" in kind else ["N", 4, 6]
        net = two_layers(lambda n, x: first(n, x, 8), lambda n, x: second(n, x, 5), shape, act)
    model = net.model()
    on = linear_regime(model)
    assert 0 < on.sum() < len(on)
    collapsed = collapse_first(model, on)
    assert len(find_layers(collapsed)) == 1
    assert_same_outputs(model, collapsed, feeds_for(model))
    signs = find_signs(model, find_layers(model)[0].name, sized("x", model), threads=1)
    np.testing.assert_array_equal(signs.share_on("majority"), on)


def test_padding_behind_a_1x1_errs_at_the_border_alone():
    net = two_layers(lambda n, x: n.conv(x, 8, kernel=1), lambda n, x: n.conv(x, 5), IMAGE, "Relu")
    model = net.model()
    on = linear_regime(model)
    feeds = feeds_for(model)
    wanted, got = (next(iter(execute(m, feeds).values())) for m in (model, collapse_first(model, on)))
    inside = (..., slice(1, -1), slice(1, -1))
    np.testing.assert_allclose(got[inside], wanted[inside], rtol=1e-4, atol=1e-3)
    first, second = find_layers(model)
    taps = get_array(second.weight)[:, :, 0, 0] + get_array(second.weight)[:, :, 0, 1:].sum(-1)
    outside = taps @ np.where(on, get_array(first.bias), 0)  # of the row above the upper border
    np.testing.assert_allclose((got - wanted)[:, :, 0, 5], np.tile(outside, (2, 1)), rtol=1e-3, atol=1e-3)
    assert abs(outside).max() > 1


@pytest.mark.parametrize("op_type", ["Gemm", "MatMul", "Conv"])
@pytest.mark.parametrize("first_biased", [True, False])
def test_missing_biases(op_type, first_biased):
    net = Net(2)
    shape, kernel = (["N", 6, 3, 3], (1, 1)) if op_type == "Conv" else (["N", 6], ())
    sizes = ((8, 6), (5, 8)) if op_type == "Conv" else ((6, 8), (8, 5))
    x = net.op(op_type, net.input(shape), net.normal(*sizes[0], *kernel), channels=8)
    if first_biased and op_type == "MatMul":
        x = net.op("Add", x, net.normal(8))
    elif first_biased:
        net.nodes[-1].input.append(net.normal(8))
    net.output(net.op(op_type, x, net.normal(*sizes[1], *kernel), channels=5))
    model = net.model()
    collapsed = collapse_first(model, np.ones(8, bool))  # no activation: exact
    (left,) = find_layers(collapsed)
    assert (left.bias is not None) == first_biased
    assert [v.name for v in collapsed.graph.outputs] == [v.name for v in model.graph.outputs]
    assert_same_outputs(model, collapsed, feeds_for(model))


def test_layers_that_cannot_be_collapsed_are_named():
    def model(first: Callable[[Net, str], str], second: Callable[[Net, str], str], shape: Sequence = IMAGE) -> Net:
        net = Net()
        net.output(second(net, first(net, net.input(shape))))
        return net

    def wide(net: Net, x: str) -> str:
        return net.conv(x, 4)

    def relu(net: Net, x: str) -> str:
        return net.relu(net.conv(x, 4, kernel=1))

    for net, message in [
        (model(lambda n, x: n.relu(wide(n, x)), wide), "neither is 1x1"),
        (model(lambda n, x: n.op("Sigmoid", relu(n, x)), wide), "Sigmoid"),
        (model(lambda n, x: n.op("Tanh", n.conv(x, 4, kernel=1)), wide), "Tanh"),
        (model(lambda n, x: n.norm(wide(n, x)), relu), "not been folded"),
        (model(relu, lambda n, x: n.op("MaxPool", x, kernel_shape=[2, 2])), "MaxPool"),
        (model(relu, lambda n, x: n.conv(x, 4, group=4)), "plain convolution"),
        (model(relu, lambda n, x: n.op("Add", n.conv(x, 4), x)), "not read by one layer alone"),
        (model(lambda n, x: n.op("PRelu", n.conv(x, 4), n.uniform(10)), relu), "one constant slope"),
        (model(lambda n, x: n.relu(n.conv(x, 4, kernel=1, strides=[2, 2])), wide), "neither is 1x1"),
        (model(wide, lambda n, x: n.conv(x, 4, kernel=1, pads=[1] * 4)), "neither is 1x1"),
    ]:
        built = net.model()
        first = find_layers(built)[0]
        with pytest.raises(ModelError, match=message):
            Collapse(first.name, fixed(4, np.ones(4, bool)))(built)
    with pytest.raises(UsageError, match="no layer"):
        Collapse("absent", fixed(4, np.ones(4, bool)))(built)
    with pytest.raises(UsageError, match="signs are of 3"):
        Collapse(first.name, fixed(4, np.ones(3, bool)))(built)
    with pytest.raises(UsageError, match="without samples"):
        find_signs(built, first.name, Feeds(np.zeros((0, 3, 10, 10), np.float32)))


# --- collapsing: the method -------------------------------------------------------------------------------------------

EVERY_MAP = [(m, c) for m in range(2, DEEPEST + 1) for n in range(1, m) for c in combinations(range(m), n)]


@pytest.mark.parametrize("family", ["dense", "tokens"])
@pytest.mark.parametrize(("depth", "chosen"), EVERY_MAP, ids=str)
def test_every_layer_but_the_chosen_is_collapsed(family, depth, chosen):
    deep, shallow = (ready(FAMILIES[family](d, w, 0, False)) for d, w in ((depth, 8), (len(chosen), 6)))
    pairs = matched(deep, shallow, chosen)
    result = balance(deep, shallow, pairs, "collapse", samples=sized("x", deep), threads=1)
    assert_balanced(result)
    assert [a.cut for a, _ in result.pairs] == [a.cut for a, _ in pairs]
    assert_same_outputs(shallow, result.shallow, feeds_for(shallow))


def test_signs_are_taken_from_the_network_as_it_is_then():
    deep, shallow = ready(dense(4, 8, 3, False)), ready(dense(2, 8, 1, False))
    samples = sized("x", deep)
    result = balance(deep, shallow, matched(deep, shallow, (0, 3)), "collapse", samples=samples, threads=1)
    by_hand = deep.clone()
    layers = [layer.name for layer in find_layers(deep)]
    stale = {name: find_signs(deep, name, samples, threads=1) for name in layers[1:3]}
    differs = False
    for name in layers[1:3]:
        signs = find_signs(by_hand, name, samples, threads=1)
        differs |= not np.allclose(signs.total, stale[name].total)
        Collapse(name, signs)(by_hand)
    assert differs
    for a, b in zip(find_layers(by_hand), find_layers(result.deep), strict=True):
        np.testing.assert_array_equal(get_array(a.weight), get_array(b.weight))


def test_blocks_are_not_collapsed():
    deep, shallow = ready(blocks(3, 4, 0, False)), ready(blocks(2, 4, 1, False))
    with pytest.raises(ModelError, match="block of several layers"):
        balance(deep, shallow, matched(deep, shallow, (0, 1)), "collapse", samples=sized("x", deep))


# --- real networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [(0, 3), (0, 1), (0, 2)])
def test_real_dense_networks(chosen, shared):
    deep, shallow = (ready(load(shared(f"mnist-net_256x{depth}"))) for depth in (4, 2))
    add(deep, shallow, chosen)
    samples = sized(deep.graph.inputs[0].name, deep)
    result = balance(deep, shallow, matched(deep, shallow, chosen), "collapse", samples=samples, threads=1)
    assert_balanced(result)


@pytest.mark.parametrize("last", [False, True], ids=["first of each stage", "later ones"])
def test_real_residual_networks(last, shared):
    """The strided block of a stage has its like; from the second on, every block may be the partner."""
    deep, shallow = ready(load(shared("resnet20_cifar10"))), ready(load(shared("resnet8_cifar10")))
    add(deep, shallow, (0, 1, 4, 7))
    if last:
        result = add(deep, ready(load(shared("resnet14_cifar10"))), (0, 1, 3, 4, 6, 7, 9))
        assert len(result.pairs) == 10
