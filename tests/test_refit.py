"""Least squares layer by layer: its patches, its statistics, its solutions, and the walk through a network."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as oir
import pytest
from graphs import Net, chain, dense, execute, relative_error, residual
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnxmerge.ir.layers import Layer, find_layers
from onnxmerge.ir.load import load
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.ir.units import find_units
from onnxmerge.ir.weights import get_array, set_array
from onnxmerge.passes.align import matched
from onnxmerge.passes.ensure_biases import EnsureBiases
from onnxmerge.passes.fold_batch_norm import FoldBatchNorm
from onnxmerge.passes.least_squares import solve_least_squares, solve_repair
from onnxmerge.passes.permute import Permute
from onnxmerge.passes.refit import Refit, Teacher
from onnxmerge.runtime import activations
from onnxmerge.runtime.activations import Renamed, lockstep, store, stream
from onnxmerge.runtime.patches import (
    Positions,
    channel_axis,
    grid_of,
    input_rows,
    output_rows,
    weight_array,
    weight_matrix,
)
from onnxmerge.runtime.statistics import Moments, PairStatistics, Regression

# --- patches ----------------------------------------------------------------------------------------------------------


def check_rows(net: Net, shape: tuple[int, ...], seed: int = 0) -> None:
    """The rows times the weight matrix are what onnxruntime computes at the same positions."""
    model = net.model()
    (layer,) = find_layers(model)
    generator = np.random.default_rng(seed)
    x = generator.standard_normal(shape).astype(np.float32)
    y = execute(model, {"x": x})[layer.linear.name]
    axis = channel_axis(layer)
    positions = Positions.sample(generator, grid_of(y, axis), count=5)
    weight = get_array(layer.weight)
    matrix = weight_matrix(layer, weight)
    made = (input_rows(layer, x, positions) @ matrix).transpose(1, 0, 2).reshape(-1, layer.out_channels)
    if layer.bias is not None:
        made = made + get_array(layer.bias).reshape(-1)
    wanted = output_rows(y, axis, positions)
    assert wanted.shape == made.shape
    np.testing.assert_allclose(made, wanted, atol=1e-5 * np.abs(y).max())
    np.testing.assert_array_equal(weight_array(layer, matrix), weight)


@settings(max_examples=100)
@given(st.data())
def test_rows_of_a_convolution(data):
    dimensions = data.draw(st.integers(1, 3), "dimensions")
    each = st.lists(st.integers(1, 3), min_size=dimensions, max_size=dimensions)
    kernel, strides, dilations = data.draw(each, "kernel"), data.draw(each, "strides"), data.draw(each, "dilations")
    sizes = data.draw(st.lists(st.integers(3, 9), min_size=dimensions, max_size=dimensions), "sizes")
    group, read, made = (data.draw(st.integers(1, 3), what) for what in ("group", "read", "made"))
    auto_pad = data.draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]), "auto_pad")
    attributes: dict = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "group": group}
    pads = [0] * (2 * dimensions)
    if auto_pad == "NOTSET":
        pads = data.draw(st.lists(st.integers(0, 2), min_size=2 * dimensions, max_size=2 * dimensions), "pads")
        attributes["pads"] = pads
    else:
        attributes["auto_pad"] = auto_pad
    if auto_pad.startswith("SAME"):
        assume(all(d == 1 for d in dilations))  # onnxruntime ignores dilation when it pads by itself
    else:
        extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        room = [n + pads[i] + pads[i + dimensions] for i, n in enumerate(sizes)]
        assume(all(e <= r for e, r in zip(extents, room, strict=True)))
    net = Net(seed=1)
    x = net.input(["N", group * read, *sizes])
    weights = [net.normal(group * made, read, *kernel)]
    weights += [net.normal(group * made)] if data.draw(st.booleans(), "bias") else []
    net.output(net.op("Conv", x, *weights, **attributes))
    check_rows(net, (2, group * read, *sizes))


def test_rows_of_matrices():
    for transposed in (False, True):
        net = Net()
        net.output(net.gemm(net.input(["N", 6]), 4, transposed=transposed))
        check_rows(net, (3, 6))
    net = Net()
    net.output(net.matmul(net.input(["N", 7, 6]), 4))
    check_rows(net, (3, 7, 6))


def test_positions_differ_and_are_sorted():
    positions = Positions.sample(np.random.default_rng(0), (9, 9), count=20).flat
    assert len(set(positions.tolist())) == 20
    assert (np.diff(positions) > 0).all()
    assert positions.max() < 81
    np.testing.assert_array_equal(Positions.sample(np.random.default_rng(0), (2, 3), count=20).flat, np.arange(6))
    np.testing.assert_array_equal(Positions.sample(np.random.default_rng(0), (), count=20).flat, [0])


# --- statistics -------------------------------------------------------------------------------------------------------


def batches(array: np.ndarray) -> list[np.ndarray]:
    return np.split(array, [3, 50, 51])


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_pair_statistics_are_numpys(offset):
    generator = np.random.default_rng(0)
    a = (generator.standard_normal((400, 5)) + offset).astype(np.float32)
    b = (a[:, [4, 2, 0]] * 2 + generator.standard_normal((400, 3)) - offset).astype(np.float32)
    a[:, 1] = offset  # a dead channel
    statistics = PairStatistics()
    for left, right in zip(batches(a), batches(b), strict=True):
        statistics.update(left, right)
    exact_a, exact_b = a.astype(np.float64), b.astype(np.float64)
    centred_a, centred_b = exact_a - exact_a.mean(0), exact_b - exact_b.mean(0)
    assert statistics.rows == 400
    np.testing.assert_allclose(statistics.covariance(), centred_a.T @ centred_b / 400, atol=1e-4)
    for ours, theirs in zip(statistics.deviations(), (exact_a.std(0), exact_b.std(0)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
    alive = [0, 2, 3, 4]
    wanted = np.corrcoef(exact_a[:, alive].T, exact_b.T)[:4, 4:]
    np.testing.assert_allclose(statistics.correlation()[alive], wanted, atol=1e-4)
    np.testing.assert_allclose(statistics.correlation()[1], 0, atol=1e-6)
    products = [
        np.linalg.norm(x.T @ y) for x, y in ((centred_a, centred_b), (centred_a, centred_a), (centred_b, centred_b))
    ]
    assert statistics.cka() == pytest.approx(products[0] ** 2 / (products[1] * products[2]), rel=1e-4)


def test_cka_is_one_for_a_rotation_and_small_for_noise():
    generator = np.random.default_rng(0)
    a = generator.standard_normal((2000, 6))
    rotation, _ = np.linalg.qr(generator.standard_normal((6, 6)))
    same, other = PairStatistics(), PairStatistics()
    same.update(a, 3 * a @ rotation + 1)
    other.update(a, generator.standard_normal((2000, 6)))
    assert same.cka() == pytest.approx(1)
    assert other.cka() < 0.02


def test_matched_reads_the_assigned_pairs():
    assert matched(np.array([[0.1, 0.9], [0.7, 0.2]]), np.array([1, 0])) == pytest.approx(0.8)


def regression(inputs: np.ndarray, targets: np.ndarray) -> Regression:
    statistics = Regression()
    for x, z in zip(np.split(inputs, [3, 10], axis=1), np.split(targets, [3, 10]), strict=True):
        statistics.update(x, z)
    return statistics


def test_regression_is_numpys():
    generator = np.random.default_rng(0)
    inputs, targets = generator.standard_normal((2, 300, 4)), generator.standard_normal((300, 6)) + 3
    statistics = regression(inputs, targets)
    assert statistics.rows == 300
    for group in range(2):
        x = np.concatenate([inputs[group], np.ones((300, 1))], axis=1)
        z = targets[:, 3 * group : 3 * group + 3]
        np.testing.assert_allclose(statistics.gram[group], x.T @ x)
        np.testing.assert_allclose(statistics.cross[group], x.T @ z)
        np.testing.assert_allclose(statistics.target_variance()[group], z.var(0))


# --- solutions --------------------------------------------------------------------------------------------------------


def test_least_squares_is_numpys():
    generator = np.random.default_rng(0)
    inputs, targets = generator.standard_normal((2, 300, 4)), generator.standard_normal((300, 6))
    prior = np.zeros((2, 5, 3))
    solution = solve_least_squares([regression(inputs, targets)], prior, [1.0], ridge=1e-12)
    for group in range(2):
        x = np.concatenate([inputs[group], np.ones((300, 1))], axis=1)
        wanted, *_ = np.linalg.lstsq(x, targets[:, 3 * group : 3 * group + 3], rcond=None)
        np.testing.assert_allclose(solution[group], wanted, atol=1e-8)


@pytest.mark.parametrize("tasks", [1, 2])
def test_statistics_outlive_a_solution(tasks):
    """The matrix is factored in its own place and restored: a layer is solved several times from one set."""
    generator = np.random.default_rng(0)
    both = regression(generator.standard_normal((2, 600, 300)), generator.standard_normal((600, 6 * tasks)))
    parts, prior = both.split(tasks), generator.standard_normal((2, 301, 3))
    before = both.gram.copy()
    first, again = (solve_least_squares(parts, prior, [1.0] * tasks, ridge=1e-2) for _ in range(2))
    np.testing.assert_allclose(both.gram, before, atol=1e-9)  # what BLAS makes may differ in its two triangles
    np.testing.assert_allclose(first, again, atol=1e-9)
    assert all(part.gram is both.gram for part in parts)


def test_one_shared_matrix_and_two_equal_ones_have_one_solution():
    generator = np.random.default_rng(0)
    x, z = generator.standard_normal((1, 300, 4)), generator.standard_normal((2, 300, 3))
    shared = regression(x, np.concatenate(list(z), axis=1)).split(2)
    apart = [regression(x, own) for own in z]
    prior = generator.standard_normal((1, 5, 3))
    found = [solve_least_squares(own, prior, [1.0, 2.0], ridge=0.1) for own in (shared, apart)]
    np.testing.assert_allclose(*found, atol=1e-10)


def test_moments_are_numpys_covariance():
    """Also over the edge of a tile, and of channels far from zero mean."""
    rows = np.random.default_rng(0).standard_normal((700, 300)) + np.linspace(0, 100, 300)
    moments = Moments()
    for part in np.split(rows, [3, 500]):
        moments.update(part)
    found = moments.into_covariance()
    np.testing.assert_allclose(found, np.cov(rows.T, bias=True), atol=1e-9)
    np.testing.assert_array_equal(found, found.T)


def test_least_squares_of_two_tasks_weighs_their_relative_errors():
    """A task whose targets are a thousand times larger counts no more, and rows count no more than their share."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((1, 4000, 4))
    first, second = generator.standard_normal((4, 3)), generator.standard_normal((4, 3))
    a = regression(x, x[0] @ first)
    b = regression(x[:, :500], 1000 * (x[0, :500] @ second))
    prior = np.zeros((1, 5, 3))
    va, vb = (float(task.target_variance().mean()) for task in (a, b))
    for weights in ([1.0, 1.0], [3.0, 1.0]):
        solution = solve_least_squares([a, b], prior, weights, ridge=1e-12)[0]
        rows = [np.concatenate([x[0, :n], np.ones((n, 1))], axis=1) for n in (4000, 500)]
        scale = [np.sqrt(w / (n * v)) for w, n, v in zip(weights, (4000, 500), (va, vb), strict=True)]
        stacked = np.concatenate([s * r for s, r in zip(scale, rows, strict=True)])
        goals = np.concatenate([scale[0] * (x[0] @ first), scale[1] * 1000 * (x[0, :500] @ second)])
        wanted, *_ = np.linalg.lstsq(stacked, goals, rcond=None)
        np.testing.assert_allclose(solution, wanted, atol=1e-6 * np.abs(wanted).max())


