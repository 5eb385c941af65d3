"""The permutation law for products, attention, norms over channels, and channels that move as blocks."""

import numpy as np
import pytest
from graphs import Net
from hypothesis import strategies as st
from structures import TOKENS, Structures, assert_law_catches, end, hold_over, passes_label, without

from onnxmerge.ir.rules import RULES
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.passes.permute import Permute

graph = Structures()
HEADS, WIDTH = 3, 4
INNER = HEADS * WIDTH


def heads(net: Net, x: str, perm=(0, 2, 1, 3), count: int = HEADS) -> str:
    """[N, T, count * width] -> [N, count, T, width], or with its axes in another order."""
    width = net.channels[x] // count
    return net.op("Transpose", net.reshape(x, 0, 0, count, width, channels=count * width), perm=list(perm))


def joined(net: Net, x: str) -> str:
    """[N, heads, T, width] -> [N, T, heads * width]."""
    return net.reshape(net.op("Transpose", x, perm=[0, 2, 1, 3]), 0, 0, INNER, channels=INNER)


def self_attention(net: Net, x: str, bias: str | None = None) -> str:
    queries, keys, values = (net.matmul(x, INNER) for _ in range(3))
    scores = net.op("MatMul", heads(net, queries), heads(net, keys, (0, 2, 3, 1)))
    if bias is not None:
        scores = net.op("Add", scores, bias)
    return joined(net, net.op("MatMul", net.op("Softmax", scores, axis=-1), heads(net, values)))


INSIDE_HEADS = [WIDTH] * (2 * HEADS)  # queries with keys, and values, for each head


# --- products ---------------------------------------------------------------------------------------------------------


@graph(8, 9)
def weight_on_the_left():
    net = Net()
    x = net.op("Transpose", net.matmul(net.input(TOKENS), 8), perm=[0, 2, 1])
    x = net.relu(net.op("MatMul", net.normal(9, 8), x, channels=9))
    net.output(net.op("MatMul", net.normal(4, 9), x))
    return net


@graph(8, frozen=("MatMul", "MatMul"))
def weight_that_mixes_tokens():
    """The channels pass; what the weight makes of the tokens keeps its order."""
    net = Net()
    x = net.op("Transpose", net.matmul(net.input(TOKENS), 8), perm=[0, 2, 1])
    x = net.op("MatMul", net.relu(net.op("MatMul", x, net.normal(7, 11))), net.normal(11, 7))
    return end(net, net.op("Transpose", x, perm=[0, 2, 1], channels=8))


@graph(8, 9)
def gemm_with_transposed_data():
    net = Net()
    x = net.op("Transpose", net.matmul(net.input([5, 6]), 8), perm=[1, 0])
    x = net.relu(net.op("Gemm", x, net.normal(8, 9), net.normal(9), transA=1, channels=9))
    net.output(net.gemm(x, 4))
    return net


@graph(8, 9)
def gemm_with_the_weight_first():
    net = Net()
    x = net.gemm(net.input([5, 6]), 8)
    x = net.relu(net.op("Gemm", net.normal(9, 8), x, net.normal(9, 1), transB=1))
    net.output(net.op("MatMul", net.normal(4, 9), x))
    return net


@graph(8)
def product_with_a_vector():
    net = Net()
    net.output(net.op("MatMul", net.relu(net.matmul(net.input(TOKENS), 8)), net.normal(8)))
    return net


@graph(8, frozen=("MatMul",))
def gram_matrix():
    """Channels times channels, summed over tokens. Two channel axes: the second keeps its order."""
    net = Net()
    x = net.relu(net.matmul(net.input(TOKENS), 8))
    y = net.relu(net.matmul(x, 8))
    product = net.op("MatMul", net.op("Transpose", x, perm=[0, 2, 1]), y)
    net.output(net.op("ReduceSum", product, net.ints(1, 2), keepdims=0))
    return net


