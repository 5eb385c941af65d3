"""Channel maps and how they are found: bit for bit a permutation, mass kept in a plan, one answer for ties."""

from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as oir
import pytest
from fusing import (
    NETS,
    Random,
    grouped,
    partner_of,
    permuted_copy,
    spaces_of,
    split_in_halves,
    statistics_of,
    transposed,
)
from graphs import Net, chain, dense, execute, residual
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_arrays

from onnxmerge.errors import ModelError
from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.weights import get_array, set_array
from onnxmerge.passes.average import Partner, aligned_array
from onnxmerge.passes.channel_map import (
    ChannelMap,
    MappedPartner,
    carry_value,
    matching_spaces,
    target_channels,
    transported_arrays,
)
from onnxmerge.passes.match_channels import (
    Solver,
    assign,
    correlation_cost,
    distance_cost,
    match_by_activations,
    match_by_weights,
    transport,
)
from onnxmerge.runtime.patches import channel_axis
from onnxmerge.runtime.statistics import PairStatistics

ENTROPIC = partial(transport, regularisation=0.3)
SOLVERS: dict[str, Solver] = {"exact": transport, "entropic": ENTROPIC}

widths = st.integers(1, 7)
costs = st.tuples(widths, widths).flatmap(
    lambda shape: of_arrays.arrays(np.float64, shape, elements=st.floats(0, 10, width=16))
)

# --- one map ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=30)
@given(cost=costs)
def test_rows_of_a_transport_sum_to_one(solver, cost):
    """So a constant that is transported stays the same, whichever way it goes."""
    theirs, ours = cost.shape
    found = SOLVERS[solver](cost)
    assert found.forward.shape == (ours, theirs) and found.backward.shape == (theirs, ours)
    for matrix in (found.forward, found.backward):
        assert (matrix >= 0).all()
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=30)
@given(cost=costs)
def test_all_channels_carry_equal_mass(solver, cost):
    """Both matrices come from one plan: 1 / n each of ours, 1 / m each of theirs."""
    theirs, ours = cost.shape
    found = SOLVERS[solver](cost)
    plan = found.forward.T / ours
    atol = 1e-9 if solver == "exact" else 1e-3  # entropic plans converge slowly where costs are far apart
    np.testing.assert_allclose(plan.sum(1), 1 / theirs, atol=atol)
    np.testing.assert_allclose(plan, found.backward / theirs, atol=atol)


@settings(max_examples=30)
@given(cost=costs)
def test_exact_transport_costs_no_more_than_any_other(cost):
    theirs, ours = cost.shape
    total = float((transport(cost).forward.T / ours * cost).sum())
    assert total <= float((ENTROPIC(cost).forward.T / ours * cost).sum()) + 1e-5
    assert total <= cost.mean() + 1e-9
    if theirs == ours:
        generator = np.random.default_rng(0)
        for _ in range(20):
            assert total <= cost[generator.permutation(ours), np.arange(ours)].mean() + 1e-5


@settings(max_examples=30)
@given(narrow=st.integers(1, 9), times=st.integers(2, 5), wider=st.booleans(), seed=st.integers(0, 1000))
def test_a_plan_between_a_width_and_its_multiple_is_as_good_as_the_simplex_finds(narrow, times, wider, seed):
    import ot

    cost = np.random.default_rng(seed).uniform(size=(narrow * times, narrow))
    cost = cost if wider else cost.T
    theirs, ours = cost.shape
    plan = transport(cost).forward.T / ours
    np.testing.assert_allclose(plan.sum(0), 1 / ours, atol=1e-12)
    np.testing.assert_allclose(plan.sum(1), 1 / theirs, atol=1e-12)
    best = ot.emd2(np.full(theirs, 1 / theirs), np.full(ours, 1 / ours), cost)
    assert float((plan * cost).sum()) == pytest.approx(best, abs=1e-6)  # ties are broken by so little


def test_entropy_spreads_and_vanishes_with_its_weight():
    cost = np.random.default_rng(0).uniform(size=(5, 5))
    soft, softer, hard = (transport(cost, r).forward for r in (0.1, 1.0, 1e-3))
    assert softer.max() < soft.max() < 1
    np.testing.assert_allclose(hard, assign(cost).forward, atol=1e-2)