def test_a_strong_ridge_keeps_the_prior_but_fits_the_bias():
    generator = np.random.default_rng(0)
    inputs, prior = generator.standard_normal((1, 300, 4)), generator.standard_normal((1, 5, 3))
    targets = inputs[0] @ prior[0][:-1] + 7
    solution = solve_least_squares([regression(inputs, targets)], prior, [1.0], ridge=1e6)[0]
    np.testing.assert_allclose(solution[:-1], prior[0][:-1], atol=1e-4)
    np.testing.assert_allclose(solution[-1], 7, atol=1e-3)


def test_inputs_that_never_vary_do_not_break_the_solution():
    inputs, targets = np.zeros((1, 50, 3)), np.full((50, 2), 4.0)
    solution = solve_least_squares([regression(inputs, targets)], np.ones((1, 4, 2)), [1.0])[0]
    np.testing.assert_allclose(solution[:-1], 1)
    np.testing.assert_allclose(solution[-1], 4, rtol=1e-6)


def test_repair_matches_mean_and_deviation():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((2, 1000, 4)) + 1
    current = generator.standard_normal((2, 5, 3))
    goals = [generator.standard_normal((1000, 6)) * 3 + 5, generator.standard_normal((1000, 6)) * 0.5 - 2]
    repaired = solve_repair([regression(x, goal) for goal in goals], current)
    for group in range(2):
        rows = np.concatenate([x[group], np.ones((1000, 1))], axis=1)
        columns = slice(3 * group, 3 * group + 3)
        made = rows @ repaired[group]
        np.testing.assert_allclose(made.mean(0), np.mean([g[:, columns].mean(0) for g in goals], axis=0), atol=1e-8)
        np.testing.assert_allclose(made.std(0), np.mean([g[:, columns].std(0) for g in goals], axis=0), atol=1e-8)
        before = rows @ current[group]
        np.testing.assert_allclose(  # only scale and shift have changed
            np.corrcoef(made.T, before.T)[:3, 3:].diagonal(), 1, atol=1e-8
        )


