"""Arrays of several networks side by side: the order of the joint channels, and block-diagonal weights."""

from collections.abc import Sequence

import numpy as np

from onnxmerge.passes.resize import SHARED, AxisMap


def side_by_side(numbers: np.ndarray, space_of: np.ndarray, networks: int) -> AxisMap:
    """The joint order of channels along some axes (flattened together).

    Each run of channels of one space stands once for each network; a run ends where another space, or another copy of
    the same channels, begins. Operators that concatenate, split or flatten channels keep that order; where one does
    not, `verify` says so.

    Args:
        numbers: [P] number of the channel at each position, negative where there is none.
        space_of: the space of each number.
        networks: how many there are.
    """
    spaces = np.where(numbers < 0, -1, space_of[numbers])
    starts = np.flatnonzero((np.diff(spaces, prepend=-2) != 0) | (np.diff(numbers, prepend=-2) < 0))
    source, parent = [], []
    for run in np.split(np.arange(len(numbers)), starts[1:]):
        owners = range(networks) if spaces[run[0]] >= 0 else (SHARED,)
        for owner in owners:
            source.append(run)
            parent.append(np.full(len(run), owner))
    return AxisMap(np.concatenate(source), np.concatenate(parent))


def on_one_axis(joint: AxisMap, sizes: Sequence[int], networks: int) -> tuple[int, AxisMap] | None:
    """Which of several axes grows, and how, when `joint` is the order of all of them flattened; the first that fits."""
    for axis, size in enumerate(sizes):
        shape = [networks * size if a == axis else own for a, own in enumerate(sizes)]
        if int(np.prod(shape)) != len(joint):
            continue
        places = list(np.unravel_index(joint.source.reshape(shape), sizes))
        own = np.moveaxis(np.stack([places.pop(axis), joint.parent.reshape(shape)]), axis + 1, 1).reshape(
            2, shape[axis], -1
        )
        others = np.delete(np.indices(shape), axis, axis=0)
        if (own == own[:, :, :1]).all() and np.array_equal(np.array(places).reshape(others.shape), others):
            return axis, AxisMap(own[0, :, 0], own[1, :, 0])
    return None


def joined(arrays: Sequence[np.ndarray], made: AxisMap, read: AxisMap, weights: Sequence[float]) -> np.ndarray:
    """[made, read, ...]: the joint weight of a layer, in float64, from those of the networks, axes in this order.

    A row of one network reads that network's columns and the shared ones; a shared row is the weighted mean of all.
    """
    result = np.zeros((len(made), len(read), *arrays[0].shape[2:]))
    for number, (array, weight) in enumerate(zip(arrays, weights, strict=True)):
        rows, columns = (np.flatnonzero((own.parent == number) | (own.parent == SHARED)) for own in (made, read))
        scale = np.where(made.parent[rows] == SHARED, weight, 1.0).reshape(-1, *[1] * (array.ndim - 1))
        result[np.ix_(rows, columns)] += scale * array[np.ix_(made.source[rows], read.source[columns])]
    return result


def joined_groups(
    arrays: Sequence[np.ndarray],
    rows: AxisMap,
    columns: AxisMap,
    groups: int,
    weights: Sequence[float],
    *,
    rows_are_made: bool,
) -> tuple[np.ndarray, int] | None:
    """The joint kernel [rows, columns / groups, ...] of a grouped convolution, and its number of groups.

    None where the channels of a group have been torn apart.
    """
    per_row, per_column = arrays[0].shape[0] // groups, arrays[0].shape[1]
    whole = [_chunks(rows, per_row), _chunks(columns, per_column)]
    if whole[0] is not None and whole[1] is not None and np.array_equal(whole[0], whole[1]):  # groups add up
        kernel = np.empty((len(rows), *arrays[0].shape[1:]))
        for number, array in enumerate(arrays):
            own = rows.parent == number
            kernel[own] = array[rows.source[own]]
        return kernel, len(rows) // per_row
    blocks = []
    for group in range(groups):
        parts = [_part(rows, group, groups, per_row), _part(columns, group, groups, per_column)]
        if parts[0] is None or parts[1] is None:
            return None
        kernels = [array[group * per_row : (group + 1) * per_row] for array in arrays]
        if rows_are_made:
            blocks.append(joined(kernels, parts[0], parts[1], weights))
        else:
            swapped = [kernel.swapaxes(0, 1) for kernel in kernels]
            blocks.append(joined(swapped, parts[1], parts[0], weights).swapaxes(0, 1))
    return np.concatenate(blocks), groups


def _chunks(axis_map: AxisMap, size: int) -> np.ndarray | None:
    """[chunks, 2]: network and group of each chunk of `size` indices; None unless each is a whole group of one."""
    if len(axis_map) % size:
        return None
    source, parent = axis_map.source.reshape(-1, size), axis_map.parent.reshape(-1, size)
    in_order = (source == source[:, :1] + np.arange(size)).all() and not (source[:, 0] % size).any()
    if not in_order or (parent != parent[:, :1]).any() or (parent == SHARED).any():
        return None
    return np.stack([parent[:, 0], source[:, 0] // size], axis=1)


def _part(axis_map: AxisMap, group: int, groups: int, size: int) -> AxisMap | None:
    """The channels of one group, counted inside it; None unless equal shares of all hold one group each."""
    share = len(axis_map) // groups
    own = slice(group * share, (group + 1) * share)
    if len(axis_map) % groups or (axis_map.source[own] // size != group).any():
        return None
    return AxisMap(axis_map.source[own] - group * size, axis_map.parent[own])


def beside(
    arrays: Sequence[np.ndarray], axis: int, axis_map: AxisMap, weights: Sequence[float] | None = None
) -> np.ndarray | None:
    """The arrays side by side along `axis`; where an index is shared, their weighted mean, in float64.

    Without weights shared entries must be equal; None when they are not.
    """
    moved = [np.moveaxis(array, axis, 0) for array in arrays]
    result = np.empty((len(axis_map), *moved[0].shape[1:]))
    for number, array in enumerate(moved):
        own = axis_map.parent == number
        result[own] = array[axis_map.source[own]]
    common = axis_map.parent == SHARED
    shared = [array[axis_map.source[common]] for array in moved]
    if weights is not None:
        result[common] = sum(weight * own.astype(np.float64) for weight, own in zip(weights, shared, strict=True))
    elif any(not np.array_equal(own, shared[0]) for own in shared):
        return None
    else:
        result[common] = shared[0]
    return np.moveaxis(result, 0, axis)