@graph(8, 8, 9, 9)
def one_matrix_for_each_group():
    """A batch of matrices, as in mixtures of experts."""
    net = Net()
    x = net.op("Einsum", net.input(TOKENS), net.normal(2, 6, 8), equation="ntc,gck->ngtk", channels=8)
    x = net.op("Einsum", net.relu(x), net.normal(2, 8, 9), equation="ngtk,gkm->ngtm", channels=9)
    net.output(net.op("Einsum", net.relu(x), net.normal(2, 9, 4), equation="ngtm,gmo->nto"))
    return net


@graph(*INSIDE_HEADS, 6, 6, blocks=(HEADS,))
def attention_by_einsum():
    net = Net()
    x = net.matmul(net.input(TOKENS), 6)
    q, k, v = (
        net.op("Einsum", x, net.normal(6, HEADS, WIDTH), equation="btd,dhk->bthk", channels=WIDTH) for _ in range(3)
    )
    scores = net.op("Softmax", net.op("Einsum", q, k, equation="bqhk,bshk->bhqs"), axis=-1)
    mixed = net.op("Einsum", scores, v, equation="bhqs,bshk->bqhk", channels=WIDTH)
    return end(net, net.op("Einsum", mixed, net.normal(HEADS, WIDTH, 6), equation="bqhk,hkd->bqd", channels=6))


@graph(6)
def einsum_that_sums_and_transposes():
    net = Net()
    x = net.relu(net.conv(net.input(("N", 3, 5, 5)), 6))
    net.output(net.matmul(net.op("Einsum", x, equation="nchw -> nc", channels=6), 4))
    return net


# --- attention --------------------------------------------------------------------------------------------------------


@graph(*INSIDE_HEADS, 6, blocks=(HEADS,))
def attention():
    net = Net()
    x = net.matmul(net.input(TOKENS), 6)
    return end(net, net.op("Add", x, net.matmul(self_attention(net, x), 6)))


@graph(*INSIDE_HEADS, blocks=(HEADS,))
def attention_with_a_bias_for_each_head():
    net = Net()
    return end(net, self_attention(net, net.input(TOKENS), net.normal(1, HEADS, 7, 7)))


@graph(*INSIDE_HEADS, frozen=("Add",))
def attention_with_a_computed_bias_for_each_head():
    """The heads keep their order; inside a head any order is as good."""
    net = Net()
    net.input(TOKENS)
    return end(net, self_attention(net, "x", net.input(("N", HEADS, 7, 7), "bias")))


@graph(*INSIDE_HEADS, blocks=(HEADS,))
def attention_with_fused_projection():
    net = Net()
    fused = net.reshape(net.matmul(net.input(TOKENS), 3 * INNER), 0, 0, 3, HEADS, WIDTH, channels=3 * INNER)
    parts = net.op("Transpose", fused, perm=[2, 0, 3, 1, 4])
    q, k, v = (net.op("Gather", parts, net.constant(np.int64(i)), axis=0, channels=INNER) for i in range(3))
    scores = net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    return end(net, joined(net, net.op("MatMul", scores, v)))


@graph(*INSIDE_HEADS, blocks=(HEADS,))
def attention_with_heads_in_the_batch():
    """[N * heads, T, width], as torch's own module has it."""
    net = Net()
    x = net.input((2, 7, 6))
    q, k, v = (net.reshape(heads(net, net.matmul(x, INNER)), 2 * HEADS, 7, WIDTH) for _ in range(3))
    scores = net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1])), axis=-1)
    return end(net, joined(net, net.reshape(net.op("MatMul", scores, v), 2, HEADS, 7, WIDTH)))


@graph(WIDTH, WIDTH, frozen=("MatMul",))
def attention_with_one_head_of_keys():
    """Multi-query attention: all heads read one set of keys and values, in one order."""
    net = Net()
    x = net.input(TOKENS)
    keys = net.op("Unsqueeze", net.op("Transpose", net.matmul(x, WIDTH), perm=[0, 2, 1]), net.ints(1))
    values = net.op("Unsqueeze", net.matmul(x, WIDTH), net.ints(1))
    scores = net.op("Softmax", net.op("MatMul", heads(net, net.matmul(x, INNER)), keys), axis=-1)
    return end(net, joined(net, net.op("MatMul", scores, values)))


