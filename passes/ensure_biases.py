"""Give every Conv, Gemm and MatMul layer a bias vector, zero where it had none (exact).

A folded norm, a repair or a least-squares fit needs somewhere to put the shift.
"""

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.layers import Layer, find_layers
from onnxmerge.ir.weights import add_initializer, get_array, set_array


class EnsureBiases(oir.passes.InPlacePass):
    """Add missing biases, behind a MatMul as an Add; spread a scalar one over its channels."""

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
            elif layer.op in ("Conv", "Gemm", "MatMul"):
                dtype = get_array(layer.weight).dtype
                value = add_initializer(model.graph, f"{layer.weight.name}__bias", np.zeros(layer.out_channels, dtype))
                if layer.op == "MatMul":
                    _add_behind(model.graph, layer, value)
                else:
                    if len(layer.node.inputs) < 3:
                        layer.node.resize_inputs(3)
                    layer.node.replace_input_with(2, value)
                modified = True
        return oir.passes.PassResult(model, modified)


def _add_behind(graph: oir.Graph, layer: Layer, bias: oir.Value) -> None:
    """Add `bias` to what the layer makes; the sum takes the name of the product, which taps and outputs go by."""
    product = layer.node.outputs[0]
    add = oir.node("Add", [product, bias], name=f"{layer.node.name}__bias")
    total = add.outputs[0]
    total.shape, total.type = product.shape, product.type
    readers = [use for use in product.uses() if use.node is not add]
    for node, index in readers:
        node.replace_input_with(index, total)
    for index, output in enumerate(graph.outputs):
        if output is product:
            graph.outputs[index] = total
    total.name, product.name = product.name, f"{product.name}__product"
    graph.insert_after(layer.node, add)
