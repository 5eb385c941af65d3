"""The light normal form: what two exports of one network can be compared in, while everything is stored as it was.

Functions are inlined; constants are initializers of the main graph, and no inputs; nodes are in topological order;
names are unique. Unlike `normalise`, nothing is computed, no weight is read from disk and none is copied.
"""

import os

import onnx_ir as oir
from onnx_ir.passes import common

from onnxmerge.errors import ModelError
from onnxmerge.ir.lift_constants import lift_constants
from onnxmerge.ir.load import read
from onnxmerge.ir.normalise import infer_shapes
from onnxmerge.ir.opset import raise_opset

_IR_VERSION = 8


def read_light(path: str | os.PathLike[str]) -> oir.Model:
    """The light normal form of the model at `path`.

    Raises:
        UsageError: there is no such file.
        ModelError: the file is no ONNX model, or a function cannot be inlined or converted.
    """
    model = read(path)
    try:
        if model.functions:  # they may have other opsets than the graph
            opsets = [model.opset_imports, *(function.opset_imports for function in model.functions.values())]
            raise_light_opset(model, max(imports.get("", 0) for imports in opsets))
            common.InlinePass()(model)
        lift_constants(model.graph)
        common.RemoveInitializersFromInputsPass()(model)
        common.LiftSubgraphInitializersToMainGraphPass()(model)
        common.RemoveUnusedOpsetsPass()(model)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    except Exception as error:  # the passes raise ValueError, and wrap what they call in kinds of their own
        reason = str(error.__cause__ or error).splitlines()
        raise ModelError(f"{path}: cannot be brought to normal form: {reason[0] if reason else error!r}") from error
    model.ir_version = max(model.ir_version or 0, _IR_VERSION)
    common.NameFixPass()(model)
    return model


def raise_light_opset(model: oir.Model, opset: int) -> None:
    """Bring a model in the light normal form to `opset`, in place.

    Raises:
        ModelError: the opset is too old, or a node cannot be converted.
    """
    if model.opset_imports.get("", opset) < opset:
        infer_shapes(model)  # old operators are converted by the types and shapes of what they read
        raise_opset(model, opset)


def give_outputs_nodes(graph: oir.Graph) -> None:
    """Put an Identity before each output that is an input, an initializer, or an earlier output.

    It has the name of what it copies, so that other names must be found for inputs before the graph is valid again.
    """
    seen: set[oir.Value] = set()
    for index, output in enumerate(graph.outputs):
        if output.producer() is None or output in seen:
            copy = oir.node("Identity", [output], name=f"{output.name}/Identity")
            (value,) = copy.outputs
            value.name, value.shape, value.type = output.name, output.shape, output.type
            graph.append(copy)
            graph.outputs[index] = value
        seen.add(graph.outputs[index])
