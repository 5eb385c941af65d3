"""Give every Conv and Gemm a bias vector, zero where it had none (exact).

A folded norm, a repair or a least-squares fit needs somewhere to put the shift.

"""

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.weights import add_initializer, get_array, set_array


class EnsureBiases(oir.passes.InPlacePass):
    """Add missing biases; spread a scalar one over its channels."""

    preserves = "exact"

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Add or widen the biases."""
        modified = False
        for layer in find_layers(model):
            if layer.bias is not None:
                bias = get_array(layer.bias)
                if bias.shape != (layer.out_channels,):
                    set_array(layer.bias, np.broadcast_to(bias.reshape(-1), (layer.out_channels,)))
                    modified = True
            elif layer.op in ("Conv", "Gemm"):
                dtype = get_array(layer.weight).dtype
                value = add_initializer(model.graph, f"{layer.weight.name}__bias", np.zeros(layer.out_channels, dtype))
                if len(layer.node.inputs) < 3:
                    layer.node.resize_inputs(3)
                layer.node.replace_input_with(2, value)
                modified = True
        return oir.passes.PassResult(model, modified)
