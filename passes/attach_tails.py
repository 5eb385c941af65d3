"""Attach the tasks' tails to a shared stem (exact): one multi-task graph from its pieces.

The stem's nodes and weights get the prefix `shared/`, those of a tail its task's name; a task's outputs become
`TASK/output`.
"""

from collections.abc import Collection, Mapping, Sequence

import onnx_ir as oir

from onnxmerge.ir.compose import finish, splice
from onnxmerge.ir.labels import dims

SHARED = "shared/"


class AttachTails(oir.passes.FunctionalPass):
    """Attach tails to the model it is called on, the stem.

    Args:
        tails: by task.
        reads: by task, for each input of its tail the output or input of the stem that it reads; where a task is
            missing, its inputs are the stem's outputs in order.
        merged: which of the tails are merged models of several tasks; their names have their prefixes already.
        shared: the prefix of the stem.
    """

    preserves = "exact"

    def __init__(
        self,
        tails: Mapping[str, oir.Model],
        reads: Mapping[str, Sequence[str]] | None = None,
        *,
        merged: Collection[str] = (),
        shared: str = SHARED,
    ):
        self.tails = tails
        self.reads = reads or {}
        self.merged = merged
        self.shared = shared

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Compose a new model; stem and tails stay as they are."""
        stem = model.clone().graph
        inputs = [oir.Value(name=v.name, shape=v.shape, type=v.type) for v in stem.inputs]
        merged = oir.Graph(inputs, [], nodes=[], opset_imports=dict(stem.opset_imports), name="onnxmerge")
        bind = dict(zip([v.name or "" for v in stem.inputs], inputs, strict=True))
        order = [v.name or "" for v in stem.outputs]
        cut = bind | splice(merged, stem, bind, self.shared)
        for task, tail in self.tails.items():
            prefix = "" if task in self.merged else f"{task}/"
            attach_tail(merged, prefix, tail, [cut[name] for name in self.reads.get(task, order)])
        composed = oir.Model(merged, ir_version=model.ir_version or 8, producer_name="onnxmerge")
        return oir.passes.PassResult(finish(composed), modified=True)


def attach_tail(graph: oir.Graph, prefix: str, tail: oir.Model, arriving: Sequence[oir.Value]) -> None:
    """Put a copy of `tail` behind values of `graph`, in place; its outputs become those of `graph`.

    Args:
        graph: the graph that grows.
        prefix: goes before every name of the tail: `TASK/`.
        tail: stays as it is.
        arriving: for each of its inputs what it reads.
    """
    piece = tail.clone().graph
    names = [value.name or "" for value in piece.outputs]
    bind = {value.name or "": own for value, own in zip(piece.inputs, arriving, strict=True)}
    outputs = splice(graph, piece, bind, prefix)
    for name in names:
        value = outputs[name]
        if value.name != f"{prefix}{name}":  # the tail is empty or passes its input through
            through = oir.node("Identity", [value])
            graph.append(through)
            value = through.outputs[0]
            value.name = f"{prefix}{name}"
        graph.outputs.append(value)


def unshared(models: Mapping[str, oir.Model]) -> oir.Model:
    """Whole networks beside each other by their names.

    They share the inputs, called as those of the first; where sizes differ each has its own, called `TASK/input`.
    """
    first = next(iter(models.values()))
    if len({tuple(dims(value) for value in model.graph.inputs) for model in models.values()}) == 1:
        merged: oir.Model = AttachTails(models)(bare_stem(first)).model
        return merged
    stem = bare_stem(first)
    reads = {task: [f"{task}/{value.name}" for value in model.graph.inputs] for task, model in models.items()}
    inputs = [
        oir.Value(name=name, shape=value.shape, type=value.type)
        for task, model in models.items()
        for name, value in zip(reads[task], model.graph.inputs, strict=True)
    ]
    for values in (stem.graph.outputs, stem.graph.inputs):
        values.clear()
        values.extend(inputs)
    apart: oir.Model = AttachTails(models, reads)(stem).model
    return apart


def bare_stem(model: oir.Model) -> oir.Model:
    """A stem that shares nothing but the inputs of `model`."""
    inputs = [oir.Value(name=v.name, shape=v.shape, type=v.type) for v in model.graph.inputs]
    graph = oir.Graph(inputs, inputs, nodes=[], opset_imports=dict(model.graph.opset_imports), name="onnxmerge")
    return oir.Model(graph, ir_version=model.ir_version or 8, producer_name="onnxmerge")