def test_repair_leaves_a_constant_channel_without_scale():
    x, current = np.ones((1, 20, 2)), np.ones((1, 3, 1))
    repaired = solve_repair([regression(x, np.linspace(0, 1, 20)[:, None])], current)
    np.testing.assert_allclose(np.ones((1, 3)) @ repaired[0], 0.5)


# --- samples and streams ----------------------------------------------------------------------------------------------


@dataclass
class Random:
    """Normal random inputs, the same at every pass."""

    shape: tuple[int, ...]
    count: int = 256
    name: str = "x"
    seed: int = 0

    def batches(self, size):
        data = np.random.default_rng(self.seed).standard_normal((self.count, *self.shape)).astype(np.float32)
        for start in range(0, self.count, size):
            yield {self.name: data[start : start + size]}


def test_stream_and_store_agree_with_onnxruntime(tmp_path):
    model = chain().model()
    samples = Random((3, 10, 10), count=20)
    tap = find_layers(model)[1].pre_activation.name
    end = model.graph.outputs[0].name
    (whole,) = samples.batches(20)
    names = [tap, "x", end]
    streamed = list(stream(model, samples, names, threads=1, size=8))
    assert [len(batch[end]) for batch in streamed] == [8, 8, 4]
    assert all(list(batch) == names for batch in streamed)
    np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in streamed]), whole["x"])
    wanted = execute(model, whole)[end]
    np.testing.assert_allclose(np.concatenate([batch[end] for batch in streamed]), wanted, rtol=1e-4, atol=1e-5)

    kept = Renamed(store(model, samples, [tap, end], tmp_path / "values", threads=1), {tap: "arriving"})
    again = list(kept.batches(8))
    assert [list(batch) for batch in again] == [["arriving"]] * 3
    for batch, values in zip(again, streamed, strict=True):
        np.testing.assert_allclose(batch["arriving"], values[tap], rtol=1e-4, atol=1e-5)


