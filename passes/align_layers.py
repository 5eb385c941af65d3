"""Align layers across depth: which layer of a deeper network does the job of which layer of a shallower one.

With a cost C [m, n] between the m layers of the deeper and the n layers of the shallower network, the layer map is the
strictly increasing a: {0..n-1} -> {0..m-1} that minimises sum_j C[a(j), j] (Nguyen et al., CLAFusion, 2023, definition
1 and algorithm 1), found by dynamic programming in O(m n):

    R[i, j] = C[i, j] + min_{i' < i} R[i', j - 1],    a(n - 1) = argmin_i R[i, n - 1], and so on backwards.

The paper also ties the first layers together and the last ones (`ends`).
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from onnxmerge.errors import ModelError
from onnxmerge.ir.stages import Step
from onnxmerge.passes.align import matched
from onnxmerge.runtime.layer_grams import cka
from onnxmerge.runtime.statistics import PairStatistics


def layer_map(cost: np.ndarray, *, ends: bool = True) -> list[int]:
    """The strictly increasing map of least total cost from the columns of `cost` to its rows.

    Args:
        cost: [m, n], m >= n, finite; rows are the layers of the deeper network.
        ends: map the first column to the first row and the last to the last; a single column goes to the first row.

    Returns:
        For each column its row. Of several best maps the one with the smallest rows (there is one that is smallest
        everywhere).

    Raises:
        ValueError: m < n, or a cost is not finite.
    """
    rows, columns = cost.shape
    if rows < columns:
        raise ValueError(f"the deeper network must have at least as many layers, not {rows} for {columns}")
    if not np.isfinite(cost).all():
        raise ValueError("a cost is not finite")
    if not ends or columns == 0:
        return _cheapest(cost)
    if columns == 1:
        return [0]
    return [0, *(1 + row for row in _cheapest(cost[1:-1, 1:-1])), rows - 1]


def _cheapest(cost: np.ndarray) -> list[int]:
    """The best increasing map without conditions on its ends."""
    rows, columns = cost.shape
    reached = np.empty((rows, columns))
    """Least total of the columns up to j when j goes to row i."""
    before = np.zeros(rows + 1)  # least total of the columns before j within the first i rows
    for column in range(columns):
        reached[:, column] = before[:-1] + cost[:, column]
        before = np.concatenate([[np.inf], np.minimum.accumulate(reached[:, column])])
    found: list[int] = []
    limit = rows
    for column in reversed(range(columns)):
        limit = int(np.argmin(reached[:limit, column]))
        found.append(limit)
    return found[::-1]


def map_by_groups(
    cost: np.ndarray, groups_a: Sequence[str], groups_b: Sequence[str], *, ends: bool = True
) -> list[tuple[int, int]]:
    """Layer maps inside each group that both networks have, from the network with fewer layers in it to the other.

    Args:
        cost: [m, n] between the layers of A and of B, either of which may be deeper.
        groups_a: the group of each layer of A (see `group_steps`).
        groups_b: the same for B.
        ends: see `layer_map`; holds for each group.

    Returns:
        Pairs (layer of A, layer of B) in the order of A.
    """
    pairs: list[tuple[int, int]] = []
    for group in dict.fromkeys(groups_a):
        rows = [i for i, own in enumerate(groups_a) if own == group]
        columns = [j for j, own in enumerate(groups_b) if own == group]
        inside = cost[np.ix_(rows, columns)]
        if len(rows) >= len(columns):
            found = layer_map(inside, ends=ends)
            pairs += [(rows[row], column) for row, column in zip(found, columns, strict=True)]
        else:
            found = layer_map(inside.T, ends=ends)
            pairs += [(row, columns[column]) for row, column in zip(rows, found, strict=True)]
    return sorted(pairs)


def group_steps(a: Sequence[Step], b: Sequence[Step]) -> tuple[list[str], list[str]]:
    """The group of each step of A and of B; only steps of one group are mapped to each other.

    Convolutions and dense layers are apart. Where both networks have the same row of stages of a kind (as many, blocks
    and single layers in the same places), each stage is a group ("conv 0", "conv 1", ...); otherwise, and where there
    is one stage only, the whole kind is ("dense").

    Raises:
        ModelError: the groups follow each other differently in the two networks, so that no map keeps the order.
    """
    staged = {kind for kind in ("conv", "dense") if len(row := stages(a, kind)) > 1 and row == stages(b, kind)}
    groups_a, groups_b = _labels(a, staged), _labels(b, staged)
    order = _runs(groups_a, groups_b)
    if order != _runs(groups_b, groups_a) or len(set(order)) < len(order):
        raise ModelError(
            "the two networks' convolutional and dense layers follow each other in different ways: "
            "no map of one's layers to the other's keeps their order"
        )
    return groups_a, groups_b


def stages(steps: Sequence[Step], kind: str) -> list[bool]:
    """For each stage of a kind whether it is made of blocks."""
    return list({step.stage: step.block for step in steps if step.kind == kind}.values())


def _labels(steps: Sequence[Step], staged: set[str]) -> list[str]:
    seen: dict[str, dict[int, int]] = {"conv": {}, "dense": {}}
    labels = []
    for step in steps:
        number = seen[step.kind].setdefault(step.stage, len(seen[step.kind]))
        labels.append(f"{step.kind} {number}" if step.kind in staged else step.kind)
    return labels


def _runs(groups: Sequence[str], others: Sequence[str]) -> list[str]:
    """The groups that both networks have in the order of the first, one entry for each run."""
    return [group for group, _ in groupby(group for group in groups if group in others)]


def cka_cost(grams_a: Sequence[np.ndarray], grams_b: Sequence[np.ndarray]) -> np.ndarray:
    """[m, n] 1 - linear CKA of centred pre-activations (equations 2 and 3), from Gram matrices over the same samples.

    A layer that is constant on the samples has CKA 0 with every other.
    """
    return 1 - np.array([[cka(first, second) for second in grams_b] for first in grams_a])


def width_cost(widths_a: Sequence[int], widths_b: Sequence[int]) -> np.ndarray:
    """[m, n] squared differences of the numbers of channels."""
    return np.subtract.outer(np.array(widths_a, float), np.array(widths_b, float)) ** 2


def order_cost(groups_a: Sequence[str], groups_b: Sequence[str]) -> np.ndarray:
    """[m, n] differences of the layers' places in their groups: the i-th stands for the i-th.

    The longest chain of heterogeneous model transfer (Wang et al. 2020), which CLAFusion's table 3 compares with.
    """
    return np.abs(np.subtract.outer(_ranks(groups_a), _ranks(groups_b))).astype(float)


def _ranks(groups: Sequence[str]) -> list[int]:
    return [list(groups[:place]).count(group) for place, group in enumerate(groups)]


def wasserstein_cost(means_a: Sequence[np.ndarray], means_b: Sequence[np.ndarray]) -> np.ndarray:
    """[m, n] squared 2-Wasserstein distances between layers seen as clouds of channels.

    With x_c [samples] the values of channel c (the mean over positions for each sample) less their mean, a layer is the
    uniform distribution over its points x_c / r with r^2 = mean_c |x_c|^2, and the distance of two points is
    |x - y|^2: neither widths, nor the number of samples, nor the scale of a layer matter, and 0 <= cost <= 4. A layer
    whose channels are constant costs 1 with every other, as with CKA.

    Args:
        means_a: for each layer of A its channels' values [samples, channels].
        means_b: the same for B, on the same samples.
    """
    clouds_a, clouds_b = [_cloud(means) for means in means_a], [_cloud(means) for means in means_b]
    return np.array([[_transport(first, second) for second in clouds_b] for first in clouds_a])


def _cloud(means: np.ndarray) -> np.ndarray | None:
    """[channels, samples]: the normalised points of a layer; None for a constant one."""
    points = means.T.astype(np.float64)
    energy = np.mean(points**2)
    points = points - points.mean(1, keepdims=True)
    spread = np.mean((points**2).sum(1))
    return points / np.sqrt(spread) if spread > 1e-12 * energy * points.shape[1] else None


def _transport(first: np.ndarray | None, second: np.ndarray | None) -> float:
    import ot  # takes its time, and only this cost needs it

    if first is None or second is None:
        return 1.0
    uniform = [np.full(len(points), 1 / len(points)) for points in (first, second)]
    return float(ot.emd2(*uniform, cdist(first, second, "sqeuclidean"), numItermax=1_000_000))


def channel_match(statistics: PairStatistics) -> float:
    """Mean correlation of matched channels under the best assignment of A's channels to as many of B's."""
    correlation = statistics.correlation()
    return matched(correlation, linear_sum_assignment(correlation, maximize=True)[1])
