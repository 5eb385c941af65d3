"""A shared subspace of the channels of several networks: one linear map on a space of their union.

Side by side the networks' channels in a space are the union u of n channels, before the nonlinearity f with which they
are read. The shared channels are s = Q u + c, few enough to be computed once. What the networks read is predicted from
them, f(u) ~ V' f(s) + v, and what is not predicted costs

    sum over places  E | L' (f(u) - V' f(s) - v) |^2,       M = L L' the importance of each channel (`importance`),

where a place is a value in which the space is read, and V, v are the best for it in closed form. Where nothing
nonlinear follows before the networks part, f is the identity, and the best Q are the leading eigenvectors of L' K L
(reduced-rank regression, Izenman 1975). Elsewhere Q and c are found by Adam from the better of two starts, these
eigenvectors and a greedy selection of channels (`select_channels`); for V is optimal, the gradient with V held fixed is
that of the whole (variable projection, Golub and Pereyra 1973).

A permutation (MTZ) and a selection are the special cases that mix nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxmerge.passes.select_channels import Reading, select_channels

_STEPS = 200
_BATCH, _ALL = 4096, 32768
"""Most rows in each step, of one sight and of all."""
_RATE = 3e-2
"""Of Adam, relative to the root mean square of Q."""
_CHECK = 50
"""Steps between looks at the held-out rows."""
_RIDGE = 1e-4
_HELD_OUT = 8
"""One row in so many is held out."""


@dataclass(frozen=True)
class Bend:
    """A nonlinearity of two kinks: f(z) = min(max(z, low), high) + leak min(z - low, 0)."""

    low: float = 0.0
    high: float = np.inf
    leak: float = 0.0

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """f of each element."""
        made = np.clip(rows, self.low, self.high)
        return made + self.leak * np.minimum(rows - self.low, 0) if self.leak else made

    def slope(self, rows: np.ndarray) -> np.ndarray:
        """f' of each element."""
        inside = ((rows > self.low) & (rows < self.high)).astype(rows.dtype)
        return inside + self.leak * (rows <= self.low) if self.leak else inside


@dataclass(frozen=True)
class Sight:
    """The union as it is read in one place."""

    rows: np.ndarray
    """[samples * positions, n] u, before the nonlinearity"""
    root: np.ndarray
    """[n, r] L"""
    bend: Bend | None
    """f; None for the identity."""

    def read(self) -> np.ndarray:
        """f(u)"""
        return self.rows if self.bend is None else self.bend(self.rows)

    def counted(self) -> tuple[np.ndarray, np.ndarray]:
        """[rows, m] f(u) of the channels that cost something, and their rows of L."""
        own = np.flatnonzero(self.root.any(axis=1))
        rows = self.rows[:, own]
        return rows if self.bend is None else self.bend(rows), self.root[own]

    def part(self, chosen: slice | np.ndarray) -> "Sight":
        """Some of the rows."""
        return Sight(self.rows[chosen], self.root, self.bend)


@dataclass(frozen=True)
class Subspace:
    """Shared channels s = Q u + c of a union of n channels."""

    mix: np.ndarray
    """Q [shared, n]"""
    shift: np.ndarray
    """c [shared]"""


def importance(covariance: np.ndarray, root: np.ndarray, skipped: bool) -> np.ndarray:
    """[n, n] how much one network wants of what it reads in a place, scaled to tr(K M) = 1.

    Args:
        covariance: K of its channels there.
        root: [n, r], r r' the sum of W W' over the layers that read them (one column for every input weight).
        skipped: whether they are also added to what comes later, which wants all of them alike.
    """
    wanted = np.zeros_like(covariance)
    for part in (root @ root.T, np.eye(len(root)) if skipped else np.zeros_like(covariance)):
        said = float(np.vdot(covariance, part))
        if said > 0:
            wanted += part / said
    total = float(np.vdot(covariance, wanted))
    return wanted / total if total > 0 else wanted


def choose_subspace(sights: Sequence[Sight], width: int, seed: int) -> Subspace:
    """The best mixture of `width` shared channels.

    Args:
        sights: at least one.
        width: number of shared channels.
        seed: of the rows in each step.
    """
    learnt = [sight.part(np.arange(len(sight.rows)) % _HELD_OUT > 0) for sight in sights]
    held_out = [sight.part(slice(None, None, _HELD_OUT)) for sight in sights]
    starts = [choose_channels(learnt, width), _leading(learnt, width)]
    first = min(starts, key=lambda start: _loss(start, held_out))
    if all(sight.bend is None for sight in sights):
        return first
    return _descend(first, learnt, held_out, seed)


def choose_channels(sights: Sequence[Sight], width: int) -> Subspace:
    """The best selection of `width` channels, of which none is mixed with another."""
    readings = [Reading(covariance_of(sight.read()), sight.root.astype(np.float64)) for sight in sights]
    mix = np.zeros((width, sights[0].rows.shape[1]), np.float32)
    chosen = sorted(select_channels(readings, min(width, mix.shape[1])))
    mix[np.arange(len(chosen)), chosen] = 1
    return Subspace(mix, np.zeros(width, np.float32))


def choose_private(subspace: Subspace, sights: Sequence[Sight], own: slice, count: int) -> Subspace:
    """The shared channels and `count` of one network's own, those that say most about what the shared ones leave open.

    Args:
        subspace: the shared channels.
        sights: at least one.
        own: where the network's channels lie in the union.
        count: at most as many as the network has.
    """
    readings = []
    for sight in sights:
        made, wanted = _with_ones(_made(subspace, sight)), sight.read()[:, own]
        readings.append(Reading(covariance_of(wanted - made @ _best(made, wanted)), sight.root[own].astype(np.float64)))
    rows = np.zeros((count, subspace.mix.shape[1]), subspace.mix.dtype)
    chosen = sorted(select_channels(readings, count))
    rows[np.arange(len(chosen)), own.start + np.asarray(chosen, np.int64)] = 1
    return Subspace(
        np.concatenate([subspace.mix, rows]), np.concatenate([subspace.shift, np.zeros(count, subspace.shift.dtype)])
    )