@graph(*INSIDE_HEADS, 6, blocks=(HEADS,))
def queries_from_an_expanded_array_that_is_read_twice():
    """No reader alone can tell how the array is to be permuted."""
    net = Net()
    x = net.matmul(net.input(TOKENS), 6)
    queries = net.op("Expand", net.normal(1, 7, 6), net.op("Shape", x), channels=6)
    added = net.op("Add", x, queries)
    q, k, v = net.matmul(queries, INNER), net.matmul(added, INNER), net.matmul(x, INNER)
    scores = net.op("Softmax", net.op("MatMul", heads(net, q), heads(net, k, (0, 2, 3, 1))), axis=-1)
    return end(net, joined(net, net.op("MatMul", scores, heads(net, v))))


@graph(*INSIDE_HEADS, blocks=(HEADS,))
def normed_queries_and_keys():
    net = Net()
    x = net.input(TOKENS)

    def normed(value: str) -> str:
        square = net.op("ReduceMean", net.op("Mul", value, value), net.ints(-1))
        return net.op("Div", value, net.op("Sqrt", net.op("Add", square, net.constant(np.float32(1e-3)))))

    q, k, v = (heads(net, net.matmul(x, INNER)) for _ in range(3))
    keys = net.op("Transpose", normed(k), perm=[0, 1, 3, 2])
    scores = net.op("Softmax", net.op("MatMul", normed(q), keys), axis=-1)
    return end(net, joined(net, net.op("MatMul", scores, v)))


def attention_operator(flat: bool, kv_heads: int = HEADS, mask: bool = False) -> Net:
    net = Net(opset=23)
    x = net.input(TOKENS)
    q, k, v = (net.matmul(x, count * WIDTH) for count in (HEADS, kv_heads, kv_heads))
    extra = [net.normal(1, HEADS, 7, 7)] if mask else []
    if flat:
        mixed = net.op("Attention", q, k, v, *extra, channels=INNER, q_num_heads=HEADS, kv_num_heads=kv_heads)
    else:
        split = [heads(net, value, count=count) for value, count in ((q, HEADS), (k, kv_heads), (v, kv_heads))]
        mixed = joined(net, net.op("Attention", *split, *extra, channels=INNER))
    return end(net, mixed)


@graph(*INSIDE_HEADS, blocks=(HEADS,))
def attention_as_one_operator():
    return attention_operator(flat=False)


@graph(*INSIDE_HEADS, blocks=(HEADS,))
def attention_as_one_operator_on_rank_3():
    return attention_operator(flat=True)


@graph(WIDTH, WIDTH, frozen=("Attention",))
def attention_as_one_operator_with_one_head_of_keys():
    return attention_operator(flat=True, kv_heads=1)


@graph(*INSIDE_HEADS, frozen=("Attention",))
def attention_as_one_operator_with_a_bias_for_each_head():
    return attention_operator(flat=False, mask=True)


# --- norms over channels ----------------------------------------------------------------------------------------------


@graph(6, 9)
def layer_norm():
    net = Net()
    x = net.op("LayerNormalization", net.matmul(net.input(TOKENS), 6), net.uniform(6), net.normal(6), axis=-1)
    return end(net, net.relu(net.matmul(x, 9)))


@graph(6, 9)
def rms_norm():
    net = Net(opset=23)
    x = net.op("RMSNormalization", net.matmul(net.input(TOKENS), 6), net.uniform(6), axis=-1)
    return end(net, net.relu(net.matmul(x, 9)))


@graph(4, 4, 4, blocks=(3,))
def softmax_inside_groups():
    """Weights of a mixture: one softmax for each group of four."""
    net = Net()
    x = net.reshape(net.matmul(net.input(TOKENS), 12), 0, 0, 3, 4, channels=12)
    return end(net, net.reshape(net.op("Softmax", x, axis=-1), 0, 0, 12, channels=12))


@graph(4, 4, 4, blocks=(3,))
def sum_over_each_group():
    net = Net()
    x = net.reshape(net.op("Tanh", net.matmul(net.input(TOKENS), 12)), 0, 0, 3, 4, channels=12)
    return end(net, net.op("ReduceSum", x, net.ints(3), keepdims=0, channels=3))