# --- the walk ---------------------------------------------------------------------------------------------------------


def computed(model: oir.Model) -> list[str]:
    return [v.name or "" for v in model.graph.inputs] + [v.name or "" for node in model.graph for v in node.outputs]


def prepared(net: Net) -> oir.Model:
    model = net.model()
    FoldBatchNorm()(model)
    EnsureBiases()(model)
    return model


def teacher_of(model: oir.Model, samples: Random, **more) -> Teacher:
    return Teacher(model, samples, samples, samples.count, {name: name for name in computed(model)}, **more)


def least_squares(ridge: float):
    def solve(layer: Layer, statistics: Sequence[Regression], current: np.ndarray) -> np.ndarray:
        return solve_least_squares(statistics, current, [1.0] * len(statistics), ridge)

    return solve


def disturb(model: oir.Model, number: int, scale: float = 0.3) -> None:
    weight = find_layers(model)[number].weight
    array = get_array(weight)
    noise = np.random.default_rng(0).standard_normal(array.shape)
    set_array(weight, array + scale * array.std() * noise)


def error(teacher: oir.Model, student: oir.Model, samples: Random) -> float:
    """On inputs that the fit has not seen."""
    (fresh,) = Random(samples.shape, 64, seed=99).batches(64)
    wanted, got = execute(teacher, fresh), execute(student, fresh)
    return max(relative_error(wanted[name], got[name]) for name in wanted)


