"""The rules that fuse networks of one task: what they make of a copy of the network itself, and their formulas."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as oir
import pytest
from fusing import ANY_WIDTH, NETS, Random, partner_of, permuted_copy, spaces_of, split_in_halves, statistics_of
from graphs import assert_same_outputs, dense, execute, residual
from hypothesis import given
from hypothesis import strategies as st

from onnxmerge.ir.layers import Layer, find_layers
from onnxmerge.ir.units import find_units
from onnxmerge.ir.weights import get_array
from onnxmerge.passes.average import Average, Partner
from onnxmerge.passes.channel_map import ChannelMap, MappedPartner, carry_value, target_channels
from onnxmerge.passes.least_squares import solve_least_squares, solve_repair
from onnxmerge.passes.match_channels import distance_cost, match_by_activations, match_by_weights, transport
from onnxmerge.passes.mtz import HessianAverage, functional_difference, solve_hessian
from onnxmerge.passes.refit import Refit, Solve, Teacher
from onnxmerge.passes.transport import TransportAverage
from onnxmerge.runtime.activations import stream
from onnxmerge.runtime.patches import Positions, grid_of, output_rows
from onnxmerge.runtime.statistics import Regression

# --- the rules, all called alike --------------------------------------------------------------------------------------

Rule = Callable[[oir.Model, Sequence[MappedPartner], Random], None]


def transported(model: oir.Model, partners: Sequence[MappedPartner], samples: Random) -> None:
    TransportAverage(partners, spaces_of(model))(model)


def mtz(model: oir.Model, partners: Sequence[MappedPartner], samples: Random) -> None:
    everyone = [samples] * (len(partners) + 1)
    HessianAverage(partners, spaces_of(model), everyone, samples.count, threads=1)(model)


def computed(model: oir.Model) -> list[str]:
    return [v.name or "" for v in model.graph.inputs] + [v.name or "" for node in model.graph for v in node.outputs]


def teachers_of(model: oir.Model, partners: Sequence[MappedPartner], samples: Random) -> dict[str, Teacher]:
    original = model.clone()
    found = {"0": Teacher(original, samples, samples, samples.count, {name: name for name in computed(original)})}
    for number, partner in enumerate(partners, start=1):
        orders, maps = target_channels(original, partner, spaces_of(original))
        found[str(number)] = Teacher(
            partner.model, samples, samples, samples.count, partner.values, orders=orders, maps=maps
        )
    return found


def refitted(solve: Solve, compensate: bool) -> Rule:
    def rule(model: oir.Model, partners: Sequence[MappedPartner], samples: Random) -> None:
        teachers = teachers_of(model, partners, samples)
        transported(model, partners, samples)
        cuts = [unit.cut for unit in find_units(model)]
        Refit(teachers, cuts, solve, compensate=compensate, threads=1)(model)

    return rule


def least_squares(layer: Layer, statistics: Sequence[Regression], current: np.ndarray) -> np.ndarray:
    return solve_least_squares(statistics, current, [1.0] * len(statistics))


def repair(layer: Layer, statistics: Sequence[Regression], current: np.ndarray) -> np.ndarray:
    return solve_repair(statistics, current)


RULES: dict[str, Rule] = {
    "transport": transported,
    "mtz": mtz,
    "least squares": refitted(least_squares, compensate=True),
    "repair": refitted(repair, compensate=False),
}


def by_activations(model: oir.Model, other: oir.Model, samples: Random) -> MappedPartner:
    partner = partner_of(model, other)
    statistics = statistics_of(model, partner, samples)
    return replace(partner, maps=match_by_activations(spaces_of(model), partner, statistics, distance_cost, transport))


def by_weights(model: oir.Model, other: oir.Model, samples: Random) -> MappedPartner:
    partner = partner_of(model, other)
    return replace(partner, maps=match_by_weights(model, spaces_of(model), partner, transport))


MATCHES = {"activations": by_activations, "weights": by_weights}


def fresh(samples: Random) -> dict[str, np.ndarray]:
    (feeds,) = Random(samples.shape, 32, seed=99).batches(32)
    return feeds


def weights_of(model: oir.Model) -> dict[str, bytes]:
    return {name: get_array(value).tobytes() for name, value in model.graph.initializers.items()}


# --- a network and itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("match", MATCHES)
def test_a_network_fused_with_a_permuted_copy_of_itself_is_itself(match, name, rule):
    build, shape = NETS[name]
    model, samples = build(), Random(shape)
    copy, _ = permuted_copy(model)
    fused = model.clone()
    RULES[rule](fused, [MATCHES[match](model, copy, samples)], samples)
    assert_same_outputs(model, fused, fresh(samples))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("wider", ["other", "reference"])
@pytest.mark.parametrize("name", [name for name in ANY_WIDTH if name != "groups"])
def test_a_network_fused_with_one_whose_channels_are_its_own_in_halves_is_itself(name, wider, rule):
    """The wider network is the same function; its channels are in another order, and each is there twice."""
    build, shape = ANY_WIDTH[name]
    narrow, samples = build(), Random(shape)
    wide, _ = permuted_copy(split_in_halves(narrow))
    assert_same_outputs(narrow, wide, fresh(samples))
    model, other = (narrow, wide) if wider == "other" else (wide, narrow)
    fused = model.clone()
    RULES[rule](fused, [by_activations(model, other, samples)], samples)
    assert_same_outputs(model, fused, fresh(samples), tolerance=3e-5 if rule == "least squares" else 1e-5)


@pytest.mark.parametrize("name", ["dense", "residual", "side by side"])
def test_halves_found_by_weights_give_the_network_itself(name):
    build, shape = ANY_WIDTH[name]
    model, samples = build(), Random(shape)
    wide, _ = permuted_copy(split_in_halves(model))
    fused = model.clone()
    transported(fused, [by_weights(model, wide, samples)], samples)
    assert_same_outputs(model, fused, fresh(samples))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["dense", "residual"])
def test_three_networks_of_one_function_are_that_function(name, rule):
    build, shape = ANY_WIDTH[name]
    model, samples = build(), Random(shape)
    others = [permuted_copy(model)[0], permuted_copy(split_in_halves(model), seed=5)[0]]
    fused = model.clone()
    RULES[rule](fused, [by_activations(model, other, samples) for other in others], samples)
    assert_same_outputs(model, fused, fresh(samples), tolerance=3e-5 if rule == "least squares" else 1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_the_same_networks_give_the_same_bytes(rule):
    model, samples = residual().model(), Random((3, 10, 10))
    runs = []
    for _ in range(2):
        fused = model.clone()
        partners = [by_activations(model, residual(seed, width).model(), samples) for seed, width in ((1, 6), (2, 8))]
        RULES[rule](fused, partners, samples)
        runs.append(weights_of(fused))
    assert runs[0] == runs[1] != weights_of(model)


# --- transport --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_transport_along_permutations_is_the_average(name):
    build, _ = NETS[name]
    model, others, generator = build(), [build(seed=1), build(seed=2)], np.random.default_rng(0)
    spaces, weights = spaces_of(model), (0.5, 2.0)
    orders = [{space.name: generator.permutation(space.size) for space in spaces} for _ in others]
    partners = [
        partner_of(model, other, maps={n: ChannelMap.from_permutation(own) for n, own in order.items()}, weight=weight)
        for other, order, weight in zip(others, orders, weights, strict=True)
    ]
    aligned = [Partner(p.model, p.constants, order, p.weight) for p, order in zip(partners, orders, strict=True)]
    results = []
    for rule in (TransportAverage(partners, spaces, 3.0), Average(aligned, spaces, 3.0)):
        fused = model.clone()
        rule(fused)
        results.append(weights_of(fused))
    assert results[0] == results[1]


# --- MTZ --------------------------------------------------------------------------------------------------------------


def inputs(seed: int, rows: int = 200, columns: int = 6) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((rows, columns)) @ generator.standard_normal((columns, columns))


def moment(x: np.ndarray) -> np.ndarray:
    return x.T @ x / len(x)


@given(seed=st.integers(0, 99), count=st.integers(2, 4))
def test_the_solution_is_least_squares_on_the_networks_own_outputs(seed, count):
    """numpy's minimiser of sum_t a_t / n_t |X_t (W - W_t)|^2."""
    generator = np.random.default_rng(seed)
    xs, shares = [inputs(seed + 100 * t) for t in range(count)], generator.uniform(0.5, 2, count)
    weights = [generator.standard_normal((6, 3)) for _ in range(count)]
    got = solve_hessian([moment(x)[None] for x in xs], [w[None] for w in weights], shares)[0]
    scaled = [np.sqrt(a / len(x)) * x for a, x in zip(shares, xs, strict=True)]
    goals = np.concatenate([x @ w for x, w in zip(scaled, weights, strict=True)])
    wanted, *_ = np.linalg.lstsq(np.concatenate(scaled), goals, rcond=None)
    np.testing.assert_allclose(got, wanted, atol=1e-2)

    def total(solution):
        return sum(((x @ (solution - w)) ** 2).sum() for x, w in zip(scaled, weights, strict=True))

    assert total(got) <= total(wanted) * (1 + 1e-6)