@given(st.permutations(range(6)))
def test_a_permutation_is_recognised(order):
    own = ChannelMap.from_permutation(np.array(order))
    np.testing.assert_array_equal(own.order, order)
    again = ChannelMap.from_plan(own.forward.T / 6)
    np.testing.assert_array_equal(again.order, order)
    cost = np.ones((6, 6))
    cost[order, np.arange(6)] = 0
    for solve in (assign, transport):
        np.testing.assert_array_equal(solve(cost).order, order)
    assert ENTROPIC(cost).order is None
    assert ChannelMap(np.eye(2), np.full((2, 2), 0.5)).order is None
    assert ChannelMap(np.ones((2, 1)), np.full((1, 2), 0.5)).order is None


def test_what_is_no_plan_is_refused():
    with pytest.raises(ModelError, match="leaves out a channel"):
        ChannelMap.from_plan(np.array([[1.0, 0], [1, 0]]))
    with pytest.raises(ModelError, match="3 channels cannot be assigned to 2"):
        assign(np.zeros((3, 2)))
    for solve in (assign, transport, ENTROPIC):
        with pytest.raises(ModelError, match="not finite"):
            solve(np.array([[0, np.nan], [1, 0]]))


# --- ties and dead channels -------------------------------------------------------------------------------------------


