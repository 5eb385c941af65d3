"""The weights that tasks share, each with its own stream: the solutions and the pairing of neurons."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxmerge.passes.mtz import functional_difference, solve_hessian
from onnxmerge.passes.shared_weights import (
    differences,
    masks,
    pair_by_assignment,
    pair_greedily,
    share_by_hessian,
    share_least_squares,
)
from onnxmerge.runtime.statistics import Regression

# --- solutions --------------------------------------------------------------------------------------------------------


def random_task(seed: int, fan_in: int = 6, outputs: int = 4, groups: int = 1, rows: int = 300) -> tuple:
    """Inputs with a mean, targets with noise, their statistics, and weights [groups, fan in + 1, outputs]."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((groups, rows, fan_in)) @ generator.standard_normal((fan_in, fan_in)) + 1
    weights = generator.standard_normal((groups, fan_in + 1, outputs))
    z = x @ weights[:, :-1] + weights[:, -1:] + 0.1 * generator.standard_normal((groups, rows, outputs))
    statistics = Regression()
    statistics.update(x, z.transpose(1, 0, 2).reshape(rows, -1))
    return x, z, statistics, weights


def rows_shared(*rows: int, fan_in: int = 6) -> np.ndarray:
    found = np.zeros(fan_in + 1, bool)
    found[list(rows)] = True
    return found


@settings(max_examples=40)
@given(
    st.lists(st.booleans(), min_size=7, max_size=7),
    st.lists(st.floats(0.1, 9), min_size=1, max_size=3),
    st.integers(0, 9),
)
def test_least_squares_is_the_minimum_of_what_it_says(shared, alphas, seed):
    """The joint problem of all tasks written out as one large least-squares problem."""
    shared, count = np.array(shared), len(alphas)
    tasks = [random_task(seed + 100 * number) for number in range(count)]
    priors = [weights + 0.3 for *_, weights in tasks]
    found = share_least_squares([task[2] for task in tasks], priors, shared, alphas, ridge=1e-2)
    blocks, goals = [], []
    size = shared.sum() + count * (~shared).sum()
    grams = []
    for number, (x, z, statistics, _) in enumerate(tasks):
        ones = np.concatenate([x[0], np.ones((len(x[0]), 1))], axis=1)
        factor = alphas[number] / (statistics.rows * statistics.target_variance().mean())
        block = np.zeros((len(ones), size))
        block[:, : shared.sum()] = ones[:, shared]
        start = shared.sum() + number * (~shared).sum()
        block[:, start : start + (~shared).sum()] = ones[:, ~shared]
        blocks.append(np.sqrt(factor) * block)
        goals.append(np.sqrt(factor) * z[0])
        grams.append(factor * ones.T @ ones)

    def pull(gram: np.ndarray) -> np.ndarray:
        found = np.full(len(gram), 1e-2 * gram.diagonal()[:-1].mean())
        found[-1] = 1e-9 * gram[-1, -1]
        return found

    ridges = [pull(sum(grams))[shared], *(pull(gram)[~shared] for gram in grams)]
    towards = [np.average(priors, axis=0, weights=alphas)[0][shared], *(prior[0][~shared] for prior in priors)]
    blocks.append(np.diag(np.sqrt(np.concatenate(ridges))))
    goals.append(np.sqrt(np.concatenate(ridges))[:, None] * np.concatenate(towards))
    wanted = np.linalg.lstsq(np.concatenate(blocks), np.concatenate(goals), rcond=None)[0]
    for number, own in enumerate(found):
        start = shared.sum() + number * (~shared).sum()
        np.testing.assert_allclose(own[0][shared], wanted[: shared.sum()], atol=1e-6)
        np.testing.assert_allclose(own[0][~shared], wanted[start : start + (~shared).sum()], atol=1e-6)


@pytest.mark.parametrize("alphas", [(1.0, 1.0), (0.8, 0.2), (1.0, 1.0, 4.0)])
def test_mtz_is_equations_10_and_11(alphas):
    """With the bias shared the moments are plain; free, it takes the mean out of them. Private rows stay."""
    tasks = [random_task(seed) for seed in range(len(alphas))]
    statistics, current = [task[2] for task in tasks], [task[3] for task in tasks]
    everything = np.ones(7, bool)
    found = share_by_hessian(statistics, current, everything, alphas)
    wanted = solve_hessian([own.gram / own.rows for own in statistics], current, alphas)
    for own in found:
        np.testing.assert_allclose(own, wanted, atol=1e-4)
    some = rows_shared(0, 2, 5)
    found = share_by_hessian(statistics, current, some, alphas)
    moments = [np.cov(task[0][0][:, [0, 2, 5]].T, bias=True)[None] for task in tasks]
    wanted = solve_hessian(moments, [own[:, [0, 2, 5]] for own in current], alphas)
    for (x, *_), own, before in zip(tasks, found, current, strict=True):
        np.testing.assert_allclose(own[:, [0, 2, 5]], wanted, atol=1e-4)
        np.testing.assert_array_equal(own[:, [1, 3, 4]], before[:, [1, 3, 4]])
        means = [(x[0] @ w[0][:-1] + w[0][-1]).mean(0) for w in (own, before)]
        np.testing.assert_allclose(*means, atol=1e-4)


