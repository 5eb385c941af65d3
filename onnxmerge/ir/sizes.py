"""Sizes of axes: numbers, symbols that stand for one number wherever they occur, and which of them are the same."""

from collections.abc import Callable, Sequence

import onnx_ir as oir

Size = int | str | None
"""A fixed size, a symbol, or nothing known."""


def sizes_of(value: oir.Value) -> list[Size] | None:
    """The sizes of a value's axes; None where not even their number is known."""
    if value.shape is None:
        return None
    return [size if isinstance(size, int) else size.value for size in value.shape]


def rename_sizes(model: oir.Model, new: Callable[[str], int | str]) -> None:
    """Put `new(symbol)` in the place of each symbol in the shapes of all values, those in sub-graphs included."""
    for graph in model.graphs():
        values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
        for value in values:
            sizes = sizes_of(value)
            if sizes is not None and any(isinstance(size, str) for size in sizes):
                value.shape = oir.Shape([new(size) if isinstance(size, str) else size for size in sizes])


class Equalities:
    """Which symbols are equal to each other or to a number (a disjoint-set forest)."""

    def __init__(self) -> None:
        self._parent: dict[str, int | str] = {}

    def copy(self) -> "Equalities":
        """The same equalities, to be tried with others."""
        other = Equalities()
        other._parent = dict(self._parent)
        return other

    def find(self, size: int | str) -> int | str:
        """The number that `size` is equal to, else the first of the symbols that are equal to it."""
        while isinstance(size, str) and size in self._parent:
            size = self._parent[size]
        return size

    def unite(self, first: Sequence[Size], second: Sequence[Size]) -> bool:
        """Make two shapes equal axis by axis; where they cannot be, change nothing and return False."""
        if len(first) != len(second):
            return False
        before = dict(self._parent)
        for one, other in zip(first, second, strict=True):
            if one is None or other is None:
                continue
            one, other = self.find(one), self.find(other)
            if one == other:
                continue
            if isinstance(other, str):
                self._parent[other] = one
            elif isinstance(one, str):
                self._parent[one] = other
            else:
                self._parent = before
                return False
        return True
