"""Find a tree that keeps a bound, when the plain sequence over k is known.

One rule at every level. A group of tasks shares as much as the bound allows. What was measured one unit deeper tells
which of them still kept it there. These share further, and so do the others among themselves: each part goes on, one
unit at a time, as long as the whole tree keeps the bound. Where a group ends because its networks differ, the parts are
those that can go on together.
"""

from collections.abc import Callable, Mapping, Sequence

from onnxmerge.methods.zip.stems.tree import Branch, Forest

Kept = frozenset[str]
"""The tasks that keep the bound."""
Try = Callable[[int, Sequence[Branch]], Kept]
"""(units, branches) -> who keeps the bound in that tree."""


def grow_tree(tasks: Sequence[str], forest: Forest, plain: Mapping[int, Kept], attempt: Try) -> list[Branch]:
    """Try one tree after the other; the branches of the last that kept the bound, none where none did.

    Args:
        tasks: all tasks.
        forest: what groups of them can share.
        plain: by the number of units that all tasks share, who keeps the bound.
        attempt: makes a tree.
    """
    units = max((k for k, kept in plain.items() if kept >= set(tasks)), default=0)
    growth = _Growth(tuple(tasks), forest, units, attempt)
    growth.divide(growth.tasks, units, plain)
    return growth.branches


class _Growth:
    """The branches found so far."""

    def __init__(self, tasks: tuple[str, ...], forest: Forest, units: int, attempt: Try):
        self.tasks, self.branches = tasks, list[Branch]()
        self._forest, self._units, self._attempt = forest, units, attempt

    def divide(self, group: Sequence[str], depth: int, seen: Mapping[int, Kept]) -> None:
        """Let parts of a group that shares `depth` units share further.

        Args:
            group: the tasks.
            depth: what they share.
            seen: by the number of units that this group shared, who kept the bound.
        """
        beyond = min((k for k in seen if k > depth), default=None)
        if beyond is None:
            parts = [(part, depth + 1) for part in self._alike(group, depth)]
        else:
            going = [task for task in group if task in seen[beyond]]
            known = max(k for k, kept in seen.items() if kept >= set(going))
            parts = [(going, known), ([task for task in group if task not in going], beyond)]
        for part, first in parts:
            if 2 <= len(part) < len(group):
                self._deepen(part, depth, first)

    def _alike(self, group: Sequence[str], depth: int) -> list[list[str]]:
        """The group in parts whose first task can share more than `depth` units with each of the others."""
        parts, left = [], list(group)
        while left:
            first = left[0]
            part = [task for task in left if task == first or self._limit([first, task]) > depth]
            parts.append(part)
            left = [task for task in left if task not in part]
        return parts

    def _limit(self, group: Sequence[str]) -> int:
        return len(self._forest.sharable(group).cuts)

    def _deepen(self, part: Sequence[str], depth: int, first: int) -> None:
        """Share from `first` units on upwards while the bound is kept; or downwards to `depth` until it is."""
        seen: dict[int, Kept] = {}
        limit = self._limit(part)

        def holds(units: int) -> bool:
            seen[units] = self._attempt(self._units, [*self.branches, Branch(tasks=list(part), units=units)])
            return seen[units] >= set(self.tasks)

        found, units = depth, min(first, limit)
        while depth < units <= limit and holds(units):
            found, units = units, units + 1
        units = min(first, limit) - 1
        while found == depth < units:
            found, units = (units if holds(units) else depth), units - 1
        if found > depth:
            self.branches.append(Branch(tasks=list(part), units=found))
        self.divide(part, found, seen)
