"""What is needed for what: walking a graph backwards, through the sub-graphs of If, Loop and Scan too."""

from collections.abc import Iterable

import onnx_ir as oir


def reads(node: oir.Node) -> list[oir.Value]:
    """What the node reads, itself or inside its sub-graphs."""
    return [value for reader in (node, *_inside(node)) for value in reader.inputs if value is not None]


def needed(outputs: Iterable[oir.Value]) -> set[oir.Node]:
    """The nodes of one graph that its values `outputs` depend on."""
    found: set[oir.Node] = set()
    waiting = [node for value in outputs if (node := value.producer()) is not None]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            makers = [maker for value in reads(node) if (maker := value.producer()) is not None]
            waiting += [maker for maker in makers if maker.graph is node.graph]
    return found


def remove_node(graph: oir.Graph, node: oir.Node) -> None:
    """Remove a node that nothing reads; its sub-graphs stop reading outer values too."""
    for inner in _inside(node):
        for index in range(len(inner.inputs)):
            inner.replace_input_with(index, None)
    graph.remove(node, safe=True)


def remove_unneeded(model: oir.Model) -> bool:
    """Remove the nodes of the main graph and the initializers that no output depends on; whether there were any."""
    graph = model.graph
    kept = needed(graph.outputs)
    dead = [node for node in graph if node not in kept]
    for node in reversed(dead):
        remove_node(graph, node)
    read = {value for node in kept for value in reads(node)} | set(graph.outputs)
    unread = [name for name, value in graph.initializers.items() if value not in read]
    for name in unread:
        del graph.initializers[name]
    return bool(dead or unread)


def _inside(node: oir.Node) -> list[oir.Node]:
    """The nodes of the node's sub-graphs, at any depth."""
    graphs: list[oir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == oir.AttributeType.GRAPH:
            graphs.append(attribute.as_graph())
        elif attribute.type == oir.AttributeType.GRAPHS:
            graphs += attribute.as_graphs()
    return [inner for graph in graphs for inner in graph.all_nodes()]
