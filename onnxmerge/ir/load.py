"""Read an ONNX file, or say in one sentence why it cannot be read."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.normalise import normalise

_FLOATS = {np.dtype(t) for t in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)}


def load(path: str | os.PathLike[str]) -> oir.Model:
    """Load the model at `path`, check that it is whole, and normalise it (see `normalise`).

    Raises:
        UsageError: there is no such file.
        ModelError: the file is no ONNX model, is truncated, misses external data, or holds NaN or infinite weights.
    """
    model = read(path)
    _check_weights(model, Path(path))
    try:
        return normalise(model)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def read(path: str | os.PathLike[str]) -> oir.Model:
    """The model at `path` exactly as stored; weights stay on disk until they are used. Raises as `load` does."""
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"{file}: no such file")
    try:
        model = oir.load(file)
    except Exception as error:  # protobuf and onnx-ir raise many kinds for a damaged file
        raise ModelError(f"{file}: is not a readable ONNX model (truncated, or another format)") from error
    if not model.graph.outputs:
        raise ModelError(f"{file}: is not a readable ONNX model (its graph has no outputs)")
    if not model.opset_imports:
        raise ModelError(
            f"{file}: declares no opset (IR version {model.ir_version}), so the meaning of its operators is unknown; "
            "export it again with a current exporter"
        )
    return model


def _check_weights(model: oir.Model, file: Path) -> None:
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise ModelError(f"{file}: the initializer {name!r} holds no data")
        if isinstance(tensor, oir.ExternalTensor):
            _check_external(tensor, file)
        try:
            array = tensor.numpy()
        except Exception as error:
            raise ModelError(f"{file}: the initializer {name!r} cannot be read: {error}") from error
        if array.dtype in _FLOATS and not np.isfinite(array.astype(np.float32, copy=False)).all():
            raise ModelError(f"{file}: the initializer {name!r} holds NaN or infinite values")


def _check_external(tensor: oir.ExternalTensor, file: Path) -> None:
    data = Path(tensor.path)
    if not data.is_file():
        raise ModelError(f"{file}: the external data file {data} of the initializer {tensor.name!r} is missing")
    needed = (tensor.offset or 0) + (tensor.length or 0)
    if data.stat().st_size < needed:
        raise ModelError(
            f"{file}: the external data file {data} is truncated: the initializer {tensor.name!r} needs {needed} bytes"
        )
