"""Put a 1x1 adapter behind an input of a network: a linear map on the channels that come in.

It begins as the given order and gain, Z[order[i]] = gain[i] X[i], so that a tail reads a stem whose channels stand in
another network's order and scale (exact); `Refit` then makes it the best linear map. Residual adapters: Rebuffi et al.
2017.
"""

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.labels import rank
from onnxmerge.ir.weights import add_initializer

NAME = "adapter"


class InsertAdapter(oir.passes.InPlacePass):
    """Insert the adapter behind the only input.

    Args:
        axis: the channel axis of that input.
        order: `order[i]` is the network's own channel that arrives as channel i.
        output: name of the adapted value.
        gain: factor on each arriving channel.
    """

    preserves = "exact"

    def __init__(self, axis: int, order: np.ndarray, output: str, gain: np.ndarray):
        self.axis = axis
        self.order = order
        self.output = output
        self.gain = gain

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Conv for channels on axis 1 of images, Gemm for rank 2, MatMul and Add for channels on the last axis."""
        (source,) = model.graph.inputs
        size = len(self.order)
        dtype = source.dtype.numpy() if source.dtype is not None else np.dtype(np.float32)
        matrix = np.zeros((size, size), dtype)  # [own channel, arriving channel]
        matrix[self.order, np.arange(size)] = self.gain
        dimensions = rank(source)
        convolution = self.axis == 1 and dimensions > 2
        array = matrix.reshape(size, size, *[1] * (dimensions - 2)) if convolution else matrix.T
        weight = add_initializer(model.graph, f"{NAME}_weight", array)
        bias = add_initializer(model.graph, f"{NAME}_bias", np.zeros(size, dtype))
        readers = list(source.uses())
        if convolution:
            nodes = [oir.node("Conv", [source, weight, bias], {"kernel_shape": [1] * (dimensions - 2)}, name=NAME)]
        elif dimensions == 2:
            nodes = [oir.node("Gemm", [source, weight, bias], name=NAME)]
        else:
            product = oir.node("MatMul", [source, weight], name=f"{NAME}_matmul")
            product.outputs[0].name = f"{NAME}_product"
            product.outputs[0].shape, product.outputs[0].type = source.shape, source.type
            nodes = [product, oir.node("Add", [product.outputs[0], bias], name=NAME)]
        adapted = nodes[-1].outputs[0]
        adapted.name, adapted.shape, adapted.type = self.output, source.shape, source.type
        first = next(iter(model.graph), None)
        if first is None:
            model.graph.extend(nodes)
        else:
            model.graph.insert_before(first, nodes)
        for node, index in readers:
            node.replace_input_with(index, adapted)
        return oir.passes.PassResult(model, modified=True)
