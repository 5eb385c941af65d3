"""Split private channels off a network whose other channels are computed elsewhere (exact).

Of n = m + p channels in each space the first m are shared: another network, the *stem*, computes them from shared
channels alone. What is left computes the p private ones; its layers read shared and private channels side by side,

    y_private = W_private [x_shared; x_private] + b_private,

so the result is the whole network, as long as the shared channels of its layers do not read private ones. Layers that
treat each channel by itself (depthwise) read private channels only. MTZ calls this partial sharing (He et al. 2018,
section 3.2); there shared neurons may read private ones, which then have to be computed once for each task.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.compose import cut_out, finish
from onnxmerge.ir.labels import dims
from onnxmerge.ir.layers import Layer, find_layers
from onnxmerge.ir.space import Space
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.ir.weights import get_array, set_array
from onnxmerge.passes.prune import Prune
from onnxmerge.passes.roles import read_axis

STEM = "stem/"
"""Prefix of the inputs that are values of the stem."""


class SplitOff(oir.passes.FunctionalPass):
    """Keep the private channels of the model it is called on, a stem whose only output is open.

    The result reads the inputs and the stem's values (`STEM` + name), and its output is all channels of the stem's last
    value, the shared ones first.

    Args:
        shared: m by space; spaces that are not named are wholly shared.
        stem: the network of the shared channels, with the same names.
    """

    preserves = "exact"

    def __init__(self, shared: Mapping[str, int], stem: oir.Model):
        self.shared = shared
        self.stem = stem

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """A new model.

        Raises:
            ModelError: a layer reads channels that cannot be told apart into shared and private ones.
        """
        (output,) = model.graph.outputs
        end = output.name or ""
        whole = {space.name: space for space in find_spaces(model, frozenset([end])).spaces}
        keep = {
            name: np.arange(shared, whole[name].size)
            for name, shared in self.shared.items()
            if name in whole and shared < whole[name].size
        }
        private: oir.Model = Prune(keep, whole)(model).model if keep else model.clone()
        partial = {slots.name: whole[name] for name in keep for slots in whole[name].values}
        split = _Split(model, private, self.stem, partial)
        plain = {layer.name for layer in find_layers(model) if layer.groups == 1}
        for layer in find_layers(private):
            if layer.name in plain and layer.linear.name in partial and layer.input.name in partial:
                split.widen(layer, keep)
        private.graph.outputs[0] = split.joined(end) if end in partial else split.of_stem(end)
        split.read_shared()
        inputs = [value.name or "" for value in private.graph.inputs]
        private.graph.sort()
        result = cut_out(private, inputs, [private.graph.outputs[0].name or ""])
        return oir.passes.PassResult(finish(_without_unused_inputs(result)), modified=True)


class _Split:
    """One run."""

    def __init__(self, model: oir.Model, private: oir.Model, stem: oir.Model, partial: Mapping[str, Space]):
        self._graph, self._partial = private.graph, partial
        self._layers = {layer.name: layer for layer in find_layers(model)}
        self._values = {o.name or "": o for node in private.graph for o in node.outputs}
        self._stem = {o.name or "": o for node in stem.graph for o in node.outputs}
        self._joined: dict[str, oir.Value] = {}

    def widen(self, layer: Layer, keep: Mapping[str, np.ndarray]) -> None:
        """Let a layer that makes private channels read the shared ones too."""
        read, made = layer.input.name or "", self._partial[layer.linear.name or ""]
        axis = read_axis(layer.node)
        weight = get_array(self._layers[layer.name].weight)
        (rows,) = (s for s in made.weights if s.name == layer.weight.name and s.axes != (axis,))
        assert axis is not None
        space = self._partial[read]
        columns = self._columns(read, self._layers[layer.name], space.size - len(keep[space.name]))
        taken = np.take(weight, rows.index[keep[made.name]].ravel(), rows.axes[0])
        set_array(layer.weight, np.take(taken, columns, axis))
        layer.node.replace_input_with(0, self.joined(read))

    def joined(self, name: str) -> oir.Value:
        """All channels of a value: the stem's, then the private ones."""
        if name not in self._joined:
            own = self._values[name]
            node = oir.node("Concat", [self.of_stem(name), own], {"axis": self._axis(name)}, name=f"{name}/whole")
            node.outputs[0].name, node.outputs[0].type = f"{name}/whole", own.type
            self._graph.append(node)
            self._joined[name] = node.outputs[0]
        return self._joined[name]

    def of_stem(self, name: str) -> oir.Value:
        """The input that is the stem's value `name`."""
        found = next((value for value in self._graph.inputs if value.name == STEM + name), None)
        if found is None:
            theirs = self._stem[name]
            found = oir.Value(name=STEM + name, shape=theirs.shape, type=theirs.type)
            self._graph.inputs.append(found)
        return found

    def read_shared(self) -> None:
        """What is wholly shared is the stem's."""
        for name, value in self._values.items():
            if name not in self._partial and name in self._stem:
                readers = list(value.uses())
                if any(o.name in self._partial for node, _ in readers for o in node.outputs):
                    for node, index in readers:
                        node.replace_input_with(index, self.of_stem(name))

    def _columns(self, name: str, layer: Layer, first: int) -> np.ndarray:
        """For each position along the axis that reads [shared; private] the whole network's.

        The stem's and the private channels each stand in the order that they have there.
        """
        slots = self._partial[name].value(name)
        if slots is None or slots.index.size != dims(layer.input)[self._axis(name)]:
            raise ModelError(f"{layer.name!r}: it reads channels of several kinds, so none of them can be private")
        return np.concatenate([np.sort(slots.index[:first].ravel()), np.sort(slots.index[first:].ravel())])

    def _axis(self, name: str) -> int:
        slots = self._partial[name].value(name)
        if slots is None or len(slots.axes) != 1:
            raise ModelError(f"{name!r}: its channels do not lie on one axis, so none of them can be private")
        return slots.axes[0]


def _without_unused_inputs(model: oir.Model) -> oir.Model:
    for value in [v for v in model.graph.inputs if not v.uses()]:
        model.graph.inputs.remove(value)
    return model