def test_two_networks_meet_as_the_paper_says():
    """Equations 10 to 12, with the inverses written out."""
    generator = np.random.default_rng(0)
    a, b = (moment(inputs(seed)) + np.eye(6) for seed in (1, 2))
    first, second = generator.standard_normal((6, 4)), generator.standard_normal((6, 5))
    shares = (0.3, 0.7)
    ha, hb = (share * own for share, own in zip(shares, (a, b), strict=True))
    between = np.linalg.inv(np.linalg.inv(ha) + np.linalg.inv(hb))
    difference = second[:, :4] - first
    got = solve_hessian([a[None], b[None]], [first[None], second[None, :, :4]], shares)[0]
    np.testing.assert_allclose(got, first + np.linalg.inv(ha) @ between @ difference, atol=1e-4)
    np.testing.assert_allclose(got, second[:, :4] - np.linalg.inv(hb) @ between @ difference, atol=1e-4)
    costs = functional_difference([a, b], first, second, shares)
    assert costs.shape == (5, 4)
    for theirs, ours in np.ndindex(5, 4):
        step = second[:, theirs] - first[:, ours]
        assert costs[theirs, ours] == pytest.approx(step @ between @ step / 2, rel=1e-4)


def test_equal_hessians_give_the_weighted_mean():
    generator = np.random.default_rng(0)
    own, weights = moment(inputs(1)), generator.standard_normal((3, 1, 6, 2))
    got = solve_hessian([own[None]] * 3, list(weights), [1.0, 2.0, 5.0])
    np.testing.assert_allclose(got, np.tensordot([1 / 8, 2 / 8, 5 / 8], weights, 1), atol=1e-9)


