"""Put a network together from linear maps of several networks' channels (approximate).

    W = sum_t F_t W_t B_t

With F_t [ours, theirs] what our channels take of network t's, and B_t [theirs, ours] what it reads in place of its own
(see `subspace`). Arrays that make no mapped channels are the mean over the networks.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.spaces import Space
from onnxmerge.ir.weights import get_array, is_float, set_array
from onnxmerge.passes.channel_map import MappedPartner, constant_places, reading_axes, transported_array


class MapChannels(oir.passes.InPlacePass):
    """Replace every float constant that all partners have by what they make of it.

    Args:
        partners: all networks that channels are taken from, with their maps.
        spaces: of the model it is called on, without blocks.
    """

    preserves = "approximate"

    def __init__(self, partners: Sequence[MappedPartner], spaces: Sequence[Space]):
        self.partners = partners
        self.spaces = spaces

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Sum in float64."""
        for name, value in model.graph.initializers.items():
            carried = [transported_array(value, partner, self.spaces) for partner in self.partners]
            arrays = [array for array in carried if array is not None]
            if not is_float(value) or len(arrays) < len(self.partners):
                continue
            reading = reading_axes(value) or set()
            inside = [space for space in self.spaces if any(slots.name == name for slots in space.weights)]
            places = constant_places(value, self.partners[0], inside)
            made = any(not set(place.ours.axes) <= reading for place in places)
            total = np.sum([array.astype(np.float64) for array in arrays], axis=0)
            set_array(value, (total if made else total / len(arrays)).astype(get_array(value).dtype))
        return oir.passes.PassResult(model, modified=True)
