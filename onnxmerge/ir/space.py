"""What a channel space is: its size, and where its channels lie in arrays and values."""

from dataclasses import dataclass

import numpy as np

from onnxmerge.ir.labels import Rows


@dataclass(frozen=True)
class Slots:
    """Where a space lies in one array: along `axes` (flattened together), channel c owns the indices `index[c]`."""

    name: str
    axes: tuple[int, ...]
    index: np.ndarray
    """[channels, slots per channel]"""
    rows: Rows | None = None


@dataclass(frozen=True)
class Space:
    """One channel space: `size` channels, the constants to rewrite, and the values that carry it.

    In a space of *blocks* a channel is a whole block of the channels of other spaces, such as a head of attention; both
    can be permuted, one after the other.
    """

    name: str
    size: int
    weights: tuple[Slots, ...]
    values: tuple[Slots, ...]
    blocks: bool = False

    def value(self, name: str) -> Slots | None:
        """Where the space lies in the value `name`, if it does."""
        return next((slots for slots in self.values if slots.name == name), None)
