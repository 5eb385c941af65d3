"""Write a model whole or not at all, equal initializers stored once."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as oir
from onnx_ir.passes import common

from onnxmerge.errors import UsageError

_INLINE_LIMIT = 1_800_000_000  # bytes; protobuf stops at 2 GiB


def save(model: oir.Model, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write `model` to `path` by rename; weights beyond 1.8 GB go to `path` + ".data" beside it.

    Args:
        model: stays as it is.
        path: the `.onnx` file.
        metadata: goes into the model's metadata properties.

    Raises:
        UsageError: the file cannot be written (a full disk, a missing folder).
    """
    target = Path(path)
    stored = model.clone()
    common.DeduplicateHashedInitializersPass()(stored)
    stored.metadata_props.update(metadata or {})
    size = sum(v.const_value.nbytes for v in stored.graph.initializers.values() if v.const_value is not None)
    data = f"{target.name}.data"
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            file = Path(folder) / target.name
            oir.save(stored, file, external_data=data if size > _INLINE_LIMIT else None)
            if size > _INLINE_LIMIT:
                os.replace(Path(folder) / data, target.parent / data)
            os.replace(file, target)
    except OSError as error:
        raise UsageError(f"{target}: cannot write the file: {error.strerror or error}") from error


def stored_bytes(path: str | os.PathLike[str]) -> int:
    """Size of the model file at `path`, external data included."""
    file = Path(path)
    data = file.with_name(f"{file.name}.data")
    return file.stat().st_size + (data.stat().st_size if data.exists() else 0)
