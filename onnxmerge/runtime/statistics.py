"""Streamed statistics of activations: sums are kept in float64, activations are dropped batch by batch."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class PairStatistics:
    """Second moments of two sets of channels seen on the same inputs: `a` [rows, p] and `b` [rows, q]."""

    rows: int = 0
    sum_a: np.ndarray = field(default_factory=lambda: np.zeros(0))
    sum_b: np.ndarray = field(default_factory=lambda: np.zeros(0))
    aa: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    bb: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    ab: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    def update(self, a: np.ndarray, b: np.ndarray) -> None:
        """Add a batch of rows."""
        a, b = a.astype(np.float64), b.astype(np.float64)  # float32 products drown channels far from zero mean
        if self.rows == 0:
            p, q = a.shape[1], b.shape[1]
            self.sum_a, self.sum_b = np.zeros(p), np.zeros(q)
            self.aa, self.bb, self.ab = np.zeros((p, p)), np.zeros((q, q)), np.zeros((p, q))
        self.rows += len(a)
        self.sum_a += a.sum(0)
        self.sum_b += b.sum(0)
        self.aa += a.T @ a
        self.bb += b.T @ b
        self.ab += a.T @ b

    def covariance(self) -> np.ndarray:
        """[p, q] cross-covariance."""
        return self.ab / self.rows - np.outer(self.sum_a, self.sum_b) / self.rows**2

    def deviations(self) -> tuple[np.ndarray, np.ndarray]:
        """Standard deviations [p], [q]."""
        var_a = np.diag(self.aa) / self.rows - (self.sum_a / self.rows) ** 2
        var_b = np.diag(self.bb) / self.rows - (self.sum_b / self.rows) ** 2
        return np.sqrt(np.maximum(var_a, 0)), np.sqrt(np.maximum(var_b, 0))

    def correlation(self) -> np.ndarray:
        """[p, q] Pearson correlation; 0 where a channel is constant."""
        scale = np.outer(*self.deviations())
        return np.divide(self.covariance(), scale, out=np.zeros_like(scale), where=scale > 1e-12)

    def cka(self) -> float:
        """Linear centred kernel alignment, |A'B|^2 / (|A'A| |B'B|) (Kornblith et al. 2019)."""
        mean_a, mean_b = self.sum_a / self.rows, self.sum_b / self.rows
        aa = self.aa / self.rows - np.outer(mean_a, mean_a)
        bb = self.bb / self.rows - np.outer(mean_b, mean_b)
        scale = np.linalg.norm(aa) * np.linalg.norm(bb)
        return float(np.linalg.norm(self.covariance()) ** 2 / scale) if scale > 0 else 0.0


@dataclass
class Regression:
    """Sufficient statistics of a linear layer's inputs and targets for one task, for each group g of the layer.

    With X [rows, f + 1] the layer's inputs (last column ones) and Z [rows, o] the targets, it keeps X'X, X'Z, the sum
    of Z and the sum of Z^2.
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
        self.gram += rows.transpose(0, 2, 1) @ rows
        self.cross += rows.transpose(0, 2, 1) @ outputs
        self.target_sum += outputs.sum(1, dtype=np.float64)
        self.target_square += (outputs.astype(np.float64) ** 2).sum(1)

    def target_variance(self) -> np.ndarray:
        """[g, o] variance of each target."""
        return np.maximum(self.target_square / self.rows - (self.target_sum / self.rows) ** 2, 0)
