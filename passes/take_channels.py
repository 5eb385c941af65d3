"""Put a network together from channels of several networks (approximate).

    W = sum_t a_t F_t W_t B_t  /  sum_t a_t F_t 1

With F_t [ours, theirs] the channels of ours that are taken from network t (a row of zeros where a channel is another
network's), and B_t [theirs, ours] what it reads in place of its own (see `channel_map` and `select_channels`). The
denominator is a_t for channels of network t; where no channels are made, as at the outputs, the networks are averaged.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.spaces import Space
from onnxmerge.ir.weights import get_array, set_array
from onnxmerge.passes.channel_map import MappedPartner, carry, constant_places, reading_axes, transported_array


class TakeChannels(oir.passes.InPlacePass):
    """Replace every float constant by what the partners, all networks that channels are taken from, make of it.

    Args:
        partners: with their maps and weights; the model's own network is one of them.
        spaces: of the model, without blocks.
    """

    preserves = "approximate"

    def __init__(self, partners: Sequence[MappedPartner], spaces: Sequence[Space]):
        self.partners = partners
        self.spaces = spaces

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Sum in float64; entries that no partner makes stay."""
        for value in model.graph.initializers.values():
            carried = [(partner, transported_array(value, partner, self.spaces)) for partner in self.partners]
            own = [(partner, array) for partner, array in carried if array is not None]
            if own:
                total = sum(partner.weight * array for partner, array in own)
                shares = sum(partner.weight * self._taken(value, partner) for partner, _ in own)
                kept = get_array(value).astype(np.float64)
                set_array(value, np.divide(total, shares, out=kept, where=shares > 0))
        return oir.passes.PassResult(model, modified=True)

    def _taken(self, value: oir.Value, partner: MappedPartner) -> np.ndarray:
        """F_t 1 in the shape of `value`."""
        name = value.name or ""
        inside = [space for space in self.spaces if any(slots.name == name for slots in space.weights)]
        places = constant_places(value, partner, inside)
        reading = reading_axes(value) or set()
        even = [
            replace(place, matrix=np.full(place.matrix.shape, 1 / place.matrix.shape[1]), order=None)
            if set(place.ours.axes) <= reading
            else replace(place, order=None)
            for place in places
        ]
        ones = np.ones(get_array(partner.model.graph.initializers[partner.constants[name]]).shape)
        return carry(ones, get_array(value).shape, even, name)