NETS = {"chain": (chain, (3, 10, 10)), "residual": (residual, (3, 10, 10)), "dense": (dense, (6,))}


@pytest.mark.parametrize("cuts", [False, True], ids=["whole", "cut by cut"])
@pytest.mark.parametrize("name", NETS)
def test_a_disturbed_layer_is_restored(name, cuts):
    build, shape = NETS[name]
    teacher, samples = prepared(build()), Random(shape)
    student = teacher.clone()
    disturb(student, 1)
    before = error(teacher, student, samples)
    places = [unit.cut for unit in find_units(student)] if cuts else []
    done: list[str] = []
    Refit({"t": teacher_of(teacher, samples)}, places, least_squares(1e-4), threads=1, progress=done.append)(student)
    assert sorted(done) == sorted(layer.name for layer in find_layers(student))
    assert before > 0.02
    assert error(teacher, student, samples) < before / 10


@pytest.mark.parametrize("name", NETS)
def test_the_teachers_own_weights_stay_put(name):
    build, shape = NETS[name]
    teacher, samples = prepared(build()), Random(shape)
    student = teacher.clone()
    Refit({"t": teacher_of(teacher, samples)}, [], least_squares(1e-2), threads=1)(student)
    for name, value in student.graph.initializers.items():
        own = get_array(teacher.graph.initializers[name])
        np.testing.assert_allclose(get_array(value), own, atol=1e-3 * max(np.abs(own).max(), 1e-2))
    assert error(teacher, student, samples) < 1e-3


def test_a_branch_makes_up_for_its_skip():
    """With compensation the block's sum comes closer to the teacher's although the skip is wrong."""
    teacher, samples = prepared(residual()), Random((3, 10, 10))
    end = find_units(teacher)[1].cut
    errors = {}
    for compensate in (True, False):
        student = teacher.clone()
        first = find_layers(student)[0]
        set_array(first.weight, get_array(first.weight) * 0.5)

        def keep_first(layer, statistics, current, first=first.name):
            return current if layer.name == first else solve_least_squares(statistics, current, [1.0], 1e-4)

        Refit({"t": teacher_of(teacher, samples)}, [], keep_first, compensate=compensate, threads=1)(student)
        values = [np.concatenate([b[end] for b in stream(m, samples, [end], threads=1)]) for m in (teacher, student)]
        errors[compensate] = np.linalg.norm(values[0] - values[1]) / np.linalg.norm(values[0])
    assert errors[True] < 0.8 * errors[False]


def test_a_teacher_in_another_channel_order_and_scale():
    """The teacher's channels are permuted and scaled; told so, the fit leaves the student's weights as they are."""
    student, samples = prepared(dense()), Random((6,))
    teacher = student.clone()
    spaces = find_spaces(teacher).permutable()
    generator = np.random.default_rng(0)
    permutations = {space.name: generator.permutation(space.size) for space in spaces}
    Permute(permutations, {space.name: space for space in spaces})(teacher)
    orders = {slots.name: np.argsort(permutations[s.name]) for s in spaces for slots in s.values}
    wanted = {name: get_array(value).copy() for name, value in student.graph.initializers.items()}
    Refit({"t": teacher_of(teacher, samples, orders=orders)}, [], least_squares(1e-2), threads=1)(student)
    for name, array in wanted.items():
        np.testing.assert_allclose(get_array(student.graph.initializers[name]), array, atol=1e-3)

    first = find_layers(student)[0]
    scales = {first.linear.name: np.full(first.out_channels, 2, np.float32)}
    only_first = student.clone()
    Refit({"t": teacher_of(teacher, samples, orders=orders, scales=scales)}, [], least_squares(1e-6), threads=1)(
        only_first
    )
    doubled = get_array(only_first.graph.initializers[first.weight.name])
    np.testing.assert_allclose(doubled, 2 * wanted[first.weight.name], atol=1e-3)


