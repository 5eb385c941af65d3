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

from onnxmerge.runtime.statistics import Regression

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
    gram = np.zeros_like(seen[0][0].gram)
    cross = np.zeros_like(seen[0][0].cross)
    for task, weight in seen:
        variance = float(task.target_variance().mean())
        factor = weight / (task.rows * max(variance, 1e-12))
        gram += factor * task.gram
        cross += factor * task.cross
    fan_in = gram.shape[1] - 1
    solution = np.empty_like(cross)
    for group in range(len(gram)):
        scale = float(np.trace(gram[group][:fan_in, :fan_in])) / max(fan_in, 1)
        pull = np.full(fan_in + 1, ridge * max(scale, 1e-12))
        pull[-1] = 1e-9 * gram[group][-1, -1]
        solution[group] = np.linalg.solve(gram[group] + np.diag(pull), cross[group] + pull[:, None] * prior[group])
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
