"""Collapse a hidden layer: remove it and its activation, and let the next layer do its part (approximate).

    y = W2 f(W1 x + b1) + b2   becomes   y = (W2 D W1) x + (W2 D b1 + b2),   D = diag(d)

For a ReLU, d_i is 1 where neuron i is on and 0 where it is off, which depends on the input. It is set once and for all
from the pre-activations z_ti of samples t, with step(z) = 1 for z >= 0 and 0 below:

    sign-of-sum    d_i = step(sum_t z_ti)
    majority       d_i = 1 when z_ti > 0 for at least half of the samples, else 0
    mean-sign      d_i = mean_t step(z_ti)

A slope s_i below zero (LeakyRelu, PRelu) makes d_i + (1 - d_i) s_i of it; no activation makes 1. So the result is exact
where no pre-activation changes its sign. Every position of a convolution counts as a sample.

The paper merges dense layers only. Convolutions can be merged too where one of the two is 1x1 with stride 1 and no
padding, for W2 D W1 is then a kernel of the other's size:

- a 1x1 behind any convolution: no further error, at borders and with strides neither;
- any convolution behind a 1x1: no further error inside. Where its padding reaches over the border, the merged bias
  holds W2 D b1 of the taps out there too, although they used to read zeros. A bias cannot depend on the place, so this
  is left: it concerns the border only, while D is an estimate everywhere.

Two larger kernels would need one larger than either and are refused.

Source: CLAFusion (Nguyen et al.), section 3.2, "Merge layers in model A".
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.labels import rank
from onnxmerge.ir.layers import Layer, find_layers
from onnxmerge.ir.normalise import infer_shapes
from onnxmerge.ir.rules.registry import integer
from onnxmerge.ir.weights import add_initializer, get_array, set_array
from onnxmerge.passes.roles import title
from onnxmerge.runtime.activations import Samples, stream
from onnxmerge.runtime.patches import channel_axis

Estimate = Literal["sign-of-sum", "majority", "mean-sign"]
_SLOPED = ("Relu", "LeakyRelu", "PRelu")


@dataclass(frozen=True)
class Signs:
    """What is known of the signs of a layer's pre-activations over `count` samples times positions: [channels] each."""

    count: int
    total: np.ndarray
    """Sum."""
    positive: np.ndarray
    """How many are above zero."""
    negative: np.ndarray
    """How many are below zero."""

    def share_on(self, estimate: Estimate) -> np.ndarray:
        """[channels] in [0, 1]: how far each neuron is on.

        Raises:
            UsageError: there is no such estimate.
        """
        if estimate == "sign-of-sum":
            return (self.total >= 0).astype(np.float64)
        if estimate == "majority":
            return (2 * self.positive >= self.count).astype(np.float64)
        if estimate == "mean-sign":
            return 1 - self.negative / self.count
        raise UsageError(f"there is no estimate {estimate!r}: choose sign-of-sum, majority or mean-sign")


def find_signs(model: oir.Model, layer: str, samples: Samples, *, threads: int | None = None) -> Signs:
    """Run `model` over `samples` and count the signs of the pre-activations of `layer`.

    Raises:
        UsageError: there is no such layer, or there are no samples.
    """
    found = _find(find_layers(model), layer)
    name = found.pre_activation.name or ""
    count = 0
    total, positive, negative = (np.zeros(found.out_channels) for _ in range(3))
    for batch in stream(model, samples, [name], threads=threads):
        rows = np.moveaxis(batch[name], channel_axis(found), -1).reshape(-1, found.out_channels)
        count += len(rows)
        total += rows.sum(0, dtype=np.float64)
        positive += (rows > 0).sum(0)
        negative += (rows < 0).sum(0)
    if count == 0:
        raise UsageError("signs cannot be estimated without samples")
    return Signs(count, total, positive, negative)


class Collapse(oir.passes.InPlacePass):
    """Remove a layer and its activation; the layer that reads them keeps its name and gets W2 D W1 and W2 D b1 + b2.

    Args:
        layer: name of the layer to remove.
        signs: of its pre-activations.
        estimate: how D comes from them.
    """

    preserves = "approximate"

    def __init__(self, layer: str, signs: Signs, estimate: Estimate = "sign-of-sum"):
        self.layer = layer
        self.signs = signs
        self.estimate = estimate

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Remove it.

        Raises:
            UsageError: there is no such layer or estimate, or the signs are of another layer.
            ModelError: the activation is not piecewise linear around zero, or the next layer cannot take over.
        """
        layers = find_layers(model)
        first = _find(layers, self.layer)
        on = self.signs.share_on(self.estimate)
        if on.shape != (first.out_channels,):
            raise UsageError(f"{self.layer!r} has {first.out_channels} channels, but the signs are of {len(on)}")
        second = _reader(first, layers)
        slopes = _slopes(first)
        _check(first, second)
        gain = on + (1 - on) * slopes
        weight, shift = _merged(first, second, gain)
        if _pointwise(second) and not _pointwise(first):
            second.node.attributes.clear()
            second.node.attributes.update(first.node.attributes)
        set_array(second.weight, weight)
        _add_to_bias(model.graph, second, shift)
        _remove(model.graph, first, second)
        infer_shapes(model)
        return oir.passes.PassResult(model, modified=True)


def _find(layers: list[Layer], name: str) -> Layer:
    found = next((layer for layer in layers if layer.name == name), None)
    if found is None:
        raise UsageError(f"the network has no layer {name!r}")
    return found


def _reader(first: Layer, layers: list[Layer]) -> Layer:
    """The one layer that reads what `first` and its activation make."""
    made = first.pre_activation if first.activation is None else first.activation.outputs[0]
    readers = [node for node, _ in made.uses()]
    if made.is_graph_output() or first.pre_activation.is_graph_output() or len(readers) != 1:
        raise ModelError(f"layer {first.name!r} cannot be collapsed: {made.name!r} is not read by one layer alone")
    second = next((layer for layer in layers if layer.node is readers[0] and layer.input is made), None)
    if second is None:
        raise ModelError(f"layer {first.name!r} cannot be collapsed: {title(readers[0])} lies before the next layer")
    return second


def _slopes(first: Layer) -> np.ndarray:
    """[channels]: the derivative of the layer's activation below zero."""
    if first.norm is not None:
        raise ModelError(f"layer {first.name!r} cannot be collapsed: {title(first.norm)} has not been folded into it")
    count, activation = first.out_channels, first.activation
    if activation is None:
        return np.ones(count)
    if activation.op_type not in _SLOPED:
        raise ModelError(f"layer {first.name!r} cannot be collapsed: {title(activation)} is no ReLU, leaky or not")
    if activation.op_type == "Relu":
        return np.zeros(count)
    if activation.op_type == "LeakyRelu":
        return np.full(count, activation.attributes["alpha"].as_float() if "alpha" in activation.attributes else 0.01)
    given = activation.inputs[1]
    shape = [1] * rank(first.linear)
    shape[channel_axis(first)] = count
    try:
        if given is None or given.const_value is None:
            raise ValueError
        return np.broadcast_to(get_array(given), shape).reshape(-1).astype(np.float64)
    except ValueError:
        raise ModelError(
            f"layer {first.name!r} cannot be collapsed: {title(activation)} has not one constant slope for each channel"
        ) from None


