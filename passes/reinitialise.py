"""Give a model fresh random weights: training it from scratch is what a merge must beat (nothing of it is preserved).

Weight and bias of every layer are drawn from U(-r, r), r = 1 / sqrt(fan_in), as PyTorch does by default in Linear and
Conv layers: the uniform distribution of He et al. 2015 ("Delving deep into rectifiers") with the gain of a leaky ReLU
of slope sqrt(5). fan_in is how many numbers make one output: [out, in / groups, *kernel] has in / groups times the
kernel's size. A transposed convolution [in, out / groups, *kernel] counts out / groups there, as PyTorch does.
"""

import math

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.layers import Layer, find_layers
from onnxmerge.ir.weights import get_array, set_array

_FRESH = {
    "BatchNormalization": (1.0, 0.0, 0.0, 1.0),  # scale, shift, running mean and variance
    "InstanceNormalization": (1.0, 0.0),
    "LayerNormalization": (1.0, 0.0),
    "GroupNormalization": (1.0, 0.0),
}


class Reinitialise(oir.passes.InPlacePass):
    """Draw every layer's weight and bias anew; norms get scale 1, shift 0, mean 0 and variance 1.

    All other arrays (slopes, tables, constants of arithmetic) stay. Each array is drawn by the seed and its own name,
    so neither the order of nodes nor what else is in the model changes it.
    """

    preserves = "approximate"

    def __init__(self, seed: int):
        """`seed` is at least 0."""
        super().__init__()
        self._seed = seed

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Replace the arrays; shapes and element types stay."""
        modified = False
        for layer in find_layers(model):
            bound = 1 / math.sqrt(max(_fan_in(layer), 1))
            for value in (layer.weight, layer.bias):
                if value is not None:
                    self._draw(value, bound)
                    modified = True
        for node in model.graph:
            for value, number in zip(node.inputs[1:], _FRESH.get(node.op_type, ()), strict=False):
                if value is not None and value.const_value is not None:
                    set_array(value, np.full_like(get_array(value), number))
                    modified = True
        return oir.passes.PassResult(model, modified)

    def _draw(self, value: oir.Value, bound: float) -> None:
        generator = np.random.default_rng([self._seed, *(value.name or "").encode()])
        set_array(value, generator.uniform(-bound, bound, get_array(value).shape))


def _fan_in(layer: Layer) -> int:
    shape = layer.weight_shape
    if layer.op in ("Conv", "ConvTranspose"):
        return math.prod(shape[1:])
    return shape[-1] if layer.transposed else shape[-2:][0]
