"""Streamed statistics of activations: sums are kept in float64, activations are dropped batch by batch."""

from dataclasses import dataclass, field

import numpy as np
from scipy.linalg.blas import dgemm, dsyrk

_TILE = 256
"""Rows of a matrix that are mirrored at a time."""
_PANEL = 512
"""Rows of a Gram matrix that are added to at a time."""


@dataclass
class PairStatistics:
    """Second moments of two sets of channels seen on the same inputs: `a` [rows, p] and `b` [rows, q].

    Attributes:
        within: keep the products inside each set, `aa` and `bb`, too; only `cka` needs them.
    """

    within: bool = True
    rows: int = 0
    sum_a: np.ndarray = field(default_factory=lambda: np.zeros(0))
    sum_b: np.ndarray = field(default_factory=lambda: np.zeros(0))
    square_a: np.ndarray = field(default_factory=lambda: np.zeros(0))
    square_b: np.ndarray = field(default_factory=lambda: np.zeros(0))
    aa: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    bb: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    ab: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    def update(self, a: np.ndarray, b: np.ndarray) -> None:
        """Add a batch of rows."""
        a, b = a.astype(np.float64), b.astype(np.float64)  # float32 products drown channels far from zero mean
        if self.rows == 0:
            p, q = a.shape[1], b.shape[1]
            self.sum_a, self.sum_b, self.square_a, self.square_b = np.zeros(p), np.zeros(q), np.zeros(p), np.zeros(q)
            self.ab = np.zeros((p, q))
            if self.within:
                self.aa, self.bb = np.zeros((p, p)), np.zeros((q, q))
        self.rows += len(a)
        self.sum_a += a.sum(0)
        self.sum_b += b.sum(0)
        self.square_a += np.einsum("rp,rp->p", a, a)
        self.square_b += np.einsum("rq,rq->q", b, b)
        self.ab = _plus_product(self.ab, a, b)
        if self.within:
            self.aa, self.bb = _plus_product(self.aa, a, a), _plus_product(self.bb, b, b)

    def covariance(self) -> np.ndarray:
        """[p, q] cross-covariance."""
        found = self.ab / self.rows
        found -= np.outer(self.sum_a / self.rows, self.sum_b / self.rows)
        return found

    def deviations(self) -> tuple[np.ndarray, np.ndarray]:
        """Standard deviations [p], [q]."""
        var_a = self.square_a / self.rows - (self.sum_a / self.rows) ** 2
        var_b = self.square_b / self.rows - (self.sum_b / self.rows) ** 2
        return np.sqrt(np.maximum(var_a, 0)), np.sqrt(np.maximum(var_b, 0))

    def correlation(self) -> np.ndarray:
        """[p, q] Pearson correlation; 0 where a channel is constant."""
        found, scale = self.covariance(), np.outer(*self.deviations())
        constant = scale <= 1e-12
        scale[constant], found[constant] = 1, 0
        found /= scale
        return found

    def cka(self) -> float:
        """Linear centred kernel alignment, |A'B|^2 / (|A'A| |B'B|) (Kornblith et al. 2019)."""
        mean_a, mean_b = self.sum_a / self.rows, self.sum_b / self.rows
        aa = self.aa / self.rows - np.outer(mean_a, mean_a)
        bb = self.bb / self.rows - np.outer(mean_b, mean_b)
        scale = np.linalg.norm(aa) * np.linalg.norm(bb)
        return float(np.linalg.norm(self.covariance()) ** 2 / scale) if scale > 0 else 0.0


def _plus_product(total: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """total + a' b in float64; in place, since a product of wide layers takes as long to store as to compute."""
    return dgemm(1.0, b.T, a.T, 1.0, total.T, trans_b=True, overwrite_c=True).T


@dataclass
class Moments:
    """Second moments of one set of channels: `x` [rows, p]."""

    rows: int = 0
    total: np.ndarray = field(default_factory=lambda: np.zeros(0))
    product: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    """The lower triangle of X'X."""

    def update(self, x: np.ndarray) -> None:
        """Add a batch of rows."""
        x = x.astype(np.float64)  # as for `PairStatistics`
        if self.rows == 0:
            self.total, self.product = np.zeros(x.shape[1]), np.zeros((x.shape[1],) * 2, order="F")
        self.rows += len(x)
        self.total += x.sum(0)
        self.product = dsyrk(1.0, x.T, 1.0, self.product, lower=True, overwrite_c=True)

    def into_covariance(self) -> np.ndarray:
        """[p, p] covariance, in the place of `product`, which is used up."""
        mean, found = self.total / self.rows, self.product
        for column, other in enumerate(mean):
            found[column:, column] /= self.rows
            found[column:, column] -= other * mean[column:]
        mirror(found)
        self.product = np.zeros((0, 0))
        return found


def mirror(matrix: np.ndarray) -> None:
    """Copy the lower triangle of a square matrix to the upper one, in place."""
    for start in range(0, len(matrix), _TILE):
        stop = start + _TILE
        tile = matrix[start:stop, start:stop]
        tile[:] = np.tril(tile) + np.tril(tile, -1).T
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T


@dataclass
class Regression:
    """Sufficient statistics of a linear layer's inputs and targets for one task, for each group g of the layer.

    With X [rows, f + 1] the layer's inputs (last column ones) and Z [rows, o] the targets, it keeps X'X, X'Z, the sum
    of Z and the sum of Z^2. Tasks whose inputs are the same ones share one `gram`.
    """

    rows: int = 0
    gram: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0)))
    cross: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0)))
    target_sum: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    target_square: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    def update(self, inputs: np.ndarray, targets: np.ndarray) -> None:
        """Add rows: inputs [g, rows, f] and targets [rows, g * o]."""
        groups, count, fan_in = inputs.shape
        outputs = targets.reshape(count, groups, -1).transpose(1, 0, 2)
        if self.rows == 0:
            self.gram = np.zeros((groups, fan_in + 1, fan_in + 1))
            self.cross = np.zeros((groups, fan_in + 1, outputs.shape[2]))
            self.target_sum = np.zeros((groups, outputs.shape[2]))
            self.target_square = np.zeros((groups, outputs.shape[2]))
        rows = np.concatenate([inputs, np.ones((groups, count, 1), inputs.dtype)], axis=2)
        self.rows += count
        for start in range(0, fan_in + 1, _PANEL):  # not at once, which would need a second matrix of that size
            some = slice(start, start + _PANEL)
            self.gram[:, some] += rows[:, :, some].transpose(0, 2, 1) @ rows
        self.cross += rows.transpose(0, 2, 1) @ outputs
        self.target_sum += outputs.sum(1, dtype=np.float64)
        self.target_square += (outputs.astype(np.float64) ** 2).sum(1)

    def split(self, tasks: int) -> list["Regression"]:
        """For targets [rows, g, tasks, o] that were added as one: the statistics of each task."""
        if self.rows == 0:
            return [Regression() for _ in range(tasks)]
        parts = (np.split(array, tasks, axis=-1) for array in (self.cross, self.target_sum, self.target_square))
        return [Regression(self.rows, self.gram, *own) for own in zip(*parts, strict=True)]

    def target_variance(self) -> np.ndarray:
        """[g, o] variance of each target."""
        return np.maximum(self.target_square / self.rows - (self.target_sum / self.rows) ** 2, 0)
