"""Channel spaces: maximal sets of tensor axes whose indices stand for the same channels.

The graph is run on labels (`labels`, `rules`), and channels that touch the same arrays and values are one space
(`partition`), so a Split, a skip that reads half the channels, or two halves that pass through different operators
separate by themselves, and a flatten gives each channel its block of slots in order.
"""

from dataclasses import dataclass

import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.concrete import with_sizes
from onnxmerge.ir.labels import Frozen, Trace, carries, dims
from onnxmerge.ir.partition import collect
from onnxmerge.ir.rules import RULES
from onnxmerge.ir.space import Slots, Space

__all__ = ["Frozen", "Slots", "Space", "Spaces", "find_spaces"]


@dataclass(frozen=True)
class Spaces:
    """All spaces of a graph in order of appearance, and the nodes that stop the analysis."""

    spaces: tuple[Space, ...]
    frozen: tuple[Frozen, ...]

    def permutable(self) -> list[Space]:
        """The spaces with more than one channel."""
        return [space for space in self.spaces if space.size > 1]


def find_spaces(model: oir.Model, open_outputs: frozenset[str] = frozenset()) -> Spaces:
    """Find the channel spaces of a normalised model in time linear in its labels.

    Args:
        model: the normal form (see `normalise`).
        open_outputs: graph outputs whose channel order is free, because whatever reads them will be told.
    """
    trace = Trace(model.graph.initializers.keys() - {output.name for output in model.graph.outputs})
    sized = with_sizes(model)
    for node in sized.graph:
        _apply_rule(node, trace)
    for output in sized.graph.outputs:
        if output.name not in open_outputs:
            trace.fix(trace.label(output))
    return Spaces(tuple(collect(trace)), tuple(trace.frozen))


def _apply_rule(node: oir.Node, trace: Trace) -> None:
    captured = [v for v in _captured(node) if carries(trace.label(v))]
    rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    reached = [trace.label(v) for v in node.inputs if v is not None] + [trace.label(v) for v in captured]
    if rule is not None and not captured and not any(_unsized(v) for v in [*node.inputs, *node.outputs]):
        try:
            rule(node, trace)
        except (AssertionError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
            name = node.name or node.outputs[0].name
            raise ModelError(f"{node.op_type} {name!r}: its inputs and attributes do not fit each other") from error
    else:
        why = "it has no label rule" if rule is None or captured else "the shape of an input or output is unknown"
        trace.freeze(node, f"{why}; the channels that reach it keep their order", *reached)


def _unsized(value: oir.Value | None) -> bool:
    if value is None or not (value.uses() or value.is_graph_output()):
        return False
    return value.shape is None or None in dims(value)


def _captured(node: oir.Node) -> list[oir.Value]:
    """Outer values that the node's sub-graphs read."""
    found = []
    for attribute in node.attributes.values():
        if attribute.type == oir.AttributeType.GRAPH:
            graphs = [attribute.as_graph()]
        elif attribute.type == oir.AttributeType.GRAPHS:
            graphs = list(attribute.as_graphs())
        else:
            continue
        for graph in graphs:
            inner = {id(v) for v in graph.inputs} | {id(o) for n in graph.all_nodes() for o in n.outputs}
            found += [v for n in graph.all_nodes() for v in n.inputs if v is not None and id(v) not in inner]
            found += [v for v in graph.outputs if id(v) not in inner]
    return found
