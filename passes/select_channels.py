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

_TINY = 1e-9
"""A residual variance below this share of the variance is rounding."""
_ROUNDS = 64
"""Wide spaces are chosen in so many rounds of several channels each."""
_POOL = 4
"""In a round, exact greedy steps among so many times the channels that it chooses."""


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
    total = np.zeros((len(chosen), len(readings[0].covariance)))
    for reading in readings:
        total += reading.covariance[chosen] / max(float(np.trace(reading.covariance)), 1e-30)
    inner = total[:, chosen]
    ridge = 1e-6 * max(float(np.trace(inner)) / len(inner), 1e-30)
    np.einsum("cc->c", inner)[:] += ridge
    return cho_solve(cho_factor(inner, overwrite_a=True), total, overwrite_b=True).T


class _State:
    """What the channels chosen so far leave open at one place."""

    def __init__(self, reading: Reading, count: int):
        self._full = reading.covariance
        self._diagonal = np.diag(reading.covariance).copy()
        self._least = _TINY * self._diagonal + 1e-30
        self._left = self._diagonal.copy()
        self._room = np.empty((len(self._full), count), order="F")
        self._taken = 0
        self._seen = reading.covariance @ reading.root
        """K_res L"""

    @property
    def _factor(self) -> np.ndarray:
        """G with K_res = K - G G'."""
        return self._room[:, : self._taken]

    def scores(self) -> np.ndarray:
        """[n] what each channel would explain."""
        return _score(self._seen, self._left, self._least)

    def part(self, pool: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """K_res and K_res L of the pool's channels, and the least variance of each."""
        inner = self._full[np.ix_(pool, pool)] - self._factor[pool] @ self._factor[pool].T
        return inner, self._seen[pool], self._least[pool]

    def take(self, channels: Sequence[int]) -> None:
        """Take what `channels` explain out of the residual."""
        residual = self._full[channels].T - self._factor @ self._factor[channels].T
        columns: list[np.ndarray] = []
        kept: list[int] = []
        for channel, column in zip(channels, residual.T, strict=True):
            for other in columns:
                column = column - other * other[channel]
            if column[channel] > self._least[channel]:
                columns.append(column / np.sqrt(column[channel]))
                kept.append(channel)
        if not columns:
            return
        block = np.stack(columns, axis=1)
        # K_res L of the block by its own channels: (K_res L)[kept] = G_b[kept] G_b' L, and G_b[kept] is triangular
        self._seen -= block @ solve_triangular(block[kept], self._seen[kept], lower=True)
        self._left = np.maximum(self._left - (block**2).sum(1), 0)
        self._room[:, self._taken : self._taken + len(columns)] = block
        self._taken += len(columns)


def _greedy(parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], count: int) -> list[int]:
    """Exact greedy steps within a pool: places in it."""
    residuals = [(inner.copy(), seen.copy(), least) for inner, seen, least in parts]
    chosen: list[int] = []
    for _ in range(min(count, len(parts[0][0]))):
        score = np.sum([_score(seen, np.diag(inner), least) for inner, seen, least in residuals], axis=0)
        score[chosen] = -1
        best = int(score.argmax())
        if score[best] <= 0:  # the pool has no more to say; what lies outside it may have
            break
        chosen.append(best)
        for inner, seen, least in residuals:
            if inner[best, best] > least[best]:
                share = inner[:, best] / inner[best, best]
                seen -= np.outer(share, seen[best])
                inner -= np.outer(share, inner[best])
    return chosen


def _score(seen: np.ndarray, left: np.ndarray, least: np.ndarray) -> np.ndarray:
    alive = left > least
    return np.where(alive, np.einsum("cr,cr->c", seen, seen) / np.where(alive, left, 1.0), 0.0)
