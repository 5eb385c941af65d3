"""Blocks: channels that move together with a row of other channels, such as the heads of attention.

The rules bind a parent to each row (`Trace.bind`). Two blocks are exchangeable when their parents touch the same things
equally often and, position by position, so do their rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxmerge.ir.labels import NO_CHANNEL

Bind = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Blocks:
    """The classes of atoms once parents of one row are the same, and the parents that may be exchanged.

    Attributes:
        classes: class of each atom.
        parents: every class that is a parent; such a class never moves without its row.
        groups: sets of two or more exchangeable parents, each with its own class and those of its row in order.
    """

    classes: np.ndarray
    parents: frozenset[int]
    groups: list[list[list[int]]]


def find_blocks(binds: Sequence[Bind], classes: np.ndarray, fixed: np.ndarray, number: np.ndarray) -> Blocks:
    """Which parents may be exchanged with their rows.

    Args:
        binds: parents [P] and children [P, D], as atoms.
        classes: class of each atom.
        fixed: whether a class must keep its place; parents that must are added, in place.
        number: for each class what it touches; rows are not looked at.
    """
    rows = _rows(binds, classes, fixed)
    while (table := _same_parents(rows, len(fixed))) is not None:
        for old in rows:
            if fixed[old]:
                fixed[table[old]] = True
        classes = table[classes]
        rows = _rows(binds, classes, fixed)
    inside = _inside(rows)
    families: dict[tuple[object, ...], list[list[int]]] = {}
    for parent in rows:
        block = _block(parent, rows, fixed)
        if block is None:
            fixed[parent] = True
            continue
        members = list(dict.fromkeys(block))
        pattern = tuple(members.index(member) for member in block)
        moving = set(members)
        # Rows of other binds stay, so what two blocks have in them must be in the same rows, place by place.
        staying = tuple(
            tuple((which, row) for which, row, above in inside.get(member, ()) if above not in moving)
            for member in members
        )
        binding = tuple(which for which, _ in rows[parent])
        key = (binding, pattern, tuple(number[members].tolist()), staying)
        families.setdefault(key, []).append(members)
    groups = [family for family in families.values() if len(family) > 1]
    return Blocks(classes, frozenset(rows), groups)


Rows = dict[int, list[tuple[int, np.ndarray]]]
"""For each parent class the binds that it has a row in, and the classes in that row."""


def _rows(binds: Sequence[Bind], classes: np.ndarray, fixed: np.ndarray) -> Rows:
    found: Rows = {}
    for number, (parents, children) in enumerate(binds):
        below = np.where(children == NO_CHANNEL, NO_CHANNEL, classes[children])
        for atom, row in zip(parents.tolist(), below, strict=True):
            if atom == NO_CHANNEL:
                continue
            parent = int(classes[atom])
            own = found.setdefault(parent, [])
            earlier = next((seen for which, seen in own if which == number), None)
            if earlier is None:
                own.append((number, row))
            elif not np.array_equal(earlier, row):  # one parent of two rows; equal rows repeat, as over a batch
                fixed[parent] = True
    return found


def _same_parents(rows: Rows, count: int) -> np.ndarray | None:
    """A new class for each class, when two parents have the same row and so are one; None when no two have."""
    table = np.arange(count)
    owner: dict[frozenset[int], int] = {}
    for parent, own in rows.items():
        for _, row in own:
            first = _root(owner.setdefault(frozenset(row.tolist()), parent), table)
            if first != _root(parent, table):
                table[_root(parent, table)] = first
    if (table == np.arange(count)).all():
        return None
    return np.array([_root(cls, table) for cls in range(count)])


def _root(cls: int, table: np.ndarray) -> int:
    while table[cls] != cls:
        cls = int(table[cls])
    return cls


def _inside(rows: Rows) -> dict[int, list[tuple[int, int, int]]]:
    """For each child class the rows it is in: the bind, the number of the row, and its parent."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    counts: dict[int, int] = {}
    for parent, own in rows.items():
        for which, row in own:
            number = counts[which] = counts.get(which, -1) + 1
            for child in dict.fromkeys(row.tolist()):
                found.setdefault(child, []).append((which, number, parent))
    return found


def _block(parent: int, rows: Rows, fixed: np.ndarray, above: tuple[int, ...] = ()) -> list[int] | None:
    """The parent, the classes of its rows and of theirs; None when one of them must keep its place."""
    if fixed[parent] or parent in above:
        return None
    block = [parent]
    for _, row in rows[parent]:
        for child in row.tolist():
            below = _block(child, rows, fixed, (*above, parent)) if child in rows else [child]
            if child == NO_CHANNEL or fixed[child] or below is None:
                return None
            block += below
    return block


def row_keys(binds: Iterable[Bind], classes: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """For each bind the classes of its children, and for each a number that tells which rows it is in."""
    for _, children in binds:
        row = np.broadcast_to(np.arange(len(children))[:, None], children.shape)
        real = children != NO_CHANNEL
        pairs = np.unique(np.stack([classes[children[real]], row[real]]), axis=1)
        own, first, times = np.unique(pairs[0], return_index=True, return_counts=True)
        key = pairs[1][first]
        several: dict[bytes, int] = {}
        for place in np.flatnonzero(times > 1):
            rows = pairs[1][first[place] : first[place] + times[place]].tobytes()
            key[place] = several.setdefault(rows, len(children) + len(several))
        yield own, key
