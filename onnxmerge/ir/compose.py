"""Cut pieces out of graphs and put pieces together."""

from collections.abc import Mapping, Sequence

import onnx_ir as oir

from onnxmerge.ir.normalise import infer_shapes
from onnxmerge.ir.stored import renamed


def cut_out(model: oir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> oir.Model:
    """The part of `model` that computes `outputs` from `inputs`, as a model of its own; names stay.

    Weights are shared with `model`, not copied. An output that is also an input passes through an Identity.
    """
    through = set(inputs) & set(outputs)
    if through:
        model = model.clone()
        for name in through:
            source = _value(model.graph, name)
            copy = oir.node("Identity", [source])
            copy.outputs[0].name = f"{name}__through"
            copy.outputs[0].shape, copy.outputs[0].type = source.shape, source.type
            model.graph.append(copy)
        outputs = [f"{name}__through" if name in through else name for name in outputs]
    graph = oir.convenience.extract(model.graph, list(inputs), list(outputs))
    graph.opset_imports.update(model.graph.opset_imports)
    _sort_initializers(graph)
    return oir.Model(graph, ir_version=model.ir_version or 8, producer_name="onnxmerge")


def _sort_initializers(graph: oir.Graph) -> None:
    """Put initializers in the order of their first use; extraction leaves them in that of a set, new in each run."""
    read = dict.fromkeys(value for node in graph.all_nodes() for value in node.inputs if value is not None)
    ordered = {value.name or "": value for value in read if (value.name or "") in graph.initializers}
    graph.initializers.clear()
    graph.initializers.update(ordered)


def splice(target: oir.Graph, piece: oir.Graph, bind: Mapping[str, oir.Value], prefix: str) -> dict[str, oir.Value]:
    """Move the nodes and initializers of `piece` into `target`; the piece is used up.

    Args:
        target: the graph that grows.
        piece: a graph of its own.
        bind: what each input of the piece reads in `target`.
        prefix: goes before the name of every node, value and initializer of the piece.

    Returns:
        The piece's outputs by their names in the piece.
    """
    outputs = {value.name or "": value for value in piece.outputs}
    outputs |= {name: bind[name] for name in outputs if name in bind}  # inputs that pass through
    piece.outputs.clear()
    for value in list(piece.inputs):
        value.replace_all_uses_with(bind[value.name or ""])
    piece.inputs.clear()
    for initializer in piece.initializers.values():
        if initializer.const_value is not None:  # clones share their arrays, and an array knows its name
            initializer.const_value = renamed(initializer.const_value, initializer.name)
    prefix_names(piece, prefix)
    move(piece, target)
    return outputs


def chain(first: oir.Model, second: oir.Model, prefix: str) -> oir.Model:
    """`second`, which has one input, behind `first`, which has one output; `first`'s names get the prefix.

    The inputs keep their names.
    """
    whole, rest = first.clone(), second.clone()
    names = [value.name for value in whole.graph.inputs]
    prefix_names(whole.graph, prefix)
    for value, name in zip(whole.graph.inputs, names, strict=True):
        value.name = name
    (through,) = whole.graph.outputs
    whole.graph.outputs.clear()
    found = splice(whole.graph, rest.graph, {rest.graph.inputs[0].name or "": through}, "")
    whole.graph.outputs.extend(found.values())
    return whole


def value_names(model: oir.Model) -> list[str]:
    """The graph's inputs and what its nodes compute, in order."""
    return [v.name or "" for v in model.graph.inputs] + [o.name or "" for node in model.graph for o in node.outputs]


def prefix_names(graph: oir.Graph, prefix: str) -> None:
    """Put `prefix` before the name of every node, value and initializer, those of sub-graphs included, in place."""
    values: dict[oir.Value, None] = {}
    for scope in (graph, *graph.subgraphs()):
        values |= dict.fromkeys([*scope.inputs, *scope.initializers.values()])
        for node in scope:
            node.name = f"{prefix}{node.name}"
            values |= dict.fromkeys(node.outputs)
    for value in values:
        if value.name:  # an optional output that is left out has none
            value.name = f"{prefix}{value.name}"


def move(piece: oir.Graph, target: oir.Graph) -> None:
    """Move nodes and initializers of `piece` to the end of `target`; their names must be new there."""
    initializers = list(piece.initializers.values())
    piece.initializers.clear()
    for initializer in initializers:
        target.register_initializer(initializer)
    nodes = list(piece)
    piece.remove(nodes)
    target.extend(nodes)


def rename_value(model: oir.Model, old: str, new: str) -> None:
    """Rename a graph input or a computed value."""
    _value(model.graph, old).name = new


def finish(model: oir.Model) -> oir.Model:
    """Infer the shapes of a freshly composed model and return it."""
    infer_shapes(model)
    return model


def _value(graph: oir.Graph, name: str) -> oir.Value:
    for value in graph.inputs:
        if value.name == name:
            return value
    for node in graph:
        for value in node.outputs:
            if value.name == name:
                return value
    raise KeyError(name)
