"""Bring any exported graph into the one form that the rest of the tool reads.

After `normalise`: functions are inlined; constants are initializers and every constant sub-expression is folded into
one; initializers are no graph inputs; the opset is at least `OPSET`; the batch axis is symbolic where the graph allows
it; every array has exactly one reader; names are unique; shapes are inferred. Bodies of If, Loop and Scan and operators
of other domains stay as they are, but for the opset and the names. So do metadata, documentation and the names of
inputs and outputs.
"""

import logging
import math

import numpy as np
import onnx_ir as oir
from onnx_ir.passes import common

from onnxmerge.errors import ModelError
from onnxmerge.ir.concrete import settle
from onnxmerge.ir.fold_constants import fold_constants
from onnxmerge.ir.labels import dims
from onnxmerge.ir.lift_constants import lift_constants
from onnxmerge.ir.opset import raise_opset
from onnxmerge.ir.shapes import infer_shapes
from onnxmerge.ir.weights import add_initializer

OPSET = 18
"""The lowest opset the rest of the tool has to know: from here on axes of reductions are inputs."""
_MIN_IR_VERSION = 8
_BATCH = "N"
_MOST_ELEMENTS = 1 << 31
"""No value of a network that runs has more; made-up sizes do."""

# onnx-ir warns at length of what it repairs; the user did not ask.
logging.getLogger("onnx_ir").setLevel(logging.ERROR)


def normalise(model: oir.Model) -> oir.Model:
    """The normal form of `model`; the argument is used up.

    Raises:
        ModelError: a node cannot be brought to the opset, a function cannot be inlined, or a size is impossible.
    """
    lift_constants(model.graph)
    _remove_initializers_from_inputs(model.graph)
    model.ir_version = max(model.ir_version or 0, _MIN_IR_VERSION)
    if not model.functions:  # which are newer than the operators that are converted by the shapes of what they read
        _infer_checked(model)
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    raise_opset(model, max(OPSET, *(graph.opset_imports.get("", 0) for graph in graphs)))
    _inline_functions(model)
    common.NameFixPass()(model)
    lift_constants(model.graph)
    free_batch(model)
    _infer_checked(model)
    fold_constants(model)
    _remove_identities(model.graph)
    common.RemoveUnusedNodesPass()(model)
    untie(model)
    _infer_checked(model)
    return model


def _remove_initializers_from_inputs(graph: oir.Graph) -> None:
    """Before IR version 4 every initializer was a graph input too."""
    kept = [value for value in graph.inputs if value.name not in graph.initializers]
    graph.inputs.clear()
    graph.inputs.extend(kept)


def _inline_functions(model: oir.Model) -> None:
    try:
        common.InlinePass()(model)
    except Exception as error:
        raise ModelError(f"a function cannot be inlined: {_root_cause(error)}") from error


def _infer_checked(model: oir.Model) -> None:
    """Infer shapes, and refuse those that no network which runs can have."""
    node = infer_shapes(model)
    if node is not None:
        raise ModelError(f"{node.op_type} {node.name!r} makes a value with a negative size")
    for value in [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]:
        if math.prod(size for size in dims(value) if size is not None) > _MOST_ELEMENTS:
            raise ModelError(f"the value {value.name!r} of shape {list(dims(value))} is too large for any machine")


def _remove_identities(graph: oir.Graph) -> None:
    """Let what reads an Identity read its source. An output of the graph keeps its name, whoever makes it."""
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Identity" and node.domain == "" else None
        if source is None:
            continue
        made = node.outputs[0]
        if made.is_graph_output():
            if source.producer() is None or source.is_graph_output():
                continue
            name, made.name = made.name, f"{made.name}__removed"
            source.name = name
        made.replace_all_uses_with(source, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def free_batch(model: oir.Model) -> None:
    """Make axis 0 of every input symbolic when every output's axis 0 follows it.

    Whether it follows is tried by shape inference at two other batch sizes. A Reshape whose constant target begins with
    the old batch size gets 0 ("copy this axis") instead.
    """
    inputs = [value for value in model.graph.inputs if value.shape is not None and len(value.shape) > 1]
    batches = {size for value in inputs if isinstance(size := dims(value)[0], int)}
    if len(inputs) != len(model.graph.inputs) or len(batches) != 1:
        return
    fixed = batches.pop()
    if all(_follows(model, fixed, size) for size in (2, 3)):
        _set_batch(model, fixed, _BATCH)


def _follows(model: oir.Model, fixed: int, size: int) -> bool:
    trial = model.clone()
    _set_batch(trial, fixed, size)
    return settle(trial) and all(
        o.shape is not None and len(o.shape) > 0 and o.shape[0] == size for o in trial.graph.outputs
    )


def _set_batch(model: oir.Model, fixed: int, batch: int | str) -> None:
    for value in model.graph.inputs:
        value.shape = _with_batch(value, batch)
    for output in model.graph.outputs:
        output.shape = _with_batch(output, batch) if isinstance(batch, str) and output.shape is not None else None
    for node in model.graph:
        if node.op_type != "Reshape" or node.domain not in ("", "ai.onnx"):
            continue
        data, target = node.inputs
        if data is None or data.const_value is not None or target is None or target.const_value is None:
            continue
        shape = target.const_value.numpy()
        if len(shape) > 1 and shape[0] == fixed and 0 not in shape[1:]:
            renewed = np.concatenate([np.zeros(1, shape.dtype), shape[1:]])
            replacement = add_initializer(model.graph, f"{node.name}_shape", renewed)
            node.replace_input_with(1, replacement)


def _with_batch(value: oir.Value, batch: int | str) -> oir.Shape:
    assert value.shape is not None
    return oir.Shape([batch, *list(value.shape)[1:]])


def untie(model: oir.Model) -> None:
    """Give each reader of an array its own copy, so that rewriting one layer cannot change another.

    Exporters store bit-equal initializers once; the copies become one again when the model is saved.
    """
    for name, value in list(model.graph.initializers.items()):
        uses = list(value.uses())
        if len(uses) < 2 or value.const_value is None or value.const_value.size < 2:
            continue
        for number, (node, index) in enumerate(uses[1:], start=1):
            copy = add_initializer(model.graph, f"{name}__{number}", value.const_value.numpy())
            node.replace_input_with(index, copy)


def _root_cause(error: BaseException) -> str:
    """The last line of the error that `error` began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
