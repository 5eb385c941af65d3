"""Fictive inputs (exact): an input with fewer channels than its network reads, the others zeros.

Source: the joint input layer of He, Zhou and Thiele, Multi-Task Zipping, 2018, section 3.4.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.compose import cut_out, finish, rename_value
from onnxmerge.ir.labels import dims, rank
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.ir.weights import add_initializer, get_array, set_array
from onnxmerge.passes.add_fictive import AddFictive
from onnxmerge.passes.roles import read_axis, title

_FRONT = "__own"


@dataclass(frozen=True)
class Padding:
    """How many zeros follow an input's own entries along an axis."""

    axis: int
    zeros: int

    def pad(self, array: np.ndarray) -> np.ndarray:
        """The array and its zeros."""
        return np.pad(array, [(0, self.zeros if axis == self.axis else 0) for axis in range(array.ndim)])


class AddFictiveInputs(oir.passes.FunctionalPass):
    """Let a network read more channels of an input, which do not count.

    For the time of the pass an identity stands between the input and its readers: so the input's channels are a space.

    Args:
        name: the input.
        padding: how many more.
    """

    preserves = "exact"

    def __init__(self, name: str, padding: Padding):
        self.name = name
        self.padding = padding

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """A copy.

        Raises:
            ModelError: something else than a layer reads these channels (see `AddFictive`).
        """
        if dims(self._input(model))[self.padding.axis] == 1:
            return oir.passes.PassResult(self._of_one(model.clone()), modified=True)
        fronted = self._with_identity(model.clone())
        found = [space for space in find_spaces(fronted).permutable() if not space.blocks and space.value(self.name)]
        if len(found) != 1 or found[0].value(self.name).axes != (self.padding.axis,):  # type: ignore[union-attr]
            raise ModelError(f"the channels of the input {self.name!r} are not read by layers alone")
        wide = AddFictive({found[0].name: found[0].size + self.padding.zeros})(fronted).model
        names = [value.name or "" for value in model.graph.inputs]
        return oir.passes.PassResult(cut_out(wide, names, [v.name or "" for v in model.graph.outputs]), modified=True)

    def _input(self, model: oir.Model) -> oir.Value:
        return next(value for value in model.graph.inputs if value.name == self.name)

    def _of_one(self, model: oir.Model) -> oir.Model:
        """A single channel is no space; what reads it must be layers."""
        source = self._input(model)
        for node, place in source.uses():
            axis = read_axis(node) if place == 0 else None
            weight = node.inputs[1] if axis is not None else None
            if axis is None or weight is None or weight.const_value is None or get_array(weight).shape[axis] != 1:
                raise ModelError(f"{title(node)}: it reads the only channel of {self.name!r} and is no plain layer")
            set_array(weight, Padding(axis, self.padding.zeros).pad(get_array(weight)))
        assert source.shape is not None
        sizes = list(source.shape)
        sizes[self.padding.axis] = 1 + self.padding.zeros
        source.shape = oir.Shape(sizes)
        return finish(model)

    def _with_identity(self, model: oir.Model) -> oir.Model:
        """The input is called otherwise, and what its readers read has its name."""
        source = self._input(model)
        readers, shape = list(source.uses()), dims(source)
        size = shape[self.padding.axis]
        assert size is not None
        eye = np.eye(size, dtype=np.float32)
        if self.padding.axis == rank(source) - 1:
            op, kernel = "MatMul", eye
        elif self.padding.axis == 1:
            op, kernel = "Conv", eye.reshape(size, size, *[1] * (rank(source) - 2))
        else:
            raise ModelError(f"the input {self.name!r} has its channels neither first nor last")
        rename_value(model, self.name, f"{self.name}{_FRONT}")
        weight = add_initializer(model.graph, f"{self.name}__identity", kernel)
        node = oir.node(op, [source, weight], name=f"{self.name}__front")
        read = node.outputs[0]
        read.name, read.type, read.shape = self.name, source.type, source.shape
        for reader, place in readers:
            reader.replace_input_with(place, read)
        first = next(iter(model.graph))
        model.graph.insert_before(first, node)
        return finish(model)


class PadInputs(oir.passes.InPlacePass):
    """Let a network take inputs without their zeros.

    Args:
        paddings: by the names of the inputs.
    """

    preserves = "exact"

    def __init__(self, paddings: Mapping[str, Padding]):
        self.paddings = paddings

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Put a Pad behind each input."""
        for number, value in enumerate(list(model.graph.inputs)):
            padding = self.paddings.get(value.name or "")
            if padding is not None:
                name = value.name or ""
                value.name = f"{name}__padded"
                own = own_input(value, name, padding)
                readers = list(value.uses())
                padded = padded_input(model.graph, own, padding, f"{name}__padded", front=True)
                for reader, place in readers:
                    reader.replace_input_with(place, padded)
                model.graph.inputs[number] = own
        return oir.passes.PassResult(model, modified=bool(self.paddings))


def own_input(wide: oir.Value, name: str, padding: Padding) -> oir.Value:
    """A graph input of this name for what a padded one stands for."""
    assert wide.shape is not None
    shape = [
        size - padding.zeros if axis == padding.axis and padding.zeros else size for axis, size in enumerate(wide.shape)
    ]
    return oir.Value(name=name, shape=oir.Shape(shape), type=wide.type)


def padded_input(graph: oir.Graph, own: oir.Value, padding: Padding, made: str, *, front: bool = False) -> oir.Value:
    """The value with its zeros, which a Pad in `graph` makes, in front of all nodes or behind them."""
    if not padding.zeros:
        return own
    amounts = np.zeros((2, rank(own)), np.int64)
    amounts[1, padding.axis] = padding.zeros
    node = oir.node("Pad", [own, add_initializer(graph, f"{made}__amounts", amounts.ravel())], name=f"{made}__pad")
    node.outputs[0].name = made
    if front:
        graph.insert_before(next(iter(graph)), node)
    else:
        graph.append(node)
    return node.outputs[0]
