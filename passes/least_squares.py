"""Least squares for one layer: the weights that bring the merged network's own activations closest to the targets.

With X_t the layer's inputs on task t's samples (a column of ones for the bias), Z_t the targets, a_t the task's weight
and V_t the mean variance of its targets,

    W = argmin  sum_t a_t / (n_t V_t) |X_t W - Z_t|^2  +  lambda s |W - W_0|^2,

where W_0 is the prior (the aligned average, or the layer's own weights) and s the mean diagonal of the summed Gram
matrices. Dividing by V_t keeps the task with the larger activations from dominating. Source: PLeaS (Nasery et al. 2024)
and RegMean (Jin et al. 2023), here with the merged model's own inputs, so that errors made early are repaired later.
"""

from collections.abc import Sequence

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.linalg.blas import daxpy

from onnxmerge.runtime.statistics import Regression, mirror

RIDGE = 1e-2
"""Default lambda."""


def solve_least_squares(
    statistics: Sequence[Regression], prior: np.ndarray, weights: Sequence[float], ridge: float = RIDGE
) -> np.ndarray:
    """The minimiser for each group.

    Args:
        statistics: one for each task; those without rows count nothing.
        prior: [groups, fan in + 1, outputs], the bias in the last row; the bias is not pulled towards the prior.
        weights: a_t, one for each task.
        ridge: lambda.

    Returns:
        [groups, fan in + 1, outputs]
    """
    seen = [(task, weight) for task, weight in zip(statistics, weights, strict=True) if task.rows]
    factors = [weight / (task.rows * max(float(task.target_variance().mean()), 1e-12)) for task, weight in seen]
    gram, scale = _weighted_sum([task.gram for task, _ in seen], factors)
    fan_in = gram.shape[1] - 1
    solution = np.empty((len(gram), fan_in + 1, prior.shape[2]))
    for group in range(len(gram)):
        right = np.zeros(solution[group].shape)
        for factor, (task, _) in zip(factors, seen, strict=True):
            right += factor / scale * task.cross[group]
        diagonal = gram[group].diagonal()
        pull = np.full(fan_in + 1, ridge * max(float(diagonal[:-1].sum()) / max(fan_in, 1), 1e-12 / scale))
        pull[-1] = 1e-9 * diagonal[-1]
        right += pull[:, None] * prior[group]
        solution[group] = _solve(gram[group], pull, right)
    return solution


def _weighted_sum(grams: Sequence[np.ndarray], factors: Sequence[float]) -> tuple[np.ndarray, float]:
    """An array and a factor whose product is their sum. One matrix that all share is that array itself, not a copy."""
    shared: dict[int, float] = {}
    for gram, factor in zip(grams, factors, strict=True):
        shared[id(gram)] = shared.get(id(gram), 0.0) + factor
    if len(shared) == 1:
        return grams[0], shared[id(grams[0])]
    total = np.zeros_like(grams[0])
    for gram in grams:
        daxpy(gram.reshape(-1), total.reshape(-1), a=shared.pop(id(gram), 0.0))  # in place
    return total, 1.0


def _solve(gram: np.ndarray, pull: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The solution of (gram + diag(pull)) W = right for a symmetric matrix.

    It is factored in its own lower triangle, which is then restored from the upper one: wide layers have no room for
    another.
    """
    diagonal = gram.diagonal().copy()
    np.einsum("ff->f", gram)[:] += pull
    try:
        factor = cho_factor(gram.T, overwrite_a=True, check_finite=False)  # its upper triangle is our lower one
        return cho_solve(factor, right, overwrite_b=True, check_finite=False)
    except np.linalg.LinAlgError:  # not positive to rounding
        whole = np.triu(gram, 1)
        return np.linalg.solve(whole + whole.T + np.diag(diagonal + pull), right)
    finally:
        mirror(gram.T)
        np.einsum("ff->f", gram)[:] = diagonal


def solve_by_channel(
    statistics: Sequence[Regression],
    current: np.ndarray,
    weights: Sequence[float],
    taken: Sequence[np.ndarray],
    ridge: float = RIDGE,
) -> np.ndarray:
    """`solve_least_squares` for channels whose targets are those of some of the tasks only.

    Args:
        statistics: one for each task; those without rows count nothing.
        current: the prior; channels without any target keep it.
        weights: a_t, one for each task.
        taken: for each task [channels] whether a channel's target is (also) the task's.
        ridge: lambda.

    Returns:
        [groups, fan in + 1, outputs]
    """
    solution = np.array(current, np.float64)
    groups, _, outputs = solution.shape
    seen = [bool(task.rows) for task in statistics]
    owners = np.stack([own & known for own, known in zip(taken, seen, strict=True)]).reshape(-1, groups, outputs)
    for pattern in np.unique(owners.reshape(len(owners), -1), axis=1).T:
        if pattern.any():
            chosen = [number for number, own in enumerate(pattern) if own]
            parts = [statistics[number] for number in chosen], [weights[number] for number in chosen]
            found = solve_least_squares(parts[0], current, parts[1], ridge)
            same = (owners == pattern[:, None, None]).all(axis=0)
            solution = np.where(same[:, None, :], found, solution)
    return solution


def solve_repair(statistics: Sequence[Regression], current: np.ndarray) -> np.ndarray:
    """Rescale and shift each channel so that mean and standard deviation match the average of the tasks' targets.

    REPAIR (Jordan et al. 2023) folded into the weights, so that it needs no batch norm.

    Args:
        statistics: one for each task; those without rows count nothing.
        current: [groups, fan in + 1, outputs], the layer's weights with the bias in the last row.
    """
    statistics = [task for task in statistics if task.rows]
    rows = sum(task.rows for task in statistics)
    gram = np.sum([task.gram for task in statistics], axis=0) / rows
    target_mean = np.mean([task.target_sum / task.rows for task in statistics], axis=0)
    target_deviation = np.mean([np.sqrt(task.target_variance()) for task in statistics], axis=0)
    repaired = np.array(current)
    for group in range(len(current)):
        mean = gram[group][-1] @ current[group]
        square = np.einsum("fo,fg,go->o", current[group], gram[group], current[group])
        deviation = np.sqrt(np.maximum(square - mean**2, 0))
        ratio = np.divide(target_deviation[group], deviation, out=np.ones_like(deviation), where=deviation > 1e-8)
        repaired[group] = current[group] * ratio
        repaired[group][-1] += target_mean[group] - mean * ratio
    return repaired
