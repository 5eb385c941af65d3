"""Choose for a channel space the channels of several networks that say most about what all of them read there.

The networks' channels side by side are the union u of n channels. Where they are read, K [n, n] is the covariance of u
and M [n, n] = blockdiag(W_t W_t') the importance that each network t gives its own by the weights W_t that read them.
What can not be predicted linearly from chosen channels S costs tr(M K_res), K_res = K - K_S K_SS^-1 K_S'. Greedily, the
channel is added that lowers this most,

    |L' K_res[:, j]|^2 / K_res[j, j],    M = L L',

summed over the places where the space is read: a column subset selection (Farahat et al. 2011), as MTZ and ZipIt! ask
what may be shared, but free to leave channels out. What the networks would read of the channels left out is predicted
from those chosen, K_SS^-1 K_S.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.linalg.blas import dgemm

_TINY = 1e-9
"""A residual variance below this share of the variance is rounding."""
_ROUNDS = 64
"""Wide spaces are chosen in so many rounds of several channels each."""
_POOL = 4
"""In a round, exact greedy steps among so many times the channels that it chooses."""
_COLUMNS = 256
"""Columns of L that are multiplied at a time."""


@dataclass(frozen=True)
class Reading:
    """One place where a space is read."""

    covariance: np.ndarray
    """K [n, n]"""
    root: np.ndarray
    """L [n, r] with L L' = M"""