@graph(2, 2, 2, 2, blocks=(4,))
def group_norm_by_reshape():
    """Instance norm of groups, then a scale for each channel, as exporters write group norm."""
    net = Net()
    x = net.reshape(net.conv(net.input(("N", 3, 5, 5)), 8), 0, 4, 50)
    ones, zeros = net.constant(np.ones(4, np.float32)), net.constant(np.zeros(4, np.float32))
    x = net.op("InstanceNormalization", x, ones, zeros)
    x = net.op("Mul", net.reshape(x, 0, 8, 5, 5, channels=8), net.uniform(8, 1, 1))
    net.head(net.relu(x))
    return net


@graph(4, 4, 4, blocks=(3,))
def scale_for_each_group():
    net = Net()
    x = net.reshape(net.matmul(net.input(TOKENS), 12), 0, 0, 3, 4, channels=12)
    x = net.op("Tanh", net.op("Mul", x, net.uniform(3, 1)))
    return end(net, net.reshape(x, 0, 0, 12, channels=12))


@graph(4, 4, 4, frozen=("Mul",))
def scale_for_each_group_at_run_time():
    net = Net()
    x = net.reshape(net.matmul(net.input(TOKENS), 12), 0, 0, 3, 4, channels=12)
    x = net.op("Tanh", net.op("Mul", x, net.input(["N", 7, 3, 1], "scale")))
    return end(net, net.reshape(x, 0, 0, 12, channels=12))


@graph(36, 5)
def dense_layer_that_makes_a_feature_map():
    """Every map of a generator's first layer is a block of columns."""
    net = Net()
    x = net.reshape(net.gemm(net.input(["N", 9]), 36 * 4), 0, 36, 2, 2, channels=36)
    x = net.op("Resize", x, "", net.constant(np.float32([1, 1, 2, 2])), mode="nearest", channels=36)
    net.head(net.relu(net.conv(net.relu(net.norm(x)), 5)))
    return net


@pytest.mark.parametrize("name", graph.names())
def test_law_holds_for_each_structure(name):
    graph.check(name)


def test_a_permutation_of_heads_moves_every_head_and_nothing_else():
    model = attention_with_a_bias_for_each_head().model()
    spaces = {space.name: space for space in find_spaces(model).permutable()}
    (heads_space,) = (space for space in spaces.values() if space.blocks)
    query = next(node.inputs[1] for node in model.graph if node.op_type == "MatMul" and node.inputs[1].const_value)
    bias = next(v for v in model.graph.initializers.values() if tuple(v.shape) == (1, HEADS, 7, 7))
    before = query.const_value.numpy().copy(), bias.const_value.numpy().copy()
    Permute({heads_space.name: np.array([2, 0, 1])}, spaces)(model)
    after = query.const_value.numpy(), bias.const_value.numpy()
    blocks = before[0].reshape(6, HEADS, WIDTH)
    assert (after[0].reshape(6, HEADS, WIDTH) == blocks[:, [2, 0, 1]]).all()
    assert (after[1] == before[1][:, [2, 0, 1]]).all()


# --- random transformers ----------------------------------------------------------------------------------------------