def test_two_teachers_meet_in_the_middle():
    first, second, samples = prepared(dense(seed=1)), prepared(dense(seed=2)), Random((6,))
    student = first.clone()
    Refit({"a": teacher_of(first, samples), "b": teacher_of(second, samples)}, [], least_squares(1e-6), threads=1)(
        student
    )
    layers = [find_layers(model)[0] for model in (first, second, student)]
    a, b, merged = (get_array(layer.weight) for layer in layers)
    (inputs,) = samples.batches(samples.count)
    va, vb = (float((inputs["x"] @ (w.T if layers[0].transposed else w)).var(0).mean()) for w in (a, b))
    np.testing.assert_allclose(merged, (a / va + b / vb) / (1 / va + 1 / vb), atol=1e-2)


def test_the_walk_is_deterministic():
    teacher, samples = prepared(chain()), Random((3, 10, 10))
    results = []
    for _ in range(2):
        student = teacher.clone()
        disturb(student, 1)
        Refit({"t": teacher_of(teacher, samples)}, [], least_squares(1e-2), seed=5, threads=1)(student)
        results.append({name: get_array(value).tobytes() for name, value in student.graph.initializers.items()})
    assert results[0] == results[1]


@pytest.mark.parametrize("cuts", [False, True], ids=["whole", "cut by cut"])
def test_teachers_that_share_samples_cost_one_gram_and_change_nothing(cuts):
    first, second, samples = prepared(chain(seed=1)), prepared(chain(seed=2)), Random((3, 10, 10))
    weights, shared = [], []
    for again in (samples, Random((3, 10, 10))):
        student = first.clone()
        teachers = {"a": teacher_of(first, samples), "b": replace(teacher_of(second, samples), student_samples=again)}

        def solve(layer, statistics, current):
            shared.append(statistics[0].gram is statistics[1].gram)
            return solve_least_squares(statistics, current, [1.0, 2.0], 1e-2)

        places = [unit.cut for unit in find_units(student)] if cuts else []
        Refit(teachers, places, solve, threads=1)(student)
        weights.append({name: get_array(value) for name, value in student.graph.initializers.items()})
    half = len(shared) // 2
    assert all(shared[:half]) and not any(shared[half:])
    for name, array in weights[0].items():
        np.testing.assert_allclose(array, weights[1][name], atol=1e-4 * max(np.abs(array).max(), 1e-2))


def test_batches_shrink_until_they_fit_and_change_no_value(monkeypatch):
    model, samples = chain().model(), Random((3, 10, 10), count=50)
    tap = find_layers(model)[1].pre_activation.name
    sizes, values = [], []
    for memory in (10**9, 200_000, 1):
        monkeypatch.setattr(activations, "MEMORY", memory)
        batches = [batch[tap] for (batch,) in lockstep((model, samples, [tap]), threads=1)]
        sizes.append(len(batches[0]))
        values.append(np.concatenate(batches))
    assert sizes[0] == 50 and sizes[2] == 1
    assert 1 < sizes[1] < 50
    for own in values[1:]:
        np.testing.assert_allclose(own, values[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_disturbed_real_network_is_restored(shared):
    teacher = load(shared("resnet8_cifar10"))
    FoldBatchNorm()(teacher)
    EnsureBiases()(teacher)
    samples = Random((3, 32, 32), count=512, name=teacher.graph.inputs[0].name)
    student = teacher.clone()
    disturb(student, 3, scale=1.0)
    (fresh,) = Random((3, 32, 32), 64, samples.name, seed=99).batches(64)
    end = teacher.graph.outputs[0].name
    wanted = execute(teacher, fresh)[end]
    before = relative_error(wanted, execute(student, fresh)[end])
    cuts = [unit.cut for unit in find_units(student)]
    Refit({"t": teacher_of(teacher, samples)}, cuts, least_squares(1e-4), threads=2)(student)
    assert relative_error(wanted, execute(student, fresh)[end]) < before / 10
