"""Several networks beside each other in one graph, the values that stand for one another joined (exact).

What network t computes as v_t becomes a part of v = [v_1; ...; v_N], concatenated along the channel axis, and what
follows in network t reads its part of v. So the graph can be cut wherever each network can.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.compose import finish
from onnxmerge.ir.labels import dims
from onnxmerge.ir.weights import add_initializer
from onnxmerge.passes.attach_tails import unshared


@dataclass(frozen=True)
class Joined:
    """One value of the result."""

    name: str
    parts: Mapping[str, str]
    """By network, the name of its value; all networks, in their order."""
    axis: int


class JoinValues(oir.passes.FunctionalPass):
    """Join values of the model it is called on, the first network, and of others that read the same inputs.

    The inputs keep the names that they have in the first network, the others' are bound in order; a network's own nodes
    and values get its name as prefix. The output is the last
    of the joined values.

    Args:
        name: of the model it is called on.
        others: by name.
        values: what is joined, in topological order.
    """

    preserves = "exact"

    def __init__(self, name: str, others: Mapping[str, oir.Model], values: Sequence[Joined]):
        self.name = name
        self.others = others
        self.values = values

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """A new graph; the networks stay as they are."""
        joined = unshared({self.name: model, **self.others})
        computed = {output.name or "": output for node in joined.graph for output in node.outputs}
        for value in self.values:
            parts = [computed[f"{network}/{theirs}"] for network, theirs in value.parts.items()]
            whole = self._concatenate(joined.graph, value, parts)
            self._split(joined.graph, value, whole, parts)
        joined.graph.outputs.clear()
        joined.graph.outputs.append(whole)
        joined.graph.sort()
        return oir.passes.PassResult(finish(joined), modified=True)

    def _concatenate(self, graph: oir.Graph, value: Joined, parts: Sequence[oir.Value]) -> oir.Value:
        node = oir.node("Concat", parts, {"axis": value.axis}, name=f"join {value.name}")
        graph.append(node)
        node.outputs[0].name, node.outputs[0].type = value.name, parts[0].type
        return node.outputs[0]

    def _split(self, graph: oir.Graph, value: Joined, whole: oir.Value, parts: Sequence[oir.Value]) -> None:
        sizes = np.array([dims(part)[value.axis] for part in parts], np.int64)
        told = add_initializer(graph, f"{value.name}/sizes", sizes)
        readers = [[use for use in part.uses() if use[0] is not whole.producer()] for part in parts]
        names = [f"{part.name}/again" for part in parts]
        name = f"split {value.name}"
        node = oir.node("Split", [whole, told], {"axis": value.axis}, num_outputs=len(parts), name=name)
        graph.append(node)
        for output, name, uses in zip(node.outputs, names, readers, strict=True):
            output.name = name
            for reader, index in uses:
                reader.replace_input_with(index, output)