def test_equal_networks_are_left_alone():
    *_, statistics, weights = random_task(0, groups=2)
    others = random_task(1, groups=2)[2]
    for rule in (share_least_squares, share_by_hessian):
        exact = [
            Regression(own.rows, own.gram, own.gram @ weights, own.target_sum, own.target_square + own.rows)
            for own in (statistics, others)
        ]
        for own in rule(exact, [weights, weights], rows_shared(0, 1, 2, 3, 4, 5), [1.0, 1.0]):
            np.testing.assert_allclose(own, weights, atol=1e-6)


def test_of_two_masks_that_with_more_ones_is_kept():
    tasks = [random_task(seed, outputs=2) for seed in range(2)]
    current = [task[3] for task in tasks]
    current[0][0, [0, 1], 0] = 0
    current[1][0, [2], 0] = 0
    current[0][0, [3, 4, 5], 1] = 0
    current[1][0, [5], 1] = 0  # this row is private
    shared = rows_shared(0, 1, 2, 3, 4)
    free = masks(current, shared)
    for task in range(2):
        assert free[task][0][:, 0].tolist() == [True, True, False, True, True, True, True]
        assert free[task][0][:, 1].tolist() == [True, True, True, True, True, False, True]
    for rule in (share_least_squares, share_by_hessian):
        found = rule([task[2] for task in tasks], current, shared, [1.0, 1.0])
        assert all(((own != 0) == mask).all() for own, mask in zip(found, free, strict=True))
        np.testing.assert_array_equal(found[0][0][:5], found[1][0][:5])
    # on the free entries it is the least change of what the networks' own weights make: free in it are w and two biases
    x = [task[0][0] for task in tasks]
    rows = [np.zeros((300, 6)) for _ in tasks]
    for number, block in enumerate(rows):
        block[:, :4], block[:, 4 + number] = x[number][:, [0, 1, 3, 4]], 1
    goals = [inputs[:, :5] @ own[0][:5, 0] + own[0][6, 0] for inputs, own in zip(x, current, strict=True)]
    wanted = np.linalg.lstsq(np.concatenate(rows), np.concatenate(goals), rcond=None)[0]
    np.testing.assert_allclose(found[0][0][[0, 1, 3, 4, 6], 0], wanted[:5], atol=1e-3)


# --- pairing ----------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_cheapest_pair_first_and_assignment_the_least_sum():
    cost = np.array([[1.0, 2.0], [2.0, 9.0]])  # [theirs, ours]
    assert pair_greedily(cost, 2).tolist() == [0, 1]
    assert pair_by_assignment(cost, 2).tolist() == [1, 0]
    assert pair_by_assignment(cost, 1).tolist() == [0, 1]


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(0, 5), st.integers(0, 99))
def test_no_other_pairs_are_cheaper(size, count, seed):
    count = min(count, size)
    cost = np.random.default_rng(seed).random((size, size))
    for pair in (pair_greedily, pair_by_assignment):
        assert sorted(pair(cost, count)) == list(range(size))
    order = pair_by_assignment(cost, count)
    found = np.sort(cost[order, range(size)])[:count].sum()
    least = min(np.sort(cost[list(other), range(size)])[:count].sum() for other in permutations(range(size)))
    assert found == pytest.approx(least)


def test_differences_are_mtzs_of_what_is_shared():
    one, two = random_task(0), random_task(1)
    statistics, current = [one[2], two[2]], [one[3], two[3]]
    (found,) = differences(statistics, current, rows_shared(0, 1, 3), [0.7, 0.3])
    moments = [np.cov(task[0][0][:, [0, 1, 3]].T, bias=True) for task in (one, two)]
    wanted = functional_difference(moments, *(own[0][[0, 1, 3]] for own in current), [0.7, 0.3])
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    (nothing,) = differences(statistics, current, rows_shared(6), [1.0, 1.0])
    assert (nothing == 0).all()
