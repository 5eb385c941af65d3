"""From a trace to channel spaces: classes of atoms that touch the same things are one space.

A class's *signature* is what it touches: how often, in which constants and which values, in which group, and how a
transposition reordered its slots. A space is all classes with one signature.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from onnxmerge.ir.blocks import find_blocks, row_keys
from onnxmerge.ir.labels import NO_CHANNEL, Rows, Trace, channel_axes
from onnxmerge.ir.space import Slots, Space

_Touch = tuple[str, tuple[int, ...], Rows | None, np.ndarray]
"""Name, axes, rows and atoms of an array or value."""


def collect(trace: Trace) -> list[Space]:
    """The spaces of a trace, in order of their first atom; those of blocks last."""
    classes, fixed = trace.classes()
    uses: list[_Touch] = [(use.name, use.axes, use.rows, use.atoms) for use in trace.uses]
    values: list[_Touch] = [(name, channel_axes(label), None, label.ravel()) for name, label in trace.labels.items()]
    number = _signatures(trace, classes, len(fixed), [touch[3] for touch in uses + values])
    blocks = find_blocks(trace.binds, classes, fixed, number)
    if blocks.classes is not classes:
        classes = blocks.classes
        number = _signatures(trace, classes, len(fixed), [touch[3] for touch in uses + values])
        blocks = find_blocks(trace.binds, classes, fixed, number)
    fine = _refine(number, row_keys(trace.binds, classes))
    members: dict[int, list[list[int]]] = {}
    for cls in dict.fromkeys(classes.tolist()):  # in order of the first atom
        if not fixed[cls] and cls not in blocks.parents:
            members.setdefault(int(fine[cls]), []).append([cls])
    single = _spaces(list(members.values()), uses, values, classes, len(fixed), blocks=False)
    whole = [
        space
        for level in _disjoint(blocks.groups)
        for space in _spaces(level, uses, values, classes, len(fixed), blocks=True)
    ]
    return _uniquely_named([*single, *whole])


def _signatures(trace: Trace, classes: np.ndarray, count: int, touched: Iterable[np.ndarray]) -> np.ndarray:
    """For each class the number of its signature; rows of blocks are not looked at."""
    groups = [*touched, *trace.tags]
    keys = [np.unique(classes[atoms[atoms != NO_CHANNEL]], return_counts=True) for atoms in groups]
    keys += [_reorderings(classes, atoms, places) for atoms, places in trace.moves]
    return _refine(np.zeros(count, np.int64), keys)


def _refine(number: np.ndarray, keys: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Split the numbers until all classes with one number have the same keys."""
    number = number.copy()
    free = int(number.max(initial=0)) + 1
    for own, key in keys:
        if len(own) == 0:
            continue
        pairs = number[own] * (int(key.max()) + 1) + key
        _, split = np.unique(pairs, return_inverse=True)
        number[own] = free + split.ravel()
        free += int(split.max()) + 1
    return number


def _reorderings(classes: np.ndarray, atoms: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The classes that a transposition touches, and for each a number that tells how it reordered the class's slots."""
    real = atoms != NO_CHANNEL
    touched = classes[atoms[real]]
    own, times = np.unique(touched, return_counts=True)
    if (times == 1).all():
        return own, np.zeros(len(own), np.int64)
    before: dict[int, list[int]] = {}
    for cls, place in zip(touched.tolist(), places[real].tolist(), strict=True):
        before.setdefault(cls, []).append(place)
    patterns: dict[tuple[int, ...], int] = {}
    order = [patterns.setdefault(tuple(np.argsort(own).tolist()), len(patterns)) for own in before.values()]
    return np.array(list(before), np.int64), np.array(order, np.int64)


def _disjoint(groups: Sequence[list[list[int]]]) -> list[list[list[list[int]]]]:
    """`groups` sorted into levels in which no class occurs twice (blocks may lie inside larger blocks)."""
    levels: list[tuple[set[int], list[list[list[int]]]]] = []
    for group in groups:
        own = {cls for block in group for cls in block}
        level = next((level for level in levels if not level[0] & own), None)
        if level is None:
            level = (set(), [])
            levels.append(level)
        level[0].update(own)
        level[1].append(group)
    return [level[1] for level in levels]


def _spaces(
    groups: Sequence[list[list[int]]],
    uses: list[_Touch],
    values: list[_Touch],
    classes: np.ndarray,
    count: int,
    *,
    blocks: bool,
) -> list[Space]:
    """A space for each group of channels, each channel given by its classes; no class occurs twice."""
    space_of = np.full(count, -1)
    place = np.zeros((2, count), np.int64)  # the channel, and the class's place in it
    for number, group in enumerate(groups):
        for channel, own in enumerate(group):
            space_of[own] = number
            place[:, own] = [[channel] * len(own), range(len(own))]
    sizes = [len(group) for group in groups]
    weights = _slots(uses, classes, space_of, place, sizes)
    carried = _slots(values, classes, space_of, place, sizes)
    return [
        Space(own[0].name, size, tuple(own), tuple(seen), blocks)
        for size, own, seen in zip(sizes, weights, carried, strict=True)
        if own
    ]


def _slots(
    touched: list[_Touch], classes: np.ndarray, space_of: np.ndarray, place: np.ndarray, sizes: list[int]
) -> list[list[Slots]]:
    found: list[list[Slots]] = [[] for _ in sizes]
    for name, axes, rows, atoms in touched:
        real = np.flatnonzero(atoms != NO_CHANNEL)
        own = classes[atoms[real]]
        inside = space_of[own] >= 0
        real, own = real[inside], own[inside]
        if not len(real):
            continue
        order = np.lexsort((place[1][own], place[0][own], space_of[own]))  # stable: slots of a class stay in order
        real, numbers = real[order], space_of[own][order]
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        for number, index in zip(numbers[starts].tolist(), np.split(real, starts[1:]), strict=True):
            found[number].append(Slots(name, axes, index.reshape(sizes[number], -1), rows))
    return found


def _uniquely_named(spaces: Iterable[Space]) -> list[Space]:
    """The spaces under the name of their first array, with a number where several begin there."""
    seen: Counter[str] = Counter()
    named = []
    for space in spaces:
        name = f"{space.name}/blocks" if space.blocks else space.name
        seen[name] += 1
        unique = name if seen[name] == 1 else f"{name}#{seen[name]}"  # e.g. the groups of a grouped convolution
        named.append(Space(unique, space.size, space.weights, space.values, space.blocks))
    return named
