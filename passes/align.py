"""Align channels: which channel of one network is which channel of another.

For each channel space, a similarity of every channel of A with every channel of B is summed over all places where the
space lies, and the assignment with the greatest total is taken (Kuhn-Munkres). By activations the similarity is the
correlation of pre-activations on the same inputs (Li et al. 2016); by weights it is the inner product of weight slices
under the current alignment of all other spaces, repeated until nothing changes (Ainsworth et al. 2023).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir
from scipy.optimize import linear_sum_assignment

from onnxmerge.ir.spaces import Slots, Space
from onnxmerge.ir.weights import get_array
from onnxmerge.passes.permute import permute_slots, slot_rows
from onnxmerge.runtime.statistics import PairStatistics

Alignment = dict[str, np.ndarray]
"""Space name -> for each channel of A, the channel of B that stands for it."""


def align_by_activations(spaces: Sequence[Space], statistics: Mapping[str, PairStatistics]) -> Alignment:
    """Assignment by correlation.

    Args:
        spaces: spaces of A; several may lie in one value, side by side.
        statistics: by A's value names, over all channels of a value in its own order. Only values count in which every
            channel of the space has one slot on one axis; a space without any keeps its order.
    """
    alignment = {}
    for space in spaces:
        seen = [
            statistics[slots.name].correlation()[np.ix_(slots.index[:, 0], slots.index[:, 0])]
            for slots in space.values
            if slots.name in statistics and len(slots.axes) == 1 and slots.index.shape[1] == 1
        ]
        alignment[space.name] = _assign(np.sum(seen, axis=0)) if seen else np.arange(space.size)
    return alignment


def align_by_weights(
    spaces: Sequence[Space],
    first: oir.Model,
    second: oir.Model,
    constants: Mapping[str, str],
    *,
    seed: int,
    sweeps: int = 5,
) -> Alignment:
    """Assignment by weights: coordinate descent over spaces from several seeded orders, the best total kept.

    Args:
        spaces: spaces of `first`; they hold for `second` too, whose graph corresponds.
        first: network A.
        second: network B.
        constants: names of A's constants -> B's.
        seed: of the orders.
        sweeps: how many orders are tried.
    """
    best: tuple[float, Alignment] | None = None
    for attempt in range(sweeps):
        total, alignment = _descend(spaces, first, second, constants, np.random.default_rng([seed, attempt]))
        if best is None or total > best[0]:
            best = total, alignment
    assert best is not None
    return best[1]


@dataclass
class _Moving:
    """B's arrays under the current alignment."""

    arrays: dict[str, np.ndarray]

    def similarity(self, space: Space, first: oir.Model) -> np.ndarray:
        """[channels, channels]: inner products of A's slices with B's, each array weighing the same."""
        total = np.zeros((space.size, space.size))
        for slots in space.weights:
            ours = _slices(get_array(first.graph.initializers[slots.name]), slots)
            theirs = _slices(self.arrays[slots.name], slots)
            scale = np.linalg.norm(ours) * np.linalg.norm(theirs)
            total += ours @ theirs.T / (scale if scale > 0 else 1.0)
        return total


def _descend(
    spaces: Sequence[Space],
    first: oir.Model,
    second: oir.Model,
    constants: Mapping[str, str],
    generator: np.random.Generator,
) -> tuple[float, Alignment]:
    names = {slots.name for space in spaces for slots in space.weights}
    moving = _Moving({name: get_array(second.graph.initializers[constants[name]]) for name in names})
    alignment = {space.name: np.arange(space.size) for space in spaces}
    changed = True
    rounds = 0
    while changed and rounds < 50:
        changed = False
        rounds += 1
        for number in generator.permutation(len(spaces)):
            space = spaces[number]
            similarity = moving.similarity(space, first)
            move = _assign(similarity)
            gain = similarity[np.arange(space.size), move].sum() - np.trace(similarity)
            if gain <= 1e-9:
                continue
            changed = True
            alignment[space.name] = alignment[space.name][move]
            for slots in space.weights:
                moving.arrays[slots.name] = permute_slots(moving.arrays[slots.name], slots, move)
    total = sum(float(np.trace(moving.similarity(space, first))) for space in spaces)
    return total, alignment


def _slices(array: np.ndarray, slots: Slots) -> np.ndarray:
    """[channels, everything else]: the slices of `array` that each channel owns."""
    flat = slot_rows(array, slots)
    return flat[slots.index].reshape(len(slots.index), -1).astype(np.float64)


def _assign(similarity: np.ndarray) -> np.ndarray:
    return linear_sum_assignment(similarity, maximize=True)[1]


def matched(correlation: np.ndarray, order: np.ndarray) -> float:
    """Mean correlation of A's channel i with B's channel order[i]."""
    return float(correlation[np.arange(len(order)), order].mean())
