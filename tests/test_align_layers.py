import itertools
import json

import numpy as np
import pytest
from graphs import Net, chain, dense, residual
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from scipy.optimize import linear_sum_assignment
from typer.testing import CliRunner

from onnxmerge.cli.app import app
from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.load import load
from onnxmerge.ir.save import save
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.ir.stages import Step, find_steps
from onnxmerge.methods.align import align_models
from onnxmerge.passes.align_layers import group_steps, layer_map, map_by_groups, wasserstein_cost, width_cost
from onnxmerge.passes.permute import Permute
from onnxmerge.report.page import render_page
from onnxmerge.runtime import layer_grams as grams
from onnxmerge.runtime.activations import Stored, stream
from onnxmerge.runtime.statistics import PairStatistics

# --- the map ----------------------------------------------------------------------------------------------------------


def brute_force(cost, ends):
    """All best maps."""
    rows, columns = cost.shape
    maps = list(itertools.combinations(range(rows), columns))
    if ends:
        maps = [m for m in maps if m[0] == 0 and (columns == 1 or m[-1] == rows - 1)]
    totals = [cost[list(m), range(columns)].sum() for m in maps]
    return min(totals), [m for m, total in zip(maps, totals, strict=True) if total == min(totals)]


@pytest.mark.parametrize("ends", [True, False])
def test_the_map_equals_brute_force_on_1000_random_matrices(ends):
    generator = np.random.default_rng(0)
    for trial in range(1000):
        rows = int(generator.integers(1, 9))
        columns = int(generator.integers(1, rows + 1))
        ties = trial % 2 == 1  # small integers: many maps cost the same
        cost = generator.integers(0, 3, (rows, columns)) * 1.0 if ties else generator.standard_normal((rows, columns))
        least, best = brute_force(cost, ends)
        found = layer_map(cost, ends=ends)
        assert cost[found, range(columns)].sum() == pytest.approx(least, abs=1e-12)
        if ties:
            assert found == np.min(best, axis=0).tolist()  # the smallest rows, everywhere at once


@given(st.integers(1, 30), st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=60)
def test_the_map_is_strictly_increasing_and_does_not_change_with_a_constant(columns, seed, ends):
    generator = np.random.default_rng(seed)
    rows = columns + int(generator.integers(0, 20))
    cost = generator.uniform(size=(rows, columns))
    found = layer_map(cost, ends=ends)
    assert len(found) == columns
    assert all(a < b for a, b in itertools.pairwise(found))
    assert found[0] >= 0 and found[-1] < rows
    assert found == layer_map(cost + 3.0, ends=ends)


def test_the_papers_examples():
    assert layer_map(width_cost([5, 4, 3, 1], [3, 2, 1])) == [0, 2, 3]  # figure 2
    five, three = [400, 200, 100, 50, 25], [400, 200, 100]  # appendix C.1, table 8
    assert layer_map(width_cost(five, three)) == [0, 1, 4]
    assert layer_map(width_cost(five, three), ends=False) == [0, 1, 2]


def test_a_single_layer_goes_to_the_first_or_to_the_cheapest():
    cost = np.array([[3.0], [1.0], [2.0]])
    assert layer_map(cost) == [0]
    assert layer_map(cost, ends=False) == [1]


@pytest.mark.parametrize(
    ("cost", "message"), [(np.zeros((2, 3)), "as many layers"), (np.full((2, 2), np.nan), "finite")]
)
def test_costs_that_make_no_sense(cost, message):
    with pytest.raises(ValueError, match=message):
        layer_map(cost)


def test_groups_are_mapped_from_their_shorter_side():
    cost = np.ones((5, 5))
    cost[1, 0] = cost[2, 2] = cost[4, 4] = 0.0  # (2, 2) joins different groups
    first, second = ["conv", "conv", "conv", "dense", "dense"], ["conv", "dense", "dense", "dense", "dense"]
    assert map_by_groups(cost, first, second, ends=False) == [(1, 0), (3, 1), (4, 4)]
    assert map_by_groups(cost, first, second) == [(0, 0), (3, 1), (4, 4)]
    assert map_by_groups(cost.T, second, first, ends=False) == [(0, 1), (1, 3), (4, 4)]


