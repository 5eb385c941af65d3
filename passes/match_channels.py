"""Match the channels of two networks of any widths: which channels of theirs ours stand for.

First a cost [theirs, ours] for each space, small where two channels do the same job, summed over the places where the
space lies. By activations it is one minus the correlation, or OTFusion's Euclidean distance of the two channels' values
on the same samples, from streamed second moments: |z_i|^2 + |z_j|^2 - 2 z_i . z_j. By weights it is the squared
distance of what makes the two channels, layer by layer, theirs under the maps of the spaces before (Singh and Jaggi
2020).

Then a map for each space: `assign` one to one, or `transport` all mass of theirs to ours at the least cost. Dead
channels have the same correlation, 0, with every other. Where costs are equal, channels stay in their order.
For equal widths `align_by_weights` searches longer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as oir
from scipy.optimize import linear_sum_assignment

from onnxmerge.errors import ModelError
from onnxmerge.ir.space import Slots, Space
from onnxmerge.ir.weights import get_array, is_float
from onnxmerge.passes.channel_map import (
    ChannelMap,
    MappedPartner,
    carry,
    constant_places,
    paired_slots,
    reading_axes,
)
from onnxmerge.passes.permute import slot_rows
from onnxmerge.runtime.statistics import PairStatistics

Costs = dict[str, np.ndarray]
"""By our space: [theirs, ours]."""
Solver = Callable[[np.ndarray], ChannelMap]
"""A cost [theirs, ours] -> the map: `assign`, `transport`, or `transport` with a regularisation."""
Measure = Callable[[PairStatistics], np.ndarray]
"""Statistics of our channels (a) and theirs (b) -> a cost [theirs, ours]."""

_TIE = 1e-7
"""What decides between equal costs, relative to the spread of the costs: far above rounding, far below differences."""
_MOST_STEPS = 10_000_000
"""Pivots of the network simplex; it needs some hundred for each channel."""


# --- costs ------------------------------------------------------------------------------------------------------------


def correlation_cost(statistics: PairStatistics) -> np.ndarray:
    """One minus the correlation; a channel that is constant on these samples correlates with none."""
    return 1 - statistics.correlation().T


def distance_cost(statistics: PairStatistics) -> np.ndarray:
    """The root of the mean squared difference: OTFusion's Euclidean ground metric."""
    ours, theirs = statistics.square_a, statistics.square_b
    return np.sqrt(np.maximum(theirs[:, None] + ours - 2 * statistics.ab.T, 0) / statistics.rows)


def match_by_activations(
    spaces: Sequence[Space],
    partner: MappedPartner,
    statistics: Mapping[str, PairStatistics],
    measure: Measure,
    solve: Solver,
) -> dict[str, ChannelMap]:
    """A map for each space, by what its channels are on the same samples.

    Args:
        spaces: ours, without blocks.
        partner: the other network; its maps are not read.
        statistics: by our value names, over all channels of a value in its own order: ours as `a`, theirs as `b`. Only
            values count in which every channel of the space has one slot on one axis; without any the order is kept.
        measure: `correlation_cost` or `distance_cost`.
        solve: `assign` or `transport`.

    Raises:
        ModelError: a cost is not finite, or widths differ and `solve` needs equal ones.
    """
    maps = {}
    for space in spaces:
        cost = np.zeros((partner.spaces[space.name].size, space.size))
        for ours in space.values:
            theirs = partner.spaces[space.name].value(partner.values.get(ours.name, ""))
            if ours.name in statistics and theirs is not None and _whole(ours) and _whole(theirs):
                cost += measure(statistics[ours.name])[np.ix_(theirs.index[:, 0], ours.index[:, 0])]
        maps[space.name] = _solved(space, cost, solve)
    return maps


def _whole(slots: Slots) -> bool:
    return len(slots.axes) == 1 and slots.index.shape[1] == 1


def match_by_weights(
    reference: oir.Model, spaces: Sequence[Space], partner: MappedPartner, solve: Solver
) -> dict[str, ChannelMap]:
    """A map for each space, in their order, by the arrays that make its channels or have a number for each.

    An array counts as soon as all other spaces that lie in it have a map, and each weighs the same: its distances are
    divided by the mean squared length of the channels' slices. A space that nothing is known of keeps its order.

    Args:
        reference: our network.
        spaces: ours, without blocks, in the order in which they appear.
        partner: the other network; its maps are not read.
        solve: `assign` or `transport`.

    Raises:
        ModelError: as for `match_by_activations` and `transported_arrays`.
    """
    inside: dict[str, dict[str, Space]] = {}
    for space in spaces:
        for slots in space.weights:
            inside.setdefault(slots.name, {})[space.name] = space
    maps: dict[str, ChannelMap] = {}
    for space in spaces:
        cost = np.zeros((partner.spaces[space.name].size, space.size))
        for name in dict.fromkeys(slots.name for slots in space.weights):
            value = reference.graph.initializers[name]
            reading = reading_axes(value)
            if reading is None or not is_float(value):
                continue
            for ours, theirs in paired_slots(name, space, partner):
                others = [
                    o for o in inside[name].values() if any(s.axes != ours.axes for s in o.weights if s.name == name)
                ]
                if not reading & set(ours.axes) and all(other.name in maps for other in others):
                    cost += _slice_distances(value, ours, theirs, replace(partner, maps=maps), others)
        maps[space.name] = _solved(space, cost, solve)
    return maps


