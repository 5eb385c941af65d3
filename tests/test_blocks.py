"""Blocks whose parents are channels in part only."""

import numpy as np

from onnxmerge.ir.blocks import find_blocks
from onnxmerge.ir.labels import NO_CHANNEL


def test_a_row_whose_parent_is_no_channel_has_none():
    """Atoms 0 and 1 are parents of rows of two; a third row has none, and the last atom, 8, knows of no row."""
    parents, children = np.array([0, 1, NO_CHANNEL]), np.array([[2, 3], [4, 5], [6, 7]])
    fixed = np.zeros(9, bool)
    blocks = find_blocks([(parents, children)], np.arange(9), fixed, np.zeros(9, np.int64))
    assert blocks.parents == {0, 1}
    assert blocks.groups == [[[0, 2, 3], [1, 4, 5]]]
    assert not fixed.any()
