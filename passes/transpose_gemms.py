"""Store the weight of every Gemm layer as [out, in], `transB` = 1 (exact), so that equal layers look equal.

X W + b = X (W')' + b
"""

import onnx_ir as oir

from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.weights import get_array, set_array


class TransposeGemms(oir.passes.InPlacePass):
    """Transpose the weights of Gemm layers that store them as [in, out]."""

    preserves = "exact"

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Rewrite weights and attributes."""
        modified = False
        for layer in find_layers(model):
            if layer.op == "Gemm" and not layer.transposed:
                set_array(layer.weight, get_array(layer.weight).T)
                layer.node.attributes["transB"] = oir.AttrInt64("transB", 1)
                modified = True
        return oir.passes.PassResult(model, modified)
