"""Average the weights of several networks of any widths, carried over to the first's channels (approximate).

    W = (a_1 W_1 + sum_t a_t F_t W_t B_t) / sum_t a_t,    F_t and B_t the maps of `channel_map`

OTFusion (Singh and Jaggi 2020) with channel spaces in place of layers. Where all maps are permutations it is `Average`.
"""

from collections.abc import Sequence

import onnx_ir as oir

from onnxmerge.ir.spaces import Space
from onnxmerge.ir.weights import get_array, set_array
from onnxmerge.passes.average import weighted_mean
from onnxmerge.passes.channel_map import MappedPartner, transported_array


class TransportAverage(oir.passes.InPlacePass):
    """Replace every float constant by the weighted mean of it and of the transported ones of the partners that have it.

    Args:
        partners: the other networks.
        spaces: of the model it is called on, without blocks.
        weight: of that model.
    """

    preserves = "approximate"

    def __init__(self, partners: Sequence[MappedPartner], spaces: Sequence[Space], weight: float = 1.0):
        self.partners = partners
        self.spaces = spaces
        self.weight = weight

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Average in float64."""
        for value in model.graph.initializers.values():
            carried = [(p.weight, transported_array(value, p, self.spaces)) for p in self.partners]
            others = [(share, array) for share, array in carried if array is not None]
            if others:
                set_array(value, weighted_mean(get_array(value), self.weight, others))
        return oir.passes.PassResult(model, modified=True)
