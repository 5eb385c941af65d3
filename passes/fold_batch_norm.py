"""Fold each batch norm into the convolution or matrix before it (exact).

With scale g, bias b, running mean m, variance v and r = g / sqrt(v + epsilon), for output channel c:

    W'[c] = r[c] W[c],    bias'[c] = r[c] (bias[c] - m[c]) + b[c]
"""

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.layers import Layer, find_layers
from onnxmerge.ir.weights import add_initializer, get_array, set_array


class FoldBatchNorm(oir.passes.InPlacePass):
    """Remove every batch norm that alone follows a Conv or a Gemm."""

    preserves = "exact"

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Rewrite weights and biases, then drop the norms."""
        modified = False
        for layer in find_layers(model):
            if layer.norm is not None and _foldable(layer, layer.norm):
                _fold(model.graph, layer, layer.norm)
                modified = True
        return oir.passes.PassResult(model, modified)


def _foldable(layer: Layer, norm: oir.Node) -> bool:
    constant = all(value is not None and value.const_value is not None for value in norm.inputs[1:5])
    return constant and norm.op_type == "BatchNormalization" and layer.op in ("Conv", "Gemm")


def _fold(graph: oir.Graph, layer: Layer, norm: oir.Node) -> None:
    scale, shift, mean, variance = (get_array(v).astype(np.float64) for v in norm.inputs[1:5] if v is not None)
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    ratio = scale / np.sqrt(variance + epsilon)
    weight = get_array(layer.weight).astype(np.float64)
    out_axis = 0 if layer.op == "Conv" or layer.transposed else 1
    shape = [1] * weight.ndim
    shape[out_axis] = -1
    bias = np.zeros_like(ratio) if layer.bias is None else get_array(layer.bias).astype(np.float64)
    set_array(layer.weight, weight * ratio.reshape(shape))
    folded = ratio * (bias - mean) + shift
    if layer.bias is None:
        dtype = get_array(layer.weight).dtype
        value = add_initializer(graph, f"{layer.weight.name}__bias", folded.astype(dtype))
        if len(layer.node.inputs) < 3:
            layer.node.resize_inputs(3)
        layer.node.replace_input_with(2, value)
    else:
        set_array(layer.bias, folded)
    before, after = norm.inputs[0], norm.outputs[0]
    assert before is not None
    name = after.name
    after.replace_all_uses_with(before, replace_graph_outputs=True)
    parameters = [v for v in norm.inputs[1:] if v is not None]
    graph.remove(norm, safe=True)
    after.name = f"{name}__folded"
    before.name = name  # taps and outputs keep the name of the value they stood for
    for value in parameters:
        if not value.uses():
            del graph.initializers[value.name or ""]
