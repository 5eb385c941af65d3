"""Bring any exported graph into the one form that the rest of the tool reads.

After `normalise`: functions are inlined; constants are initializers and every constant sub-expression is folded into
one; initializers are no graph inputs; the opset is at least `OPSET`; the batch axis is symbolic where the graph allows
it; every array has exactly one reader; names are unique; shapes are inferred.
"""

import logging

import numpy as np
import onnx
import onnx_ir as oir
from onnx_ir.passes import common

from onnxmerge.errors import ModelError
from onnxmerge.ir.fold_constants import fold_constants
from onnxmerge.ir.labels import dims
from onnxmerge.ir.weights import add_initializer

OPSET = 18
"""The lowest opset the rest of the tool has to know: from here on axes of reductions are inputs."""
_OLDEST_OPSET = 7
_MIN_IR_VERSION = 8
_BATCH = "N"

# onnx-ir announces at length that the C++ converter does the conversion; the user did not ask.
logging.getLogger("onnx_ir").setLevel(logging.ERROR)


def normalise(model: oir.Model) -> oir.Model:
    """The normal form of `model`; the argument is used up.

    Raises:
        ModelError: the opset cannot be converted.
    """
    common.InlinePass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveInitializersFromInputsPass()(model)
    model.ir_version = max(model.ir_version or 0, _MIN_IR_VERSION)
    model = raise_opset(model, OPSET)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.NameFixPass()(model)
    free_batch(model)
    infer_shapes(model)
    fold_constants(model)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    untie(model)
    infer_shapes(model)
    return model


def raise_opset(model: oir.Model, opset: int) -> oir.Model:
    """Convert to `opset` with onnx's own converter; newer models stay as they are.

    Raises:
        ModelError: the opset is too old, or an operator cannot be converted.
    """
    version = model.opset_imports.get("", opset)
    if version >= opset:
        return model
    if version < _OLDEST_OPSET:
        raise ModelError(
            f"opset {version} is too old ({_OLDEST_OPSET} is the lowest); export it again with a current exporter"
        )
    try:
        converted = onnx.version_converter.convert_version(oir.to_proto(model), opset)
    except Exception as error:
        raise ModelError(f"cannot be converted from opset {version} to {opset}: {_last_line(error)}") from error
    result = oir.from_proto(converted)
    result.metadata_props.update(model.metadata_props)
    return result


def infer_shapes(model: oir.Model) -> None:
    """Infer every shape afresh; stale ones are dropped first.

    Where onnx sees a contradiction, what lies behind it stays without a shape, so that its channels keep their order:
    onnxruntime, which is less strict, has the last word on whether such a model runs.
    """
    if not _infer(model, strict=True):
        _infer(model, strict=False)


def _infer(model: oir.Model, *, strict: bool) -> bool:
    """Whether shapes were found; in strict mode one contradiction leaves all values without."""
    outputs = set(model.graph.outputs)
    computed = [value for node in model.graph for value in node.outputs if value not in outputs]
    for value in computed:
        value.shape = None
    common.ShapeInferencePass(check_type=strict, strict_mode=strict, data_prop=True)(model)
    return not computed or any(value.shape is not None for value in computed)


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
    _infer(trial, strict=True)
    return all(o.shape is not None and len(o.shape) > 0 and o.shape[0] == size for o in trial.graph.outputs)


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


def _last_line(error: BaseException) -> str:
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    return str(root).strip().splitlines()[-1] if str(root).strip() else type(root).__name__
