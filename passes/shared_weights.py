"""The weights of a layer that several tasks share while each keeps its own stream (approximate).

Task t's layer reads X_t and is to make Z_t. Of its unknowns, W is common to all tasks (the connections between shared
neurons) and P_t its own (the bias, the connections from its private inputs):

    min over W and all P_t  of  sum_t a_t |X_t,S W + X_t,P P_t - Z_t|^2 / n_t  +  ridge,

which is solved exactly by eliminating each P_t (the Schur complement of its part of X_t' X_t) before the sum.

*Least squares*: Z_t is what the original computes there, divided by its variance so that no task dominates, and the
ridge pulls W to the weighted mean of the tasks' weights and P_t to what it was (PLeaS, RegMean; see
`least_squares`).

*MTZ* (He, Zhou and Thiele 2018, eq. 6 to 11): Z_t is what the task's own weights make of X_t, the connections from
private inputs stay as they are, and the ridge is only what keeps the sum regular. Then W is `mtz.solve_hessian`, whose
Hessians are those left when the bias is free: the covariance of X_t. The bias takes up what W does to the mean.

The a_t say how much each task counts; for two tasks MTZ's alpha is a_1 / (a_1 + a_2) (eq. 5).

*Sparse weights* (MTZ, section 3.6): a connection that is zero stays absent. Of the masks of the neurons that become
one, that with more ones is kept, and the weights are solved on the free entries, for all neurons of one mask together.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from onnxmerge.passes.least_squares import RIDGE
from onnxmerge.passes.mtz import DAMPING, functional_difference
from onnxmerge.runtime.statistics import Regression


def share_least_squares(
    statistics: Sequence[Regression],
    current: Sequence[np.ndarray],
    shared: np.ndarray,
    weights: Sequence[float],
    ridge: float = RIDGE,
) -> list[np.ndarray]:
    """The tasks' weights towards their targets.

    Args:
        statistics: of each task: the merged network's own inputs, the original's outputs.
        current: the weights of each task [groups, fan in + 1, outputs] in one channel order, the bias last.
        shared: [fan in + 1] which rows all tasks have in common; none: each task is fitted alone.
        weights: a_t.
        ridge: lambda.

    Returns:
        [groups, fan in + 1, outputs] for each task; the shared rows are equal.
    """
    scales = [1 / max(float(task.target_variance().mean()), 1e-12) for task in statistics]
    return _share(statistics, current, shared, weights, scales, ridge)


def share_by_hessian(
    statistics: Sequence[Regression], current: Sequence[np.ndarray], shared: np.ndarray, weights: Sequence[float]
) -> list[np.ndarray]:
    """MTZ's update: least change of what the tasks' own weights make of the inputs; arguments as above."""
    kept = np.append(shared[:-1], True)
    own = []
    for task, before in zip(statistics, current, strict=True):
        gram = task.gram[:, kept][:, :, kept]
        own.append(replace(task, gram=gram, cross=gram @ before[:, kept]))
    scales = [1.0] * len(own)
    found = _share(own, [before[:, kept] for before in current], shared[kept], weights, scales, DAMPING)
    result = [before.copy() for before in current]
    for after, solution in zip(result, found, strict=True):
        after[:, kept] = solution
    return result


def masks(current: Sequence[np.ndarray], shared: np.ndarray) -> list[np.ndarray]:
    """For each task, which of its weights [groups, fan in + 1, outputs] are connections; biases always are."""
    found = [weights != 0 for weights in current]
    richest = np.argmax([mask[:, shared].sum(1) for mask in found], axis=0)
    common = np.take_along_axis(np.stack([mask[:, shared] for mask in found]), richest[None, :, None], axis=0)[0]
    for mask in found:
        mask[:, shared] = common
        mask[:, -1] = True
    return found


def _share(
    statistics: Sequence[Regression],
    current: Sequence[np.ndarray],
    shared: np.ndarray,
    weights: Sequence[float],
    scales: Sequence[float],
    ridge: float,
) -> list[np.ndarray]:
    found = [np.zeros(own.shape) for own in current]
    free = masks(current, shared)
    factors = [weight * scale / task.rows for weight, scale, task in zip(weights, scales, statistics, strict=True)]
    for group in range(len(current[0])):
        grams = [factor * task.gram[group] for factor, task in zip(factors, statistics, strict=True)]
        rights = [factor * task.cross[group] for factor, task in zip(factors, statistics, strict=True)]
        patterns = np.concatenate([mask[group] for mask in free])
        for pattern, columns in _alike(patterns):
            open_rows = pattern.reshape(len(current), -1)
            solutions = _solve(
                grams,
                [right[:, columns] for right in rights],
                [own[group][:, columns] for own in current],
                weights,
                shared,
                open_rows,
                ridge,
            )
            for own, solution in zip(found, solutions, strict=True):
                own[group][:, columns] = solution
    return found


def _alike(patterns: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The different columns, and for each where it stands."""
    different, number = np.unique(patterns, axis=1, return_inverse=True)
    return [(column, np.flatnonzero(number.ravel() == n)) for n, column in enumerate(different.T)]