def _slice_distances(
    value: oir.Value, ours: Slots, theirs: Slots, partner: MappedPartner, others: Sequence[Space]
) -> np.ndarray:
    """[theirs, ours]: squared distances of the slices of one array, relative to their mean squared length."""
    name, array = value.name or "", get_array(value)
    other = get_array(partner.model.graph.initializers[partner.constants[name]])
    places = [place for place in constant_places(value, partner, others) if place.ours.axes != ours.axes]
    shape = tuple(other.shape[axis] if axis in ours.axes else size for axis, size in enumerate(array.shape))
    a = _slices(array, ours)
    b = _slices(carry(other, shape, places, name), replace(theirs, rows=ours.rows))
    lengths = (b**2).sum(1)[:, None] + (a**2).sum(1)
    scale = lengths.mean() / 2
    return np.maximum(lengths - 2 * b @ a.T, 0) / (scale if scale > 0 else 1.0)


def _slices(array: np.ndarray, slots: Slots) -> np.ndarray:
    return slot_rows(array, slots)[slots.index].reshape(len(slots.index), -1).astype(np.float64)


def _solved(space: Space, cost: np.ndarray, solve: Solver) -> ChannelMap:
    try:
        return solve(cost)
    except ModelError as error:
        raise ModelError(f"channel space {space.name!r}: {error}") from error


# --- solvers ----------------------------------------------------------------------------------------------------------


def assign(cost: np.ndarray) -> ChannelMap:
    """One to one at the least total cost (Kuhn-Munkres).

    Raises:
        ModelError: the cost is not square or not finite.
    """
    theirs, ours = cost.shape
    if theirs != ours:
        raise ModelError(f"{theirs} channels cannot be assigned to {ours} one to one; transport can match them")
    return ChannelMap.from_permutation(linear_sum_assignment(_with_ties_broken(cost).T)[1])


def transport(cost: np.ndarray, regularisation: float = 0.0, *, published: bool = False) -> ChannelMap:
    """Optimal transport of equal masses on all channels of theirs to equal masses on all of ours.

    Args:
        cost: [theirs, ours]
        regularisation: weight of the plan's negative entropy, as a share of the median cost (Cuturi 2013); 0 is exact.
            An exact plan between equal widths is an assignment. Without any difference in cost the plan is exact too.
            A small weight may leave the masses of theirs only nearly equal; the rows of both matrices still sum to one.
        published: see `ChannelMap.from_plan`.

    Raises:
        ModelError: the cost is not finite, or no plan was found.
    """
    theirs, ours = cost.shape
    even = _with_ties_broken(cost)
    smooth = regularisation * float(np.median(cost) or cost.mean()) if np.ptp(cost) > 0 else 0.0
    if smooth == 0 and max(theirs, ours) % min(theirs, ours) == 0:
        return ChannelMap.from_plan(_divided(even), published=published) if theirs != ours else assign(cost)
    import ot  # here, because it loads every array library that is installed

    masses = np.full(theirs, 1 / theirs), np.full(ours, 1 / ours)
    if smooth > 0:
        plan = ot.sinkhorn(*masses, even, smooth, method="sinkhorn_log", warn=False)
    else:
        plan, log = ot.emd(*masses, even, numItermax=_MOST_STEPS, log=True)
        if log["warning"] is not None:
            raise ModelError(f"no transport plan was found: {log['warning']}")
        plan[plan < 1e-9 / max(theirs, ours)] = 0  # rounding
    return ChannelMap.from_plan(plan, published=published)


def _divided(cost: np.ndarray) -> np.ndarray:
    """An exact plan [theirs, ours] where one width is a multiple of the other.

    In units of the smaller mass the masses are whole numbers, so a best plan is one that splits no unit: an assignment
    in which each channel of the narrower side stands as often as it has units. That takes much less than the simplex.
    """
    theirs, ours = cost.shape
    if theirs < ours:
        return _divided(cost.T).T
    places = linear_sum_assignment(np.repeat(cost, theirs // ours, axis=1))[1] // (theirs // ours)
    plan = np.zeros(cost.shape)
    plan[np.arange(theirs), places] = 1 / theirs
    return plan


def _with_ties_broken(cost: np.ndarray) -> np.ndarray:
    """The cost, from 0 on, and a little more the further two channels lie apart."""
    if not np.isfinite(cost).all():
        raise ModelError("the cost of matching channels is not finite")
    theirs, ours = (np.arange(size) / max(size - 1, 1) for size in cost.shape)
    spread = float(np.ptp(cost)) or 1.0
    return cost - cost.min() + _TIE * spread * (theirs[:, None] - ours) ** 2
