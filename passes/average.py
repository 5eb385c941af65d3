"""Average the aligned weights of several networks (approximate).

    W = sum_t a_t P_t W_t / sum_t a_t,    P_t the alignment of network t with the first

Weight averaging after permutation alignment: Singh and Jaggi (OTFusion, 2020), Ainsworth et al. (2023). Without
alignment it is Zippering's equation 1.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.spaces import Space
from onnxmerge.ir.weights import get_array, is_float, set_array
from onnxmerge.passes.align import Alignment
from onnxmerge.passes.permute import permute_slots


@dataclass(frozen=True)
class Partner:
    """Another network, which of its constants stands for which of ours, and its alignment."""

    model: oir.Model
    constants: Mapping[str, str]
    alignment: Alignment
    weight: float = 1.0


class Average(oir.passes.InPlacePass):
    """Replace every float constant that all partners have by the weighted mean of the aligned ones."""

    preserves = "approximate"

    def __init__(self, partners: Sequence[Partner], spaces: Sequence[Space], weight: float = 1.0):
        self.partners = partners
        self.spaces = spaces
        self.weight = weight

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Average in float64."""
        for name, value in model.graph.initializers.items():
            if not is_float(value) or any(name not in partner.constants for partner in self.partners):
                continue
            arrays = ((partner.weight, aligned_array(name, partner, self.spaces)) for partner in self.partners)
            set_array(value, weighted_mean(get_array(value), self.weight, arrays))
        return oir.passes.PassResult(model, modified=True)


def weighted_mean(own: np.ndarray, weight: float, others: Iterable[tuple[float, np.ndarray]]) -> np.ndarray:
    """The mean, in float64, of `own` and the arrays of `others`, each with its weight."""
    mean, total = weight * own.astype(np.float64), weight
    for share, array in others:
        mean += share * array
        total += share
    return mean / total


def aligned_array(name: str, partner: Partner, spaces: Sequence[Space]) -> np.ndarray:
    """The partner's array that stands for our constant `name`, its channels in our order."""
    array = get_array(partner.model.graph.initializers[partner.constants[name]])
    for space in spaces:
        for slots in space.weights:
            if slots.name == name:
                array = permute_slots(array, slots, partner.alignment[space.name])
    return array