# --- stages and groups ------------------------------------------------------------------------------------------------


def steps(*stages):
    """`steps("cc", "bb", "d")`: a stage of two convolutions, one of two conv blocks, one of a dense layer."""
    kinds = {"c": ("conv", False), "b": ("conv", True), "d": ("dense", False), "t": ("dense", True)}
    return [
        Step(f"{number}{sign}", *kinds[sign], "cut", (), number, 8, 1)
        for number, stage in enumerate(stages)
        for sign in stage
    ]


@pytest.mark.parametrize(
    ("first", "second", "groups"),
    [
        (("c", "bbb", "bb"), ("c", "b", "bb"), ["conv 0", "conv 1", "conv 1", "conv 1", "conv 2", "conv 2"]),
        (("c", "bb"), ("c", "b", "b"), ["conv", "conv", "conv"]),  # another number of stages
        (("c", "bb"), ("c", "cc"), ["conv", "conv", "conv"]),  # blocks and layers
        (("cc", "c", "dd"), ("c", "c", "d"), ["conv 0", "conv 0", "conv 1", "dense", "dense"]),
        (("cc", "d", "c"), ("c",), ["conv", "conv", "dense", "conv"]),  # what the other lacks tears nothing
    ],
)
def test_groups(first, second, groups):
    assert group_steps(steps(*first), steps(*second))[0] == groups


@pytest.mark.parametrize(("first", "second"), [(("c", "d"), ("d", "c")), (("c", "d", "c"), ("c", "dd"))])
def test_kinds_in_another_order_are_refused(first, second):
    with pytest.raises(ModelError, match="keeps their order"):
        group_steps(steps(*first), steps(*second))


def found(net):
    return [(step.kind, step.block, step.stage, step.width) for step in find_steps(net.model())]


def test_blocks_of_one_space_are_a_stage():
    net = Net()
    x = net.relu(net.conv(net.input(["N", 3, 10, 10]), 8))
    for width, strides in [(8, 1), (8, 1), (16, 2), (16, 1)]:
        branch = net.conv(net.relu(net.conv(x, width, strides=[strides] * 2)), width)
        skip = x if strides == 1 else net.conv(x, width, kernel=1, strides=[2, 2])
        x = net.relu(net.op("Add", branch, skip))
    net.head(x)
    assert found(net) == [
        ("conv", False, 0, 8),
        ("conv", True, 1, 8),
        ("conv", True, 1, 8),
        ("conv", True, 2, 16),
        ("conv", True, 2, 16),
    ]


def test_resolution_divides_a_plain_chain_and_unpadded_kernels_do_not():
    net = Net()
    x = net.input(["N", 1, 28, 28])
    for pads in (0, 0, 1):
        x = net.relu(net.conv(x, 6, pads=[pads] * 4))
    x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.relu(net.conv(x, 8))
    x = net.relu(net.conv(x, 8, strides=[2, 2]))
    x = net.relu(net.gemm(net.flatten(x, 8 * 36), 20))
    net.output(net.gemm(x, 10))
    assert [(kind, stage) for kind, _, stage, _ in found(net)] == [
        *[("conv", 0)] * 3,
        ("conv", 1),
        ("conv", 2),
        ("dense", 3),
    ]


def test_dense_layers_are_one_stage():
    assert found(dense()) == [("dense", False, 0, 12), ("dense", False, 0, 10)]


# --- Gram matrices and costs ------------------------------------------------------------------------------------------