def decoder(subspace: Subspace, sights: Sequence[Sight]) -> np.ndarray:
    """V' [n, shared]: every channel that is read, predicted from the shared ones over all places."""
    gram, cross = 0.0, 0.0
    for sight in sights:
        made, wanted = _made(subspace, sight), sight.read()
        weight = 1 / (len(made) * max(float(wanted.var(0).sum()), 1e-12))
        made, wanted = made - made.mean(0), wanted - wanted.mean(0)
        gram, cross = gram + weight * (made.T @ made), cross + weight * (made.T @ wanted)
    return np.asarray(_solve(np.asarray(gram, np.float64), np.asarray(cross, np.float64)).T)


def _made(subspace: Subspace, sight: Sight) -> np.ndarray:
    shared = sight.rows @ subspace.mix.T + subspace.shift
    return shared if sight.bend is None else sight.bend(shared)


def covariance_of(rows: np.ndarray) -> np.ndarray:
    """[n, n]"""
    centred = rows - rows.mean(0)
    return (centred.T @ centred).astype(np.float64) / len(rows)


def root_of(matrix: np.ndarray) -> np.ndarray:
    """L with L L' the matrix, which is symmetric and has no negative eigenvalues but by rounding."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)))


def _leading(sights: Sequence[Sight], width: int) -> Subspace:
    """The leading eigenvectors of L' K L, as channels of unit variance; best where nothing is nonlinear."""
    covariance = np.mean([covariance_of(sight.rows) for sight in sights], axis=0)
    wanted = np.sum([sight.root @ sight.root.T for sight in sights], axis=0).astype(np.float64)
    root = root_of(wanted)
    _, axes = np.linalg.eigh(root.T @ covariance @ root)
    mix = (root @ axes[:, ::-1][:, :width]).T
    spread = np.sqrt(np.maximum(np.einsum("sn,nm,sm->s", mix, covariance, mix), 0))
    mix = mix / np.where(spread > 1e-12, spread, 1.0)[:, None]
    padded = np.zeros((width, len(covariance)), np.float32)
    padded[: len(mix)] = mix
    return Subspace(padded, np.zeros(width, np.float32))


def _descend(start: Subspace, learnt: Sequence[Sight], held_out: Sequence[Sight], seed: int) -> Subspace:
    generator = np.random.default_rng(seed)
    mix, shift = start.mix.astype(np.float32), start.shift.astype(np.float32)
    best, least = start, _loss(start, held_out)
    scale = float(np.sqrt(np.mean(mix**2)))
    count = min(_BATCH, max(_ALL // len(learnt), 4 * len(mix)))
    moments = [[np.zeros_like(mix), np.zeros_like(mix)], [np.zeros_like(shift), np.zeros_like(shift)]]
    for step in range(1, _STEPS + 1):
        batch = [sight.part(generator.integers(0, len(sight.rows), count)) for sight in learnt]
        gradients = _gradients(Subspace(mix, shift), batch)
        rate = _RATE * scale * (1 + np.cos(np.pi * step / _STEPS)) / 2
        for number, (array, gradient) in enumerate(zip((mix, shift), gradients, strict=True)):
            first, second = moments[number]
            first += 0.1 * (gradient - first)
            second += 0.01 * (gradient**2 - second)
            array -= rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-12)
        if step % _CHECK == 0:
            found = Subspace(mix.copy(), shift.copy())
            loss = _loss(found, held_out)
            if loss < least:
                best, least = found, loss
    return best


def _loss(subspace: Subspace, sights: Sequence[Sight]) -> float:
    total = 0.0
    for sight in sights:
        made = _with_ones(_made(subspace, sight))
        wanted, root = sight.counted()
        missed = (made @ _best(made, wanted) - wanted) @ root
        total += float(np.vdot(missed, missed)) / len(made)
    return total


def _gradients(subspace: Subspace, sights: Sequence[Sight]) -> tuple[np.ndarray, np.ndarray]:
    mix, shift = np.zeros_like(subspace.mix), np.zeros_like(subspace.shift)
    for sight in sights:
        shared = sight.rows @ subspace.mix.T + subspace.shift
        made = _with_ones(shared if sight.bend is None else sight.bend(shared))
        wanted, root = sight.counted()
        back = _best(made, wanted)
        missed = (made @ back - wanted) @ root
        pulled = (2 / len(made)) * (missed @ root.T) @ back[:-1].T
        if sight.bend is not None:
            pulled *= sight.bend.slope(shared)
        mix += pulled.T @ sight.rows
        shift += pulled.sum(0)
    return mix, shift


def _with_ones(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows, np.ones((len(rows), 1), rows.dtype)], axis=1)


def _best(made: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """[shared + 1, n]: V and v in closed form."""
    found = _solve((made.T @ made).astype(np.float64) / len(made), (made.T @ wanted).astype(np.float64) / len(made), 1)
    return found.astype(made.dtype)


def _solve(gram: np.ndarray, cross: np.ndarray, free: int = 0) -> np.ndarray:
    """Ridge regression; the last `free` unknowns are not pulled to zero."""
    count = len(gram) - free
    pull = _RIDGE * max(float(np.trace(gram[:count, :count])) / max(count, 1), 1e-12)
    gram = gram + pull * np.diag(np.arange(len(gram)) < count)
    return np.linalg.solve(gram, cross)
