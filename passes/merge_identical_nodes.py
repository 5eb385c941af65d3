"""Compute equal sub-graphs once (exact): common sub-expression elimination over the whole graph.

Two nodes are one when they have the same operator and attributes and read the same values (`onnxmerge.ir.identity`);
names and the order of nodes do not matter. Random operators and operators of custom domains, whose side effects nobody
knows, are never merged. Equal initializers must have become one before (`DeduplicateInitializers`).
"""

import onnx_ir as oir

from onnxmerge.ir.identity import Digests, is_copy
from onnxmerge.ir.reach import remove_node, remove_unneeded


class MergeIdenticalNodes(oir.passes.InPlacePass):
    """Keep the first of equal nodes, drop copies (Identity and the like), and remove what nothing reads any more.

    Outputs of the graph keep their names: where two become one value, the later is a copy of the earlier.
    """

    preserves = "exact"

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Merge in place; nodes must be in topological order."""
        graph = model.graph
        digests = Digests(model.opset_imports)
        first: dict[bytes, oir.Value] = {}
        modified = False
        for node in list(graph):
            if is_copy(node) and (source := node.inputs[0]) is not None:
                digests.alias(node.outputs[0], source)
                first.setdefault(digests.of(source), source)
            elif not digests.add(node):
                continue
            kept = [first.setdefault(digests.of(output), output) for output in node.outputs]
            if any(value is not output for value, output in zip(kept, node.outputs, strict=True)):
                modified |= _replace(graph, node, kept)
        return oir.passes.PassResult(model, remove_unneeded(model) or modified)


def _replace(graph: oir.Graph, node: oir.Node, kept: list[oir.Value]) -> bool:
    """Let `kept` stand for the node's outputs; False where nothing changed."""
    if node.op_type == "Identity" and node.outputs[0].is_graph_output() and not _is_free(kept[0]):
        readers = list(node.outputs[0].uses())
        for reader, index in readers:
            reader.replace_input_with(index, kept[0])
        return bool(readers)
    for output, value in zip(node.outputs, kept, strict=True):
        if output.is_graph_output():
            _hand_over(graph, node, output, value)
        output.replace_all_uses_with(value)
    remove_node(graph, node)
    return True


def _hand_over(graph: oir.Graph, node: oir.Node, output: oir.Value, value: oir.Value) -> None:
    """Make `value`, or a copy of it where it has a name of its own to keep, the graph's output in place of `output`."""
    if not _is_free(value):
        copy = oir.node("Identity", [value], name=f"{output.name}/Identity")
        graph.insert_before(node, copy)
        value = copy.outputs[0]
    value.name, value.shape, value.type = output.name, output.shape, output.type
    graph.outputs[list(graph.outputs).index(output)] = value


def _is_free(value: oir.Value) -> bool:
    """Whether the value may be renamed into an output."""
    return value.producer() is not None and not value.is_graph_output()