def test_where_one_network_has_no_inputs_the_other_decides():
    """And where none has, the weighted mean holds."""
    x = inputs(1, columns=3)
    ours, theirs = np.zeros((200, 6)), np.zeros((200, 6))
    ours[:, :2], theirs[:, 2:4] = x[:, :2], x[:, 1:]
    generator = np.random.default_rng(0)
    first, second = generator.standard_normal((2, 1, 6, 4))
    got = solve_hessian([moment(ours)[None], moment(theirs)[None]], [first, second], [1.0, 3.0])[0]
    np.testing.assert_allclose(got[:2], first[0, :2], atol=1e-2)
    np.testing.assert_allclose(got[2:4], second[0, 2:4], atol=1e-2)
    np.testing.assert_allclose(got[4:], (first[0, 4:] + 3 * second[0, 4:]) / 4, atol=1e-9)
    nothing = np.zeros((1, 6, 6))
    np.testing.assert_allclose(solve_hessian([nothing, nothing], [first, second], [1.0, 1.0]), (first + second) / 2)


def test_the_functional_difference_pairs_equal_neurons():
    generator = np.random.default_rng(0)
    first, order = generator.standard_normal((6, 8)), generator.permutation(8)
    costs = functional_difference([moment(inputs(1)), moment(inputs(2))], first, first[:, np.argsort(order)])
    np.testing.assert_array_equal(transport(costs).order, order)
    np.testing.assert_allclose(costs[order, np.arange(8)], 0, atol=1e-12)


