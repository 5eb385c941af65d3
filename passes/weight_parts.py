"""The parts of a weight of which the tasks share some neurons: cut it up and put it together again.

Between the shared inputs and the shared outputs lies the part that all tasks hold in common; the connections from a
task's private inputs to the shared outputs, and all that make its private outputs, are its own (He, Zhou and Thiele,
Multi-Task Zipping, 2018, figure 1).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxmerge.ir.layers import Layer
from onnxmerge.passes.roles import read_axis

TO_SHARED, PRIVATE = "__to_shared", "__private"
"""How the names of a task's own parts end; that of the common part has no ending."""
_COMMON = ""


@dataclass(frozen=True)
class Part:
    """Which neurons of a layer are shared, some but not all: True along the axis of its weight that reads, and the one
    that makes.
    """

    reads: np.ndarray
    makes: np.ndarray


def cut_up(layer: Layer, array: np.ndarray, part: Part) -> dict[str, np.ndarray]:
    """The parts of a layer's weight, by the ending of their names; some may be empty."""
    reads, makes = _axes(layer)
    shared = array.compress(part.makes, makes)
    return {
        _COMMON: shared.compress(part.reads, reads),
        TO_SHARED: shared.compress(~part.reads, reads),
        PRIVATE: array.compress(~part.makes, makes),
    }


def put_together(layer: Layer, pieces: Mapping[str, np.ndarray], part: Part) -> np.ndarray:
    """The inverse of `cut_up`; empty pieces may be missing."""
    axes = _axes(layer)
    array = np.empty(layer.weight_shape, pieces[_COMMON].dtype)
    inside = np.moveaxis(array, axes, (0, 1))
    everything = np.ones_like(part.reads)
    places = {
        _COMMON: (part.reads, part.makes),
        TO_SHARED: (~part.reads, part.makes),
        PRIVATE: (everything, ~part.makes),
    }
    for ending, piece in pieces.items():
        inside[np.ix_(*places[ending])] = np.moveaxis(piece, axes, (0, 1))
    return array


def _axes(layer: Layer) -> tuple[int, int]:
    """The axes of the weight that read and make."""
    reads = read_axis(layer.node)
    assert reads is not None
    return reads, 1 - reads
