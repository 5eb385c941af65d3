"""Permute channel spaces (exact).

For a permutation p of a space's C channels, every array that touches the space is rewritten along its slots,

    W'[..., index[c, j], ...] = W[..., index[p[c], j], ...],    c = 0..C-1, j = 0..slots per channel - 1,

so channel c of the new network is channel p[c] of the old one and the function is unchanged. This is the symmetry that
weight matching exploits (Ainsworth et al., Git Re-Basin, 2023).
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.spaces import Slots, Space
from onnxmerge.ir.weights import set_array


class Permute(oir.passes.InPlacePass):
    """Permute each given space; `permutations[space][c]` is the old channel that becomes channel c."""

    preserves = "exact"

    def __init__(self, permutations: Mapping[str, np.ndarray], spaces: Mapping[str, Space]):
        self.permutations = permutations
        self.spaces = spaces

    def requires(self, model: oir.Model) -> None:
        """Every permutation names a space and permutes all of its channels."""
        for name, permutation in self.permutations.items():
            if name not in self.spaces:
                raise ModelError(f"there is no channel space {name!r}")
            if not np.array_equal(np.sort(permutation), np.arange(self.spaces[name].size)):
                raise ModelError(f"{name!r}: not a permutation of {self.spaces[name].size} channels")

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Rewrite every array of every permuted space."""
        for name, permutation in self.permutations.items():
            for slots in self.spaces[name].weights:
                value = model.graph.initializers[slots.name]
                assert value.const_value is not None
                set_array(value, permute_slots(value.const_value.numpy(), slots, permutation))
        return oir.passes.PassResult(model, modified=bool(self.permutations))


def permute_slots(array: np.ndarray, slots: Slots, permutation: np.ndarray) -> np.ndarray:
    """`array` with the channels in `slots` permuted; the shape stays."""
    result = np.array(array)
    flat = slot_rows(result, slots)
    renewed = np.array(flat)
    renewed[slots.index.ravel()] = flat[slots.index[permutation].ravel()]
    moved = np.moveaxis(_inside(result, slots), slots.axes, range(len(slots.axes)))
    moved[...] = renewed.reshape(moved.shape)
    return result


def slot_rows(array: np.ndarray, slots: Slots) -> np.ndarray:
    """[slots, ...]: `array` with the axes of `slots` first and flattened, limited to its rows; a view or a copy."""
    moved = np.moveaxis(_inside(array, slots), slots.axes, range(len(slots.axes)))
    return moved.reshape(-1, *moved.shape[len(slots.axes) :])


def _inside(array: np.ndarray, slots: Slots) -> np.ndarray:
    if slots.rows is None:
        return array
    return array[(slice(None),) * slots.rows.axis + (slice(slots.rows.start, slots.rows.stop),)]