def test_each_network_weighs_with_its_own_inputs_in_our_channels():
    """The second layer of two networks of unequal width, against the formula on activations in numpy."""
    model, other = dense(seed=1).model(), dense(seed=2, sizes=(6, 15, 11, 4)).model()
    samples = [Random((6,), seed=0), Random((6,), seed=1)]
    partner = replace(by_activations(model, other, samples[0]), weight=2.0)
    fused = model.clone()
    HessianAverage([partner], spaces_of(model), samples, 256, 3.0, threads=1)(fused)
    first, second = spaces_of(model)
    makes, reads = partner.maps[second.name], partner.maps[first.name]
    layers = [find_layers(network)[1] for network in (model, other, fused)]
    moments, weights = [], []
    for number, (network, layer) in enumerate(zip((model, other), layers[:2], strict=True)):
        x = np.concatenate([v[layer.input.name] for v in stream(network, samples[number], [layer.input.name])])
        w, bias = get_array(layer.weight), get_array(layer.bias)
        if number == 1:
            x, w, bias = x @ reads.forward.T, reads.backward.T @ w @ makes.forward.T, makes.forward @ bias
        x = np.concatenate([x, np.ones((256, 1))], axis=1).astype(np.float64)
        moments.append(moment(x)[None])
        weights.append(np.concatenate([w, bias[None]])[None])
    wanted = solve_hessian(moments, weights, [3.0, 2.0])[0]
    np.testing.assert_allclose(get_array(layers[2].weight), wanted[:-1], atol=1e-4)
    np.testing.assert_allclose(get_array(layers[2].bias), wanted[-1], atol=1e-4)
    mean = (3 * weights[0] + 2 * weights[1])[0] / 5
    assert np.abs(wanted - mean).max() > 0.05


def test_a_layer_without_bias_needs_none():
    model, other = (ANY_WIDTH["dense without biases"][0](seed) for seed in (1, 2))
    samples = [Random((6,), 32, seed=0), Random((6,), 32, seed=1)]
    maps = {space.name: ChannelMap.from_permutation(np.arange(space.size)) for space in spaces_of(model)}
    fused = model.clone()
    HessianAverage([partner_of(model, other, maps=maps)], spaces_of(model), samples, 32, threads=1)(fused)
    moments = [moment(next(own.batches(32))["x"].astype(np.float64))[None] for own in samples]
    weights = [get_array(find_layers(network)[0].weight).T[None] for network in (model, other)]
    wanted = solve_hessian(moments, weights, [1.0, 1.0])[0]
    np.testing.assert_allclose(get_array(find_layers(fused)[0].weight).T, wanted, atol=1e-4)


def test_layers_that_a_partner_has_not_stay():
    model, other, samples = dense(seed=1).model(), dense(seed=2).model(), Random((6,))
    partner = by_activations(model, other, samples)
    last = find_layers(model)[-1]
    gone = {last.weight.name, last.bias.name}
    fewer = replace(partner, constants={a: b for a, b in partner.constants.items() if a not in gone})
    unseen = replace(partner, values={a: b for a, b in partner.values.items() if a != last.linear.name})
    for own, wanted in ((fewer, model), (unseen, None)):
        fused, mean = model.clone(), model.clone()
        mtz(fused, [own], samples)
        transported(mean, [own], samples)
        for name in gone:
            assert weights_of(fused)[name] == weights_of(wanted or mean)[name]
        assert weights_of(fused)[find_layers(model)[0].name] != weights_of(mean)[find_layers(model)[0].name]


def test_layers_are_gathered_in_portions(monkeypatch):
    model, samples = residual().model(), Random((3, 10, 10), count=32)
    partner = by_activations(model, residual(seed=1, width=6).model(), samples)
    results = []
    for entries in (1 << 26, 1):
        monkeypatch.setattr("onnxmerge.passes.mtz._ENTRIES", entries)
        fused = model.clone()
        mtz(fused, [partner], samples)
        results.append(fused)
    assert_same_outputs(*results, fresh(samples), tolerance=1e-3)  # onnxruntime rounds by what it is asked for


# --- teachers of other widths and depths ------------------------------------------------------------------------------