def _check(first: Layer, second: Layer) -> None:
    """Refuse pairs of layers whose product is no layer of the second's sort."""
    for layer in (first, second):
        convolution = layer.op == "Conv" and layer.groups == 1
        matrix = layer.op in ("Gemm", "MatMul") and len(layer.weight_shape) == 2
        if not (convolution or matrix) or integer(layer.node, "transA", 0):
            raise ModelError(f"{title(layer.node)} cannot be collapsed: it is no dense layer and no plain convolution")
    if (first.op == "Conv") != (second.op == "Conv"):
        raise ModelError(f"{title(first.node)} cannot be collapsed into {title(second.node)}, which is of another kind")
    if not (_pointwise(first) or _pointwise(second)):
        raise ModelError(
            f"{title(first.node)} cannot be collapsed into {title(second.node)}: neither is 1x1 without stride and pads"
        )


def _pointwise(layer: Layer) -> bool:
    """Whether the layer is one matrix at every place: dense, or 1x1 with stride 1 and no padding."""
    if layer.op != "Conv":
        return True
    lists = {n: layer.node.attributes[n].as_ints() for n in ("strides", "pads") if n in layer.node.attributes}
    sizes = (*layer.weight_shape[2:], *lists.get("strides", ()))
    return all(size == 1 for size in sizes) and not any(lists.get("pads", ()))


def _merged(first: Layer, second: Layer, gain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """W2 D W1, as the second layer stores its weight, and W2 D b1, [outputs]."""
    outer, inner = _outputs_first(second), _outputs_first(first)
    bias = np.zeros(len(gain)) if first.bias is None else get_array(first.bias).astype(np.float64).reshape(-1)
    taps = outer.reshape(*outer.shape[:2], -1).sum(2)
    shift = taps @ (gain * bias)
    if _pointwise(first):
        matrix = gain[:, None] * inner.reshape(len(gain), -1)
        product = np.moveaxis(np.tensordot(outer, matrix, (1, 0)), -1, 1)
    else:
        product = np.tensordot(outer.reshape(outer.shape[:2]) * gain, inner, 1)
    flipped = second.op != "Conv" and not second.transposed
    return (product.T if flipped else product), shift


def _outputs_first(layer: Layer) -> np.ndarray:
    """[outputs, inputs, *kernel] in float64."""
    array = get_array(layer.weight).astype(np.float64)
    return array if layer.op == "Conv" or layer.transposed else array.T


def _add_to_bias(graph: oir.Graph, layer: Layer, shift: np.ndarray) -> None:
    """Add `shift` to the layer's bias; one that had none gets one where it needs it."""
    if layer.bias is not None:
        bias = get_array(layer.bias)
        axes = [1] * (bias.ndim - 1)
        set_array(layer.bias, (bias.reshape(-1) + shift).reshape(*axes, -1))
        return
    if not shift.any():
        return
    value = add_initializer(graph, f"{layer.weight.name}__bias", shift.astype(get_array(layer.weight).dtype))
    if layer.op != "MatMul":
        if len(layer.node.inputs) < 3:
            layer.node.resize_inputs(3)
        layer.node.replace_input_with(2, value)
        return
    product = layer.linear
    add = oir.node("Add", [product, value], name=f"{layer.node.name}__bias")
    total, name = add.outputs[0], product.name
    total.type = product.type
    product.replace_all_uses_with(total, replace_graph_outputs=True)
    add.replace_input_with(0, product)
    product.name, total.name = f"{name}__product", name
    graph.insert_after(layer.node, add)


def _remove(graph: oir.Graph, first: Layer, second: Layer) -> None:
    """Let the second layer read what the first read, and drop the first's nodes and arrays."""
    second.node.replace_input_with(0, first.input)
    nodes = [] if first.activation is None else [first.activation]
    if first.linear is not first.node.outputs[0]:
        producer = first.linear.producer()
        assert producer is not None
        nodes.append(producer)
    nodes.append(first.node)
    arrays = [v for node in nodes for v in node.inputs if v is not None and v.const_value is not None]
    graph.remove(nodes, safe=True)
    for value in arrays:
        if not value.uses():
            del graph.initializers[value.name or ""]