def _solve(
    grams: Sequence[np.ndarray],
    rights: Sequence[np.ndarray],
    priors: Sequence[np.ndarray],
    weights: Sequence[float],
    shared: np.ndarray,
    free: np.ndarray,
    ridge: float,
) -> list[np.ndarray]:
    """[fan in + 1, outputs] for each task, of one group; `free` [tasks, fan in + 1] are the rows that exist."""
    common = np.flatnonzero(shared & free[0])
    prior = np.average(priors, axis=0, weights=weights)[common]
    pull = _pull(np.sum(grams, axis=0), ridge)[common]
    total, right = np.diag(pull), pull[:, None] * prior
    eliminated = []
    for gram, cross, own, rows in zip(grams, rights, priors, free, strict=True):
        private = np.flatnonzero(~shared & rows)
        pulled = _pull(gram, ridge)[private]
        inside = gram[np.ix_(private, private)] + np.diag(pulled)
        across = gram[np.ix_(private, common)]
        goal = cross[private] + pulled[:, None] * own[private]
        solved = np.linalg.solve(inside, np.concatenate([across, goal], axis=1))
        through, alone = solved[:, : len(common)], solved[:, len(common) :]
        total = total + gram[np.ix_(common, common)] - across.T @ through
        right = right + cross[common] - across.T @ alone
        eliminated.append((private, through, alone))
    common_weights = np.linalg.solve(total, right)
    found = [np.zeros(own.shape) for own in priors]
    for solution, (private, through, alone) in zip(found, eliminated, strict=True):
        solution[common] = common_weights
        solution[private] = alone - through @ common_weights
    return found


def _pull(gram: np.ndarray, ridge: float) -> np.ndarray:
    """The ridge of each row, a share of the mean diagonal; next to none on the bias."""
    diagonal = gram.diagonal()
    mean = float(diagonal[:-1].mean()) if len(diagonal) > 1 else 0.0
    pull = np.full(len(gram), ridge * (mean if mean > 0 else 1.0))
    pull[-1] = 1e-9 * diagonal[-1]
    return pull


def differences(
    statistics: Sequence[Regression], current: Sequence[np.ndarray], shared: np.ndarray, weights: Sequence[float]
) -> list[np.ndarray]:
    """MTZ's functional difference (eq. 12) of each other task's neurons and the first's, for a layer of one group.

    Args:
        statistics: of the layer's inputs, for each task.
        current: the weights of each task [1, fan in + 1, outputs].
        shared: [fan in + 1] which rows are shared inputs; only they count, and the bias, which is free, does not.
        weights: a_t.

    Returns:
        For each task but the first [its neurons, the first task's neurons]; without shared inputs all are 0.
    """
    rows = np.flatnonzero(shared[:-1])
    moments = [_covariance(task, rows) for task in statistics]
    ours, *others = (own[0][rows] for own in current)
    return [
        functional_difference([moments[0], moment], ours, theirs, (weights[0], weight))
        if len(rows)
        else np.zeros((theirs.shape[1], ours.shape[1]))
        for moment, theirs, weight in zip(moments[1:], others, weights[1:], strict=True)
    ]


def energies(
    statistics: Sequence[Regression], current: Sequence[np.ndarray], weights: Sequence[float]
) -> list[np.ndarray]:
    """For each task a_t / 2 times the variance of what a layer of one group makes, [outputs]; arguments as above.

    It is what removing a neuron would cost, so two neurons' functional difference is at most the sum of theirs.
    """
    found = []
    for task, own, weight in zip(statistics, current, weights, strict=True):
        rows = np.arange(own.shape[1] - 1)
        found.append(weight / 2 * np.einsum("fo,fo->o", own[0][rows], _covariance(task, rows) @ own[0][rows]))
    return found


def _covariance(task: Regression, rows: np.ndarray) -> np.ndarray:
    gram = task.gram[0] / task.rows
    mean = gram[-1][rows]
    return gram[np.ix_(rows, rows)] - np.outer(mean, mean)


def pair_greedily(cost: np.ndarray, count: int) -> np.ndarray:
    """For each neuron of ours one of theirs: the cheapest pair, then the cheapest of what is left (MTZ, algorithm 1).

    Args:
        cost: [theirs, ours]
        count: pairs that will be shared; they come first in any case.
    """
    order = np.empty(cost.shape[1], int)
    left = np.ones(cost.shape, bool)
    for place in np.argsort(cost, axis=None, kind="stable"):
        theirs, ours = np.unravel_index(place, cost.shape)
        if left[theirs, ours]:
            order[ours] = theirs
            left[theirs], left[:, ours] = False, False
    return order


def pair_by_assignment(cost: np.ndarray, count: int) -> np.ndarray:
    """For each neuron of ours one of theirs, so that the `count` cheapest pairs have the least sum of all such sets.

    The neurons that are left are paired among themselves, again with the least sum.

    Args:
        cost: [theirs, ours]
        count: pairs that will be shared.
    """
    size = len(cost)
    spare = size - count
    padded = np.zeros((size + spare, size + spare))  # a neuron that meets a spare one stays private
    padded[:size, :size] = cost
    padded[size:, size:] = 2 * cost.max(initial=0) * size + 1
    theirs, ours = linear_sum_assignment(padded)
    paired = (theirs < size) & (ours < size)
    order = np.full(size, -1)
    order[ours[paired]] = theirs[paired]
    left, free = np.flatnonzero(order < 0), np.setdiff1d(np.arange(size), order)
    rest, place = linear_sum_assignment(cost[np.ix_(free, left)])
    order[left[place]] = free[rest]
    return order
