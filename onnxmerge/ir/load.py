"""Read an ONNX file, or say in one sentence why it cannot be read."""

import os
from pathlib import Path

import onnx
import onnx_ir as oir

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.normalise import normalise
from onnxmerge.ir.tensors import check_numbers
from onnxmerge.ir.wellformed import check_wellformed


def load(path: str | os.PathLike[str]) -> oir.Model:
    """Load the model at `path`, check that it is whole, and normalise it (see `normalise`).

    Raises:
        UsageError: there is no such file.
        ModelError: the file is no well-formed ONNX model (see `read`), holds NaN or infinite weights, or has no normal
            form.
    """
    model = read(path)
    try:
        check_numbers(model)
        return normalise(model)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def read(path: str | os.PathLike[str]) -> oir.Model:
    """The model at `path` as stored, nodes in topological order; external data stay on disk until they are used.

    Raises:
        UsageError: there is no such file.
        ModelError: the file is no ONNX model, is truncated, is not well formed (see `check_wellformed`), or its
            external data are missing or lie outside its folder.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"{file}: no such file")
    try:
        return _deserialise(onnx.load(file, format="protobuf", load_external_data=False), file.parent)
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error
    except Exception as error:  # protobuf and onnx-ir raise many kinds for a damaged file
        raise ModelError(f"{file}: is not a readable ONNX model (truncated, damaged or another format)") from error


def _deserialise(proto: onnx.ModelProto, folder: Path) -> oir.Model:
    if not proto.graph.output:
        raise ModelError("is not a readable ONNX model (its graph has no outputs)")
    if not proto.opset_import:
        raise ModelError(
            f"declares no opset (IR version {proto.ir_version}), so the meaning of its operators is unknown; "
            "export it again with a current exporter"
        )
    is_sorted = check_wellformed(proto, folder)
    model = oir.from_proto(proto)
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        if "ai.onnx" in graph.opset_imports:  # the standard domain's other name
            graph.opset_imports[""] = graph.opset_imports.pop("ai.onnx")
        oir.external_data.set_base_dir(graph, folder)
        if not is_sorted:
            graph.sort()
    return model
