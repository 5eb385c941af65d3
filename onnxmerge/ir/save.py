"""Write a model whole or not at all, equal initializers stored once."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import onnx_ir as oir

from onnxmerge.errors import UsageError
from onnxmerge.files import place_while_written
from onnxmerge.ir.stored import check_external, store_once

_INLINE_LIMIT = 1_800_000_000  # bytes; protobuf stops at 2 GiB
_SMALL = 1024
"""Bytes up to which an array stays in the model's own file, where shape inference can read it."""


def save(
    model: oir.Model,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    beside: bool = False,
) -> None:
    """Write `model` to `path` by rename; weights beyond 1.8 GB go to `path` + ".data" beside it.

    Args:
        model: stays as it is.
        path: the `.onnx` file.
        metadata: goes into the model's metadata properties.
        beside: put weights into `path` + ".data" whatever their size. They are then copied from file to file and never
            held in memory.

    Raises:
        UsageError: the file cannot be written (a full disk, a missing folder).
        ModelError: an external data file that the model refers to is missing or too short.
    """
    with staged(model, path, metadata, beside=beside):
        pass


@contextlib.contextmanager
def staged(
    model: oir.Model,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    beside: bool = False,
) -> Iterator[Path]:
    """Like `save`, but first yield where the complete files lie, in a folder of their own beside `path`.

    They move to their place when the block ends, and vanish when it raises.
    """
    target = Path(path)
    stored = model.clone()
    store_once(stored)
    stored.metadata_props.update(metadata or {})
    tensors = [v.const_value for g in stored.graphs() for v in g.initializers.values() if v.const_value is not None]
    for tensor in tensors:
        if isinstance(tensor, oir.ExternalTensor):
            check_external(tensor)
    beside = beside or sum(tensor.nbytes for tensor in tensors) > _INLINE_LIMIT
    if not beside:
        oir.external_data.load_to_model(stored)
    data = target.with_name(f"{target.name}.data")
    folder = place_while_written(target)
    try:
        with _write_errors(target):
            folder.mkdir(exist_ok=True)
            for left in folder.iterdir():  # by a run that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            file = folder / target.name
            oir.save(stored, file, external_data=data.name if beside else None, size_threshold_bytes=_SMALL)
        yield file
        with _write_errors(target):
            _move(file, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(file: Path, target: Path) -> None:
    """Put a written model, and its data file if it has one, into place; a data file that it replaces goes.

    A process killed in between leaves no model beside the data of another.
    """
    data, old = file.with_name(f"{file.name}.data"), target.with_name(f"{target.name}.data")
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder")
    if not data.exists():
        replaced = target.exists()
        os.replace(file, target)
        if replaced:
            old.unlink(missing_ok=True)
        return
    if old.exists():
        target.unlink(missing_ok=True)
    os.replace(data, old)
    os.replace(file, target)


@contextlib.contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{target}: cannot write the file: {error.strerror or error}") from error


def stored_bytes(path: str | os.PathLike[str]) -> int:
    """Size of the model file at `path` and of the external data files that it names."""
    file = Path(path)
    external = [file.parent / name for name in external_files(file)]
    return file.stat().st_size + sum(own.stat().st_size for own in external if own.is_file())


def external_files(path: str | os.PathLike[str]) -> list[str]:
    """The external data files that the model at `path` names, relative to its folder."""
    graph = onnx.load(path, load_external_data=False).graph
    entries = [entry for tensor in graph.initializer for entry in tensor.external_data]
    return sorted({entry.value for entry in entries if entry.key == "location"})