@st.composite
def random_transformers(draw) -> Net:
    """Blocks of attention, gates, norms and mixers over tokens, in any order."""
    net = Net(seed=draw(st.integers(0, 99)))
    count = draw(st.sampled_from([1, 2, 3]))
    width = count * draw(st.sampled_from([2, 3, 4]))
    x = net.matmul(net.input(("N", 5, 6)), width)
    for _ in range(draw(st.integers(1, 4))):
        step = draw(st.sampled_from(["attention", "cross", "gate", "norm", "mixer", "shared", "softmax", "slice"]))
        y = x
        if step in ("attention", "cross"):
            inner = count * draw(st.sampled_from([2, 3]))
            source = net.op("Tanh", x) if step == "cross" else x
            q, k, v = net.matmul(x, inner), net.matmul(source, inner), net.matmul(source, inner)
            scores = net.op("MatMul", heads(net, q, count=count), heads(net, k, (0, 2, 3, 1), count))
            if draw(st.booleans()):
                scores = net.op("Add", scores, net.normal(1, draw(st.sampled_from([1, count])), 5, 5))
            if draw(st.booleans()):
                scores = net.op("Mul", scores, net.uniform(count, 1, 1))
            mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), heads(net, v, count=count))
            mixed = net.op("Transpose", mixed, perm=[0, 2, 1, 3])
            y = net.matmul(net.reshape(mixed, 0, 0, inner, channels=inner), width)
        elif step == "gate":
            y = net.matmul(net.op("Mul", net.matmul(x, 5), net.op("Sigmoid", net.matmul(x, 5))), width)
        elif step == "norm":
            x = net.op("LayerNormalization", x, net.uniform(width), net.normal(width), axis=-1)
        elif step == "mixer":
            tokens = net.op("Transpose", x, perm=[0, 2, 1])
            y = net.op("Transpose", net.op("MatMul", tokens, net.normal(5, 5)), perm=[0, 2, 1], channels=width)
        elif step == "shared":
            split = net.reshape(x, 0, 0, count, width // count)
            y = net.reshape(net.op("MatMul", split, net.normal(width // count, width // count)), 0, 0, width)
        elif step == "softmax":
            split = net.reshape(x, 0, 0, count, width // count)
            y = net.reshape(net.op("Softmax", split, axis=draw(st.sampled_from([2, 3]))), 0, 0, width)
        else:
            half = net.op("Slice", x, net.ints(0), net.ints(width // 2), net.ints(2), channels=width // 2)
            rest = net.op("Slice", x, net.ints(width // 2), net.ints(width), net.ints(2), channels=width - width // 2)
            y = net.concat(net.op("Tanh", half), rest, axis=2)
        net.channels[y] = width
        x = net.op("Add", x, y) if draw(st.booleans()) and y != x else y
        net.channels[x] = width
    return end(net, x)


def test_law_holds_for_random_transformers(monkeypatch):
    seen = hold_over(random_transformers(), 150, monkeypatch)
    assert np.mean([share for share, _ in seen]) > 0.8
    assert np.mean([blocks for _, blocks in seen]) > 0.2


# --- the law can fail -------------------------------------------------------------------------------------------------


MUTANTS = {
    "MatMul does not unite queries and keys": (attention, "MatMul", without(RULES["MatMul"], "unite")),
    "MatMul does not keep heads together": (attention, "MatMul", without(RULES["MatMul"], "bind")),
    "MatMul forgets a weight on its left": (weight_on_the_left, "MatMul", without(RULES["MatMul"], "use")),
    "Einsum does not keep groups together": (one_matrix_for_each_group, "Einsum", without(RULES["Einsum"], "tag")),
    "Einsum forgets its weight": (attention_by_einsum, "Einsum", without(RULES["Einsum"], "use")),
    "Gemm forgets its weight": (gemm_with_transposed_data, "Gemm", without(RULES["Gemm"], "use")),
    "Attention does not unite": (attention_as_one_operator, "Attention", without(RULES["Attention"], "unite")),
    "Attention does not keep heads together": (
        attention_as_one_operator,
        "Attention",
        without(RULES["Attention"], "bind"),
    ),
    "LayerNormalization forgets its scale": (layer_norm, "LayerNormalization", passes_label),
    "RMSNormalization forgets its scale": (rms_norm, "RMSNormalization", passes_label),
    "Softmax mixes groups": (softmax_inside_groups, "Softmax", passes_label),
    "ReduceSum mixes groups": (sum_over_each_group, "ReduceSum", without(RULES["ReduceSum"], "bind")),
    "Add forgets a bias for each head": (
        attention_with_a_bias_for_each_head,
        "Add",
        without(RULES["Add"], "use_partly"),
    ),
    "Add ignores a computed bias for each head": (
        attention_with_a_computed_bias_for_each_head,
        "Add",
        without(RULES["Add"], "keep_order"),
    ),
    "Mul ignores a scale for each group": (scale_for_each_group, "Mul", without(RULES["Mul"], "use_partly")),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_law_fails_for_a_wrong_rule(name, monkeypatch):
    assert_law_catches(*MUTANTS[name], monkeypatch)
