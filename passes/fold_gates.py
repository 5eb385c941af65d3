"""Fold gates: each gate is multiplied into the weights that read its channel, (W diag g) f = W (f * g) (exact).

What was gated may be fixed in this way, and channels whose gate is 0 are dead afterwards (see `gate_places`).
"""

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.rules.registry import integer, required
from onnxmerge.ir.weights import get_array, set_array
from onnxmerge.passes.gate_places import OPEN, GatePlaces
from onnxmerge.passes.roles import read_axis


class FoldGates(oir.passes.FunctionalPass):
    """Multiply `gates` [gates of `places`] into the weights of the model that `places` was found for."""

    preserves = "exact"

    def __init__(self, places: GatePlaces, gates: np.ndarray):
        self.places, self.gates = places, gates

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """A copy of the model with the gates in its weights."""
        folded, nodes = model.clone(), list(model.graph)
        for own in self.places.values:
            factors = np.where(own.gate == OPEN, 1.0, self.gates[own.gate])
            for node in (nodes[number] for number in own.readers):
                weight = folded.graph.initializers[required(node, 1).name or ""]
                set_array(weight, _scaled(node, get_array(weight), factors))
        return oir.passes.PassResult(folded, modified=bool(self.places.values))


def _scaled(node: oir.Node, weight: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The weight of a layer times `factors`, one for each channel that it reads."""
    axis, groups = read_axis(node), integer(node, "group", 1)
    assert axis is not None
    if node.op_type == "Conv" and groups > 1:  # [M, C/g, ...]: the rows of a group read its own channels
        of_group = np.repeat(factors.reshape(groups, -1), len(weight) // groups, axis=0)
        return weight * of_group.reshape(*of_group.shape, *[1] * (weight.ndim - 2))
    return weight * factors.reshape([-1 if own == axis else 1 for own in range(weight.ndim)])