def noise(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("entries", [1000, 10**9])
def test_streamed_grams_equal_those_of_all_samples_at_once(entries, monkeypatch):
    model = residual().model()
    cuts = [step.cut for step in find_steps(model)]
    samples = Stored({"x": noise((37, 3, 10, 10))})
    monkeypatch.setattr(grams, "ENTRIES", entries)  # 1000: 27 features at a time
    streamed = grams.layer_grams(model, samples, cuts, threads=1)
    (values,) = stream(model, samples, cuts, threads=1)
    for name in cuts:
        features = values[name].reshape(37, -1).astype(np.float64)
        features -= features.mean(0)
        np.testing.assert_allclose(streamed[name], features @ features.T, rtol=1e-6, atol=1e-6 * features.size)


def test_cka_of_grams_equals_cka_of_features():
    model = dense().model()
    first, second = (step.cut for step in find_steps(model))
    samples = Stored({"x": noise((50, 6))})
    found = grams.layer_grams(model, samples, [first, second], threads=1)
    (values,) = stream(model, samples, [first, second], threads=1)
    statistics = PairStatistics()
    statistics.update(values[first], values[second])
    assert grams.cka(found[first], found[second]) == pytest.approx(statistics.cka(), rel=1e-6)
    assert grams.cka(found[first], found[first]) == pytest.approx(1.0)


def test_a_value_whose_first_axis_is_not_the_samples_is_refused():
    net = Net()  # recurrent and older attention networks keep the tokens first
    hidden = net.matmul(net.op("Transpose", net.input(["N", 3, 4]), perm=[1, 0, 2], channels=4), 6)
    net.output(net.op("Transpose", net.matmul(net.relu(hidden), 5), perm=[1, 0, 2]))
    with pytest.raises(ModelError, match=r"\(3, 9, 6\) is not that of the 9 samples"):
        grams.layer_grams(net.model(), Stored({"x": noise((9, 3, 4))}), [hidden], threads=1)


def test_wasserstein_cost_does_not_depend_on_order_scale_width_or_samples():
    first, second = noise((20, 6)), noise((20, 9), seed=1)
    cost = wasserstein_cost([first], [second])[0, 0]
    order = np.random.default_rng(2).permutation(6)
    for same in (first[:, order], 7 * first + 3, np.repeat(first, 2, axis=1)):
        assert wasserstein_cost([same], [second])[0, 0] == pytest.approx(cost)
        assert wasserstein_cost([same], [first])[0, 0] == pytest.approx(0.0, abs=1e-6)
    twice = wasserstein_cost([np.concatenate([first, first])], [np.concatenate([second, second])])
    assert twice[0, 0] == pytest.approx(cost)
    assert wasserstein_cost([np.ones((20, 4))], [second, np.ones((20, 4))]).tolist() == [[1.0, 1.0]]


def test_wasserstein_cost_of_equal_widths_is_the_best_assignment():
    clouds = [noise((15, 5), seed) for seed in (0, 1)]
    points = [(c - c.mean(0)).T for c in clouds]
    points = [p / np.sqrt((p**2).sum(1).mean()) for p in points]
    squares = ((points[0][:, None] - points[1][None]) ** 2).sum(2)
    rows, columns = linear_sum_assignment(squares)
    assert wasserstein_cost(clouds[:1], clouds[1:])[0, 0] == pytest.approx(squares[rows, columns].mean(), rel=1e-5)


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """`files(a=net, b=net)` saves networks; the paths in order, and beside them `data.npz` for an input of 3x10x10."""

    def make(shape=(3, 10, 10), **nets):
        paths = []
        for name, net in nets.items():
            save(net.model() if isinstance(net, Net) else net, tmp_path / f"{name}.onnx")
            paths.append(tmp_path / f"{name}.onnx")
        np.savez(tmp_path / "data.npz", x=noise((80, *shape)))
        return [*paths, tmp_path / "data.npz"]

    return make


def test_a_permuted_copy_is_the_same_network(files):
    model = residual().model()
    permuted = residual().model()
    spaces = {space.name: space for space in find_spaces(permuted).permutable()}
    generator = np.random.default_rng(5)
    Permute({name: generator.permutation(space.size) for name, space in spaces.items()}, spaces)(permuted)
    for cost in ("cka", "width", "wasserstein"):
        aligned = align_models(*files(a=model, b=permuted), cost=cost, threads=1)
        assert [pair.place for pair in aligned.pairs] == [(0, 0), (1, 1), (2, 2)]
        assert np.diag(aligned.similarity) == pytest.approx(1.0, abs=1e-6)
        assert [pair.correlation for pair in aligned.pairs] == pytest.approx([1.0] * 3, abs=1e-4)
        assert np.diag(aligned.costs) == pytest.approx(0.0, abs=1e-5)


def test_swapping_the_networks_swaps_the_pairs(files):
    deep, shallow, data = files(deep=deep_chain(), shallow=chain())
    ours, theirs = align_models(deep, shallow, data, threads=1), align_models(shallow, deep, data, threads=1)
    assert [pair.place[::-1] for pair in ours.pairs] == [pair.place for pair in theirs.pairs]
    assert ours.similarity == pytest.approx(theirs.similarity.T)
    assert [pair.correlation is None for pair in ours.pairs] == [False, True, False]  # 12 channels against 8


def deep_chain():
    net = Net(seed=3)
    x = net.input(["N", 3, 10, 10])
    for _ in range(5):
        x = net.relu(net.conv(x, 8))
    net.head(x)
    return net


def test_two_runs_give_the_same_bytes(files):
    arguments = files(a=deep_chain(), b=chain())
    first, second = (align_models(*arguments, threads=1).result().to_json() for _ in range(2))
    assert first == second


def test_different_stages_become_one_group_and_the_report_says_so(files):
    aligned = align_models(*files(a=chain(), b=residual()), threads=1)
    assert set(aligned.groups[0]) == set(aligned.groups[1]) == {"conv"}
    assert "stages of conv layers do not correspond (1 and 3 of them)" in aligned.notes[0]


def run(*arguments):
    return CliRunner().invoke(app, ["align", *map(str, arguments), "--threads", "1"])


def test_the_command_prints_the_map_and_writes_the_report(files, tmp_path):
    a, b, data = files(a=deep_chain(), b=chain())
    page = tmp_path / "page.html"
    done = run(a, b, "--data", data, "--free-ends", "--cost", "wasserstein", "--json", "--report", page)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert (record["schema"], record["method"], record["candidates"]) == (1, "align", [])
    layer_map = record["layer_map"]
    assert (layer_map["cost"], layer_map["ends"]) == ("wasserstein", False)
    assert np.shape(layer_map["similarity"]) == np.shape(layer_map["costs"]) == (5, 3)
    places = [pair["place"] for pair in layer_map["pairs"]]
    assert [column for _, column in places] == [0, 1, 2]
    text = page.read_text()
    assert "Layer similarity and layer map" in text and "the Wasserstein distance" in text
    assert "All candidates" not in text
    for pair in layer_map["pairs"]:
        assert f"<code>{pair['first']}</code>" in text
    table = run(a, b, "--data", data).stdout
    assert all(step["name"] in table for step in layer_map["second"])
    assert "of the 5 hidden layers or blocks of a" in table


def test_a_large_map_is_drawn_without_figures(files):
    result = align_models(*files(a=deep_chain(), b=chain()), threads=1).result()
    found = result.layer_map
    found.first, found.second = found.first[:1] * 60, found.second[:1] * 50
    found.similarity = found.costs = [[0.5] * 50] * 60
    found.pairs = [found.pairs[0].model_copy(update={"place": (i, i)}) for i in range(50)]
    page = render_page(result)
    assert page.count(found.first[0].name) < 110  # the pairs' table, not the edges of the plot


# --- bad input --------------------------------------------------------------------------------------------------------


def refused(tmp_path, code, *arguments):
    """The one sentence on stderr; nothing may have been written."""
    before = sorted(tmp_path.iterdir())
    done = run(*arguments, "--report", tmp_path / "page.html")
    assert done.exit_code == code, done.output
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    return done.stderr


def test_inputs_that_differ(files, tmp_path):
    a, b, data = files(a=chain(), b=dense())
    assert f"{b}: its inputs are x Nx6 float32" in refused(tmp_path, 2, a, b, "--data", data)


def test_no_layers_of_one_kind(files, tmp_path):
    net = Net()
    x = net.flatten(net.input(["N", 3, 10, 10]), 300)
    net.output(net.gemm(net.relu(net.gemm(x, 8)), 5))
    a, b, data = files(a=chain(), b=net)
    assert f"no layer of {b} can stand for one of {a}" in refused(tmp_path, 3, a, b, "--data", data)


def test_no_hidden_layer(files, tmp_path):
    net = Net()
    net.output(net.gemm(net.flatten(net.input(["N", 3, 10, 10]), 300), 5))
    a, b, data = files(a=chain(), b=net)
    assert f"{b}: has no hidden layer" in refused(tmp_path, 3, a, b, "--data", data)


def test_samples_that_are_all_the_same(files, tmp_path):
    a, b, data = files(a=chain(), b=deep_chain())
    np.savez(data, x=np.repeat(noise((1, 3, 10, 10)), 80, axis=0))
    assert "gives the same values for all 72 samples" in refused(tmp_path, 2, a, b, "--data", data)


def test_one_constant_layer_has_cka_0_and_is_named(files):
    net = deep_chain()
    for initializer in net.initializers:
        if initializer.name == net.nodes[4].input[1]:  # the third convolution's weight
            zeros = np.zeros(tuple(initializer.dims), np.float32)
            initializer.CopyFrom(numpy_helper.from_array(zeros, initializer.name))
    a, b, data = files(a=net, b=chain())
    aligned = align_models(a, b, data, threads=1)
    assert not aligned.similarity[2].any() and not aligned.similarity[3].any()
    assert any("is constant on these samples" in note for note in aligned.notes)


def test_nan_in_the_data(files, tmp_path):
    a, b, data = files(a=chain(), b=deep_chain())
    images = noise((80, 3, 10, 10))
    images[7, 0, 0, 0] = np.nan
    np.savez(data, x=images, test_x=images[:5])
    assert "NaN" in refused(tmp_path, 2, a, b, "--data", data)


def test_nan_in_the_activations(files, tmp_path):
    net = Net()
    x = net.conv(net.input(["N", 3, 10, 10]), 8)
    net.head(net.relu(net.conv(net.op("Log", x), 8)))
    a, b, data = files(a=net, b=chain())
    assert f"{a}: the value" in (said := refused(tmp_path, 3, a, b, "--data", data)) and "NaN" in said


def test_a_single_sample(files):
    a, b, data = files(a=chain(), b=deep_chain())
    with pytest.raises(UsageError, match="at least 2 samples"):
        align_models(a, b, data, samples=1)


# --- real networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("other", "counts"), [("resnet8_cifar10", (4, 4)), ("resnet14_cifar10", (7, 7))])
def test_residual_networks_are_mapped_block_by_block(other, counts, shared, tmp_path):
    deep, shallow = shared("resnet20_cifar10"), shared(other)
    np.savez(tmp_path / "data.npz", input=noise((50, 3, 32, 32)))
    aligned = align_models(deep, shallow, tmp_path / "data.npz", samples=40, threads=1)
    assert (len(aligned.pairs), len(aligned.steps[1])) == counts
    for pair in aligned.pairs:
        assert pair.first.stage == pair.second.stage and pair.first.width == pair.second.width
    assert [step.stage for step in find_steps(load(deep))] == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_dense_networks_of_two_depths(shared, tmp_path):
    two, four = shared("mnist-net_256x2"), shared("mnist-net_256x4")
    np.savez(tmp_path / "data.npz", **{"0": np.abs(noise((80, 784, 1)))})
    aligned = align_models(two, four, tmp_path / "data.npz", threads=1)
    assert [pair.place for pair in aligned.pairs] == [(0, 0), (1, 3)]
    assert aligned.similarity.shape == (2, 4)


def test_a_network_with_itself_is_the_identity(shared, tmp_path):
    net = shared("cnn_mnist")
    np.savez(tmp_path / "data.npz", input=np.abs(noise((80, 1, 28, 28))))
    aligned = align_models(net, net, tmp_path / "data.npz", threads=1)
    assert [pair.place for pair in aligned.pairs] == [(0, 0), (1, 1), (2, 2)]
    assert [pair.cka for pair in aligned.pairs] == pytest.approx([1.0] * 3)
    assert aligned.groups[0] == ["conv 0", "conv 1", "dense"]