def test_ties_keep_their_order():
    cost = np.ones((6, 6))
    cost[[0, 3], [4, 1]] = 0  # two pairs are sure; all others cost the same
    for solve in (assign, transport):
        np.testing.assert_array_equal(solve(cost).order, [1, 3, 2, 4, 0, 5])
        np.testing.assert_array_equal(solve(np.zeros((4, 4))).order, np.arange(4))
    np.testing.assert_array_equal(transport(np.zeros((4, 2))).forward, [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_array_equal(ENTROPIC(np.zeros((4, 2))).forward, transport(np.zeros((4, 2))).forward)


def test_dead_channels_are_matched_in_order():
    """Channels that are constant correlate with none; what is left for them they take in order."""
    generator = np.random.default_rng(0)
    a = generator.standard_normal((500, 6))
    order = np.array([2, 0, 5, 4, 1, 3])
    b = a[:, order]
    for channel in (1, 3, 5):
        a[:, channel] = b[:, order == channel] = channel
    statistics = PairStatistics()
    statistics.update(a, b)
    assert np.isfinite(correlation_cost(statistics)).all()
    for solve in (assign, transport):
        found = solve(correlation_cost(statistics)).order
        np.testing.assert_array_equal(found, [1, 2, 0, 4, 3, 5])  # alive: 0, 2, 4; dead of theirs: 2, 4, 5


def test_distances_are_numpys():
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((300, 4)) + 1, generator.standard_normal((300, 3)) * 2
    statistics = PairStatistics()
    for part in (slice(0, 10), slice(10, None)):
        statistics.update(a[part], b[part])
    np.testing.assert_allclose(distance_cost(statistics) ** 2, ((b[:, :, None] - a[:, None]) ** 2).mean(0))
    np.testing.assert_allclose(correlation_cost(statistics), 1 - np.corrcoef(b.T, a.T)[:3, 3:], atol=1e-9)


# --- arrays -----------------------------------------------------------------------------------------------------------


def permuted_partner(model: oir.Model) -> tuple[MappedPartner, dict[str, np.ndarray]]:
    copy, alignment = permuted_copy(model)
    maps = {name: ChannelMap.from_permutation(order) for name, order in alignment.items()}
    return partner_of(model, copy, maps=maps), alignment


@pytest.mark.parametrize("name", NETS)
def test_a_permutation_is_bit_for_bit_what_alignment_does(name):
    model = NETS[name][0]()
    weight = find_layers(model)[1].weight
    array = np.array(get_array(weight))
    array.ravel()[:3] = -0.0, np.inf, 1e-42
    set_array(weight, array)
    partner, alignment = permuted_partner(model)
    spaces = spaces_of(model)
    found = transported_arrays(model, partner, spaces)
    aligned = Partner(partner.model, partner.constants, alignment)
    assert len(found) >= 2 * len(find_layers(model)) - 3
    for constant, got in found.items():
        wanted = aligned_array(constant, aligned, spaces)
        assert got.dtype == wanted.dtype and got.tobytes() == wanted.tobytes()
        assert got.tobytes() == get_array(model.graph.initializers[constant]).tobytes()


def soft_partner(model: oir.Model, other: oir.Model, seed: int = 0) -> MappedPartner:
    """With a random plan for every space."""
    partner = partner_of(model, other)
    generator = np.random.default_rng(seed)
    maps = {
        space.name: ENTROPIC(generator.uniform(size=(partner.spaces[space.name].size, space.size)))
        for space in spaces_of(model)
    }
    return replace(partner, maps=maps)


def test_arrays_that_make_and_read_channels():
    model, other = dense().model(), dense(seed=1, sizes=(6, 9, 14, 4)).model()
    partner = soft_partner(model, other)
    found = transported_arrays(model, partner, spaces_of(model))
    (a, b), layers = (partner.maps[space.name] for space in spaces_of(model)), find_layers(other)
    names = [(layer.weight.name, layer.bias.name) for layer in find_layers(model)]
    first, second, third = (get_array(layer.weight) for layer in layers)  # [out, in], [in, out], [out, in]
    np.testing.assert_allclose(found[names[0][0]], a.forward @ first)
    np.testing.assert_allclose(found[names[0][1]], a.forward @ get_array(layers[0].bias))
    np.testing.assert_allclose(found[names[1][0]], (b.forward @ second.T @ a.backward).T)
    np.testing.assert_allclose(found[names[2][0]], third @ b.backward)
    np.testing.assert_array_equal(found[names[2][1]], get_array(layers[2].bias))


def test_a_flatten_gives_each_channel_its_block():
    def net(channels: int) -> oir.Model:
        net = Net(channels)
        x = net.flatten(net.relu(net.conv(net.input(["N", 3, 4, 4]), channels)), channels * 16)
        net.output(net.gemm(x, 5))
        return net.model()

    model, other = net(4), net(6)
    partner = soft_partner(model, other)
    (own,) = partner.maps.values()
    name = find_layers(model)[1].weight.name
    got = transported_arrays(model, partner, spaces_of(model))[name].reshape(5, 4, 16)
    weight = get_array(find_layers(other)[1].weight).reshape(5, 6, 16)
    np.testing.assert_allclose(got, np.einsum("oct,ci->oit", weight, own.backward))


def test_groups_are_carried_one_by_one():
    def net(channels: int, made: int) -> oir.Model:
        net = Net(channels)
        x = net.relu(net.conv(net.input(["N", 3, 4, 4]), channels))
        net.head(net.relu(net.conv(x, made, group=2)))
        return net.model()

    model, other = net(6, 4), net(10, 8)
    partner = soft_partner(model, other)
    weight = find_layers(model)[1].weight.name
    found = transported_arrays(model, partner, spaces_of(model))[weight]
    reads = [space for space in spaces_of(model) if any(s.rows is not None for s in space.weights)]
    makes = [space for space in spaces_of(model) if any(s.name == weight and s.rows is None for s in space.weights)]
    assert len(reads) == len(makes) == 2
    for group, (read, made) in enumerate(zip(reads, makes, strict=True)):
        own = get_array(find_layers(other)[1].weight)[4 * group : 4 * group + 4]
        forward, backward = partner.maps[made.name].forward, partner.maps[read.name].backward
        wanted = np.einsum("mo,ochw,ci->mihw", forward, own, backward)
        np.testing.assert_allclose(found[2 * group : 2 * group + 2], wanted)


def test_a_running_variance_goes_by_its_deviation():
    """Two channels that move together, one three times as far: their mean varies twice as far as the first."""
    model, other = chain(width=4).model(), chain(width=8).model()
    partner = partner_of(model, other)
    spaces = spaces_of(model)
    plans = {
        s.name: np.kron(np.eye(s.size), np.ones((2, 1))) for s in spaces if partner.spaces[s.name].size == 2 * s.size
    }
    maps = {s.name: ChannelMap.from_plan(plans[s.name]) if s.name in plans else ENTROPIC(np.eye(12, 8)) for s in spaces}
    norm = find_layers(model)[0].norm
    theirs = other.graph.initializers[partner.constants[norm.inputs[4].name]]
    set_array(theirs, np.array([1, 9, 1, 1, 4, 4, 0, 0], np.float32))
    found = transported_arrays(model, replace(partner, maps=maps), spaces)
    np.testing.assert_allclose(found[norm.inputs[4].name], [4, 1, 4, 0], atol=1e-12)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_values_of_a_copy_are_carried_back(name):
    build, shape = NETS[name]
    model = build()
    partner, _ = permuted_partner(model)
    spaces, orders = spaces_of(model), target_channels(model, partner, spaces_of(model))[0]
    names = [v.name for node in model.graph for v in node.outputs if v.name in partner.values]
    feeds = next(Random(shape, 3).batches(3))
    ours, theirs = (
        execute(with_outputs(network, wanted), feeds)
        for network, wanted in ((model, names), (partner.model, [partner.values[n] for n in names]))
    )
    assert set(orders) <= set(names) and len(orders) >= 2
    for value in names:
        array = theirs[partner.values[value]]
        np.testing.assert_allclose(carry_value(value, array, partner, spaces), ours[value], atol=1e-4)
    for layer in find_layers(model)[:-1]:
        value = layer.linear.name
        again = np.take(theirs[partner.values[value]], orders[value], channel_axis(layer))
        np.testing.assert_allclose(again, ours[value], atol=1e-4)


def with_outputs(model: oir.Model, names: list[str]) -> oir.Model:
    model = model.clone()
    values = {v.name: v for node in model.graph for v in node.outputs}
    model.graph.outputs[:] = [values[name] for name in names]
    return model


def test_target_maps_are_the_matrices_of_the_maps():
    model, other = residual().model(), residual(seed=1, width=6).model()
    partner = soft_partner(model, other)
    orders, maps = target_channels(model, partner, spaces_of(model))
    assert not orders
    for space in spaces_of(model):
        for slots in space.values:
            if len(slots.axes) == 1:
                np.testing.assert_allclose(maps[slots.name], partner.maps[space.name].forward, atol=1e-12)


# --- spaces -----------------------------------------------------------------------------------------------------------


def test_spaces_match_by_the_arrays_they_lie_in():
    model, other = grouped().model(), permuted_copy(grouped(seed=1).model())[0]
    ours, theirs = spaces_of(model), spaces_of(other)
    constants = {name: name for name in model.graph.initializers}
    found = matching_spaces(ours, list(theirs), constants)
    assert {name: space.name for name, space in found.items()} == {space.name: space.name for space in ours}
    renamed = {name: f"{name}'" for name in constants}
    with pytest.raises(ModelError, match=r"no channel space like 'c0', which lies in 'c0'"):
        matching_spaces(ours, theirs, renamed)
    with pytest.raises(ModelError, match="no channel space like"):
        matching_spaces(ours, theirs[1:], constants)


def test_what_does_not_fit_is_named():
    model, other = dense().model(), dense(seed=1, sizes=(6, 9, 14, 3)).model()
    partner = replace(soft_partner(model, dense(sizes=(6, 9, 14, 4)).model()), model=other)
    with pytest.raises(ModelError, match=r"'c8' has shape \[4, 10\] in one network and \[3, 10\]"):
        transported_arrays(model, partner, spaces_of(model))


def sums(width: int) -> oir.Model:
    net = Net(width)
    x = net.relu(net.gemm(net.input(["N", 6]), width))
    net.output(net.op("Einsum", x, net.normal(width, 4), channels=4, equation="nc,cd->nd", name="summed"))
    return net.model()


def test_an_operator_with_weights_of_unknown_use_takes_permutations_only():
    model = sums(5)
    partner, _ = permuted_partner(model)
    for name, array in transported_arrays(model, partner, spaces_of(model)).items():
        np.testing.assert_array_equal(array, get_array(model.graph.initializers[name]))
    partner = soft_partner(model, sums(7))
    with pytest.raises(ModelError, match="Einsum 'Einsum_summed': it is not known along which axes of"):
        transported_arrays(model, partner, spaces_of(model))


# --- matching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solve", [assign, transport], ids=["assign", "transport"])
@pytest.mark.parametrize("measure", [correlation_cost, distance_cost, None], ids=["correlation", "distance", "weights"])
@pytest.mark.parametrize("name", NETS)
def test_a_planted_permutation_is_found(name, measure, solve):
    build, shape = NETS[name]
    model = build()
    partner, alignment = permuted_partner(model)
    partner = replace(partner, maps={})
    spaces = spaces_of(model)
    if measure is None:
        found = match_by_weights(model, spaces, partner, solve)
    else:
        statistics = statistics_of(model, partner, Random(shape))
        found = match_by_activations(spaces, partner, statistics, measure, solve)
    for space in spaces:
        np.testing.assert_array_equal(found[space.name].order, alignment[space.name])


@pytest.mark.parametrize("name", ["dense", "batch norms", "residual", "side by side"])
def test_halves_of_a_channel_are_found(name):
    build, shape = NETS[name]
    model = build()
    wide, _ = permuted_copy(split_in_halves(model))
    partner = partner_of(model, wide)
    seen: list[np.ndarray] = []

    def watched(cost: np.ndarray) -> ChannelMap:
        seen.append(cost)
        return transport(cost)

    by_weights = match_by_weights(model, spaces_of(model), partner, watched)
    for cost in seen:  # by what makes a channel its halves are alike; where they are read they are not
        np.testing.assert_allclose(np.sort(cost, axis=0)[:2], 0, atol=1e-9)
        assert np.sort(cost, axis=0)[2].min() > 0.1
    statistics = statistics_of(model, partner, Random(shape))
    by_values = match_by_activations(spaces_of(model), partner, statistics, distance_cost, transport)
    for space in spaces_of(model):
        forward = by_weights[space.name].forward
        np.testing.assert_allclose(np.sort(forward, axis=1)[:, -3:], [[0, 0.5, 0.5]] * space.size, atol=1e-12)
        np.testing.assert_allclose(forward, by_values[space.name].forward, atol=1e-12)


def test_transposed_groups_of_other_widths_are_matched():
    model, other = transposed().model(), transposed(seed=1, width=12).model()
    partner = partner_of(model, other)
    found = match_by_weights(model, spaces_of(model), partner, transport)
    assert {n: m.forward.shape for n, m in found.items()} == {
        s.name: (s.size, partner.spaces[s.name].size) for s in spaces_of(model)
    }


def test_what_was_not_seen_keeps_its_order():
    model = dense().model()
    partner = partner_of(model, permuted_copy(model)[0])
    for own in match_by_activations(spaces_of(model), partner, {}, distance_cost, transport).values():
        np.testing.assert_array_equal(own.order, np.arange(len(own.forward)))


def test_a_space_that_cannot_be_solved_is_named():
    model = dense().model()
    partner = partner_of(model, dense(sizes=(6, 9, 14, 4)).model())
    with pytest.raises(ModelError, match="channel space 'c0': 9 channels cannot be assigned to 12"):
        match_by_weights(model, spaces_of(model), partner, assign)


@pytest.mark.parametrize("solver", SOLVERS)
def test_matching_is_deterministic(solver):
    model, other = residual().model(), residual(seed=1, width=6).model()
    partner = partner_of(model, other)
    runs = []
    for _ in range(2):
        statistics = statistics_of(model, partner, Random((3, 10, 10)))
        found = match_by_activations(spaces_of(model), partner, statistics, distance_cost, SOLVERS[solver])
        found |= {f"{n}/w": m for n, m in match_by_weights(model, spaces_of(model), partner, SOLVERS[solver]).items()}
        runs.append({name: (own.forward.tobytes(), own.backward.tobytes()) for name, own in found.items()})
    assert runs[0] == runs[1]
