"""Put a 1x1 adapter behind an input of a network: a linear map on the channels that come in.

With a permutation, or any other inverse of what the channels that come in were made by, a tail reads a stem in another
network's channels and nothing changes; `Refit` then makes it the best linear map. Residual adapters: Rebuffi et al.
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
        matrix: [own channels, arriving channels]
        output: name of the adapted value.
    """

    preserves = "exact"

    def __init__(self, axis: int, matrix: np.ndarray, output: str):
        self.axis = axis
        self.matrix = matrix
        self.output = output

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Conv for channels on axis 1 of images, Gemm for rank 2, MatMul and Add for channels on the last axis."""
        (source,) = model.graph.inputs
        own, arriving = self.matrix.shape
        dtype = source.dtype.numpy() if source.dtype is not None else np.dtype(np.float32)
        matrix = self.matrix.astype(dtype)
        shape = self._shape(source, own)
        dimensions = rank(source)
        convolution = self.axis == 1 and dimensions > 2
        kernel = [1] * (dimensions - 2)
        array = matrix.reshape(own, arriving, *kernel) if convolution else np.ascontiguousarray(matrix.T)
        weight = add_initializer(model.graph, f"{NAME}_weight", array)
        bias = add_initializer(model.graph, f"{NAME}_bias", np.zeros(own, dtype))
        readers = list(source.uses())
        if convolution:
            nodes = [oir.node("Conv", [source, weight, bias], {"kernel_shape": kernel}, name=NAME)]
        elif dimensions == 2:
            nodes = [oir.node("Gemm", [source, weight, bias], name=NAME)]
        else:
            product = oir.node("MatMul", [source, weight], name=f"{NAME}_matmul")
            product.outputs[0].name = f"{NAME}_product"
            product.outputs[0].shape, product.outputs[0].type = shape, source.type
            nodes = [product, oir.node("Add", [product.outputs[0], bias], name=NAME)]
        adapted = nodes[-1].outputs[0]
        adapted.name, adapted.shape, adapted.type = self.output, shape, source.type
        source.shape = self._shape(source, arriving)
        first = next(iter(model.graph), None)
        if first is None:
            model.graph.extend(nodes)
        else:
            model.graph.insert_before(first, nodes)
        for node, index in readers:
            node.replace_input_with(index, adapted)
        return oir.passes.PassResult(model, modified=True)

    def _shape(self, value: oir.Value, channels: int) -> oir.Shape:
        return oir.Shape([channels if axis == self.axis else size for axis, size in enumerate(value.shape or ())])
