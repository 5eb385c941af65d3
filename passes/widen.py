"""Widen: several networks of one architecture side by side, as one of their widths together (exact).

Each channel space becomes the union of the networks' channels. With weights a_t that sum to 1, a layer whose weight is
W_t in network t gets

    from a space to a space           diag(W_1, ..., W_N); biases and norms stand one after the other
    from a fixed axis (the input)     [W_1; ...; W_N]
    to a fixed axis (the output)      [a_1 W_1, ..., a_N W_N], bias sum_t a_t b_t

so the last layers write the weighted mean of what the networks' last layers write. What follows them is applied to
that mean: of a classifier that ends in a softmax the logits are averaged, of a generator that ends in a tanh what goes
into it. In each space of the result a run of the first network's channels comes before that of the second. Groups of a
convolution add up where the channels of each lie together, else each group becomes block-diagonal.

A node that would mix the networks, such as a norm over channels, a softmax over them or a product of queries and keys,
stands once for each network, and works on that network's part of the channels (see `beside_alone`).

This is the "big student" of Pašen and Boža, Merging of neural networks, section 2.1.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.correspond import correspond
from onnxmerge.ir.weights import get_array
from onnxmerge.passes.roles import title
from onnxmerge.passes.widening import NoMean, Widening


class Widen(oir.passes.FunctionalPass):
    """Put the model it is called on and `others` side by side.

    Args:
        others: normalised models of the same architecture, matched by `correspond`.
        weights: of the model itself and of each other one in the mean of outputs; equal when not given.
    """

    preserves = "exact"

    def __init__(self, others: Sequence[oir.Model], weights: Sequence[float] | None = None):
        self.others = list(others)
        given = np.ones(len(self.others) + 1) if weights is None else np.asarray(weights, np.float64)
        self.weights = (given / given.sum()).tolist()

    def requires(self, model: oir.Model) -> None:
        """There is another network, and one weight for each."""
        if not self.others or len(self.weights) != len(self.others) + 1:
            raise ModelError("there must be another network, and one weight for each")

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """The widened network, with the names of the model it is called on.

        Raises:
            ModelError: the networks differ in more than their weights, or a node cannot work on the channels of all of
                them, neither side by side nor on those of each.
        """
        for node in model.graph:
            if any(a.type in (oir.AttributeType.GRAPH, oir.AttributeType.GRAPHS) for a in node.attributes.values()):
                raise ModelError(f"{title(node)}: operators with graphs inside cannot be widened")
        arrays = _matched(model, self.others)
        try:
            widened = self._widened(model, arrays, in_blocks=True)
        except _NotSideBySide as error:
            try:
                widened = self._widened(model, arrays, in_blocks=False)
            except ModelError:
                raise error from None
        return oir.passes.PassResult(widened, modified=True)

    def _widened(self, model: oir.Model, arrays: dict[str, list[np.ndarray]], *, in_blocks: bool) -> oir.Model:
        alone = frozenset[str]()
        while True:
            widening = Widening(model, arrays, self.weights, alone, in_blocks)
            try:
                for node, target in list(zip(model.graph, widening.result.graph, strict=True)):
                    widening.visit(node, target)
            except NoMean as error:  # what cannot be averaged there stays one value for each network from there on
                if error.layers <= alone:
                    raise ModelError(str(error)) from error
                alone |= error.layers
            else:
                try:
                    return widening.finish()
                except ModelError as error:
                    raise _NotSideBySide(str(error)) from error


class _NotSideBySide(ModelError):
    """The channels of some value did not come out side by side."""


def same_architecture(model: oir.Model, other: oir.Model) -> bool:
    """Whether two networks differ in nothing but their weights."""
    try:
        _matched(model, [other])
    except ModelError:
        return False
    return True


def _matched(model: oir.Model, others: Sequence[oir.Model]) -> dict[str, list[np.ndarray]]:
    """For each constant of `model` its array in every network."""
    arrays = {name: [get_array(value)] for name, value in model.graph.initializers.items()}
    for number, other in enumerate(others, start=2):
        inputs = len(other.graph.inputs) == len(model.graph.inputs)
        found = correspond(model, other) if inputs else None
        if found is None or found.stopped:
            reason = found.stopped[0] if found else "they have other numbers of inputs"
            raise ModelError(f"network {number} is not of the same architecture as the first: {reason}")
        ends = [found.values.get(output.name or "") for output in model.graph.outputs]
        if ends != [output.name for output in other.graph.outputs]:
            raise ModelError(f"network {number} is not of the same architecture as the first: its outputs differ")
        for name, theirs in found.constants.items():
            arrays[name].append(get_array(other.graph.initializers[theirs]))
    return arrays