def select_channels(readings: Sequence[Reading], count: int) -> list[int]:
    """The numbers of `count` of the n channels, in the order in which they were chosen.

    Of two equal channels one is taken. Channels that add nothing come last, in order.

    Args:
        readings: at least one.
        count: at most n.
    """
    states = [_State(reading, count) for reading in readings]
    size = len(readings[0].covariance)
    chosen: list[int] = []
    step = max(1, count // _ROUNDS)
    while len(chosen) < count:
        score = np.sum([state.scores() for state in states], axis=0)
        score[chosen] = -1
        pool = np.argsort(-score, kind="stable")[: _POOL * step if step > 1 else 1]
        picked = _greedy([state.part(pool) for state in states], min(step, count - len(chosen)))
        found = [int(pool[place]) for place in picked if score[pool[place]] > 0]
        if not found:
            taken = set(chosen)
            return chosen + [channel for channel in range(size) if channel not in taken][: count - len(chosen)]
        for state in states:
            state.take(found)
        chosen += found
    return chosen


def predictions(readings: Sequence[Reading], chosen: Sequence[int]) -> np.ndarray:
    """[n, chosen]: every channel as a linear combination of the chosen ones, by the mean of the correlations."""
    total = np.zeros((len(chosen), len(readings[0].covariance)), order="F")
    for reading in readings:
        rows = reading.covariance[chosen]
        rows /= max(float(np.trace(reading.covariance)), 1e-30)
        total += rows
    inner = total[:, chosen]
    ridge = 1e-6 * max(float(np.trace(inner)) / len(inner), 1e-30)
    np.einsum("cc->c", inner)[:] += ridge
    return cho_solve(cho_factor(inner, overwrite_a=True), total, overwrite_b=True).T


class _State:
    """What the channels chosen so far leave open at one place."""

    def __init__(self, reading: Reading, count: int):
        self._full = reading.covariance
        self._left = np.diag(reading.covariance).copy()
        self._least = _TINY * self._left + 1e-30
        self._room = np.empty((len(self._full), count))
        self._taken = 0
        self._seen = _product(reading.covariance, reading.root)
        """K_res L"""

    @property
    def _factor(self) -> np.ndarray:
        """G with K_res = K - G G'."""
        return self._room[:, : self._taken]

    def scores(self) -> np.ndarray:
        """[n] what each channel would explain."""
        return _score(np.einsum("cr,cr->c", self._seen, self._seen), self._left, self._least)

    def part(self, pool: np.ndarray) -> "_Part":
        """What is open among the channels of a pool."""
        inner = self._full[np.ix_(pool, pool)] - self._factor[pool] @ self._factor[pool].T
        seen = self._seen[pool]
        return _Part(inner, seen @ seen.T, self._least[pool])

    def take(self, channels: Sequence[int]) -> None:
        """Take what `channels` explain out of the residual."""
        residual = (self._full[channels] - self._factor[channels] @ self._factor.T).T
        kept, triangle = _cholesky(residual[channels], self._least[channels])
        if not kept:
            return
        block = solve_triangular(triangle, residual[:, kept].T, lower=True).T
        # K_res L of the block by its own channels: (K_res L)[kept] = G_b[kept] G_b' L, and G_b[kept] is the triangle
        seen = solve_triangular(triangle, self._seen[[channels[place] for place in kept]], lower=True)
        self._seen = dgemm(-1.0, seen.T, block.T, 1.0, self._seen.T, overwrite_c=True).T
        self._left = np.maximum(self._left - np.einsum("cb,cb->c", block, block), 0)
        self._room[:, self._taken : self._taken + len(kept)] = block
        self._taken += len(kept)


@dataclass
class _Part:
    """What is open among some channels at one place."""

    inner: np.ndarray
    """K_res"""
    seen: np.ndarray
    """K_res M K_res"""
    least: np.ndarray

    def scores(self) -> np.ndarray:
        """What each channel would explain."""
        return _score(np.diag(self.seen), np.diag(self.inner), self.least)

    def take(self, channel: int) -> None:
        """Take what one channel explains out of the residual."""
        if self.inner[channel, channel] <= self.least[channel]:
            return
        share = self.inner[:, channel] / self.inner[channel, channel]
        self.inner -= np.outer(share, self.inner[channel])
        self.seen -= np.outer(share, self.seen[channel])
        self.seen -= np.outer(self.seen[:, channel], share)


def _greedy(parts: Sequence[_Part], count: int) -> list[int]:
    """Exact greedy steps within a pool: places in it. The parts are used up."""
    chosen: list[int] = []
    for _ in range(min(count, len(parts[0].inner))):
        score = np.sum([part.scores() for part in parts], axis=0)
        score[chosen] = -1
        best = int(score.argmax())
        if score[best] <= 0:  # the pool has no more to say; what lies outside it may have
            break
        chosen.append(best)
        for part in parts:
            part.take(best)
    return chosen


def _score(seen: np.ndarray, left: np.ndarray, least: np.ndarray) -> np.ndarray:
    alive = left > np.maximum(least, 0)
    return np.divide(np.maximum(seen, 0), left, out=np.zeros_like(left), where=alive)


def _cholesky(matrix: np.ndarray, least: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Which rows those before leave more than `least` of, and C, lower triangular: matrix[kept, kept] = C C'."""
    factor = np.zeros_like(matrix)
    kept: list[int] = []
    for row in range(len(matrix)):
        column = matrix[:, row] - factor[:, : len(kept)] @ factor[row, : len(kept)]
        if column[row] > least[row]:
            factor[:, len(kept)] = column / np.sqrt(column[row])
            kept.append(row)
    return kept, factor[kept, : len(kept)]


def _product(covariance: np.ndarray, root: np.ndarray) -> np.ndarray:
    """K L, passing over rows of L that are zero: those of one network where columns are the weights of another."""
    found = np.empty((len(covariance), root.shape[1]))
    for start in range(0, root.shape[1], _COLUMNS):
        columns = root[:, start : start + _COLUMNS]
        rows = np.flatnonzero(columns.any(axis=1))
        if len(rows):
            span = slice(rows[0], rows[-1] + 1)
            found[:, start : start + _COLUMNS] = covariance[:, span] @ columns[span].astype(covariance.dtype)
        else:
            found[:, start : start + _COLUMNS] = 0
    return found