def test_least_squares_comes_closer_to_both_networks_than_their_average():
    """Two networks of unequal width that approximate one function (each is it, with noise)."""
    base, samples = residual().model(), Random((3, 10, 10))
    generator = np.random.default_rng(0)
    wide = permuted_copy(split_in_halves(base))[0]
    for network in (model := base.clone(), wide):
        for layer in find_layers(network):
            array = get_array(layer.weight)
            noise = 0.25 * array.std() * generator.standard_normal(array.shape)
            layer.weight.const_value = oir.tensor((array + noise).astype(np.float32), name=layer.weight.name)
    partner = by_activations(model, wide, samples)
    wanted = [next(iter(execute(network, fresh(samples)).values())) for network in (model, wide)]
    errors = {}
    for name, rule in RULES.items():
        fused = model.clone()
        rule(fused, [partner], samples)
        got = next(iter(execute(fused, fresh(samples)).values()))
        errors[name] = np.linalg.norm(got - np.mean(wanted, axis=0)) / np.linalg.norm(got)
    assert errors["least squares"] < 0.8 * errors["transport"]
    assert errors["repair"] < errors["transport"]


def test_repair_matches_the_channels_of_networks_of_any_width():
    model, other = residual(seed=1).model(), residual(seed=2, width=6).model()
    samples = Random((3, 10, 10))
    partner = by_activations(model, other, samples)
    fused = model.clone()
    RULES["repair"](fused, [partner], samples)
    first = find_layers(model)[0].linear.name
    rows = []
    for network, name in ((model, first), (other, partner.values[first]), (fused, first)):
        array = np.concatenate([values[name] for values in stream(network, samples, [name], threads=1)])
        array = carry_value(first, array, partner, spaces_of(model)) if network is other else array
        rows.append(output_rows(array, 1, Positions(np.arange(np.prod(grid_of(array, 1))))))
    ours, theirs, got = rows
    np.testing.assert_allclose(got.std(0), (ours.std(0) + theirs.std(0)) / 2, rtol=0.05)


def without(teacher: Teacher, *names: str) -> Teacher:
    return replace(teacher, values={ours: theirs for ours, theirs in teacher.values.items() if ours not in names})


def test_the_walk_passes_over_a_cut_that_a_teacher_has_not():
    model, other, samples = residual(seed=1).model(), residual(seed=2, width=6).model(), Random((3, 10, 10))
    partner = by_activations(model, other, samples)
    cuts = [unit.cut for unit in find_units(model)]
    assert len(cuts) >= 3
    results = []
    for places in (cuts, [cuts[0], *cuts[2:]]):
        fused = model.clone()
        teachers = teachers_of(model, [partner], samples)
        teachers["1"] = without(teachers["1"], cuts[1])
        Refit(teachers, places, least_squares, threads=1)(fused)
        results.append(weights_of(fused))
    assert results[0] == results[1]


def test_a_layer_is_fitted_to_the_teachers_that_have_a_target_for_it():
    model, other, samples = dense(seed=1).model(), dense(seed=2, sizes=(6, 9, 14, 4)).model(), Random((6,))
    partner = by_activations(model, other, samples)
    both = teachers_of(model, [partner], samples)
    first, second, third = find_layers(model)
    seen = {}

    def watched(layer: Layer, statistics: Sequence[Regression], current: np.ndarray) -> np.ndarray:
        seen[layer.name] = [task.rows for task in statistics]
        return least_squares(layer, statistics, current)

    fused = model.clone()
    lacking = {
        "0": without(both["0"], third.linear.name),
        "1": without(both["1"], second.linear.name, third.linear.name),
    }
    Refit(lacking, [], watched, threads=1)(fused)
    assert seen == {first.name: [256, 256], second.name: [256, 0]}
    for layer, own in zip(find_layers(model), find_layers(fused), strict=True):
        same = np.array_equal(get_array(layer.weight), get_array(own.weight))
        assert same == (layer.name == third.name)

    fitted = model.clone()  # from the same weights of the second layer, behind the same first
    for name in (first.weight.name, first.bias.name):
        fitted.graph.initializers[name].const_value = fused.graph.initializers[name].const_value
    Refit({"0": without(both["0"], first.linear.name, third.linear.name)}, [], least_squares, threads=1)(fitted)
    assert weights_of(fitted) == weights_of(fused)


def test_statistics_without_rows_count_nothing():
    generator = np.random.default_rng(0)
    x, z = generator.standard_normal((1, 50, 3)), generator.standard_normal((50, 2))
    statistics, current = Regression(), generator.standard_normal((1, 4, 2))
    statistics.update(x, z)
    for solve in (
        lambda own: solve_least_squares(own, current, [1.0] * len(own)),
        lambda own: solve_repair(own, current),
    ):
        np.testing.assert_array_equal(solve([Regression(), statistics]), solve([statistics]))
