"""triton: put a model into a model repository of the Triton Inference Server.

    REPOSITORY/NAME/config.pbtxt
    REPOSITORY/NAME/VERSION/model.onnx

A model with external data is a folder `model.onnx` that holds `model.onnx` and the data files.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnxmerge.errors import ModelError, OnnxMergeError, UsageError
from onnxmerge.files import write_text
from onnxmerge.ir.load import read
from onnxmerge.ir.save import external_files
from onnxmerge.methods.triton_config import ANY, TYPES, Array, Config, Message, parse_text
from onnxmerge.runtime.session import open_session, random_feeds, run

if TYPE_CHECKING:
    import onnxruntime

MAX_BATCH = 8
"""The largest batch where none is asked for."""
_MODEL, _CONFIG = "model.onnx", "config.pbtxt"


@dataclass(frozen=True)
class Placed:
    """Where a model lies now.

    Attributes:
        model: the file.
        config: the config.pbtxt.
        max_batch: what it says; 0: no batching.
        kept: whether the config was there before.
        versions: all versions of the model, ascending.
    """

    model: Path
    config: Path
    max_batch: int
    kept: bool
    versions: tuple[int, ...]


def place_model(
    model: str | os.PathLike[str],
    repository: str | os.PathLike[str],
    *,
    name: str | None = None,
    version: int = 1,
    max_batch: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
) -> Placed:
    """Copy the model at `model` into `repository`, with a config.pbtxt where there is none.

    Inputs and outputs are told as onnxruntime sees them, and whether axis 0 is a batch is tried by running the model.
    Other versions stay as they are. A config that is there stays too, with all that was added to it, as long as it
    does not contradict the model.

    Args:
        model: the ONNX file.
        repository: the folder; made where there is none.
        name: of the model; the file's stem when None.
        version: at least 1.
        max_batch: the largest batch that Triton makes up of requests. 0: none; then axis 0 is an axis like others.
            None: what the config there says, or else `MAX_BATCH` where the batch is free, and 0 where it is not.
        threads: for onnxruntime.
        overwrite: replace this version.

    Raises:
        UsageError: this version is there already, the config contradicts the model, or the batch cannot be free.
        ModelError: the model cannot be read, or holds what Triton has no type for.
    """
    path = Path(model)
    name = path.stem if name is None else name
    if not re.fullmatch(r"[^/\\\s][^/\\]*", name) or name.startswith("."):
        raise UsageError(f"--name {name}: is no name of a folder")
    if version < 1:
        raise UsageError(f"--version {version}: versions begin at 1")
    read(path)
    home = Path(repository) / name
    config, place = home / _CONFIG, home / str(version)
    others = [own for own in _versions(home) if own != version]
    if place.exists() and not overwrite:
        raise UsageError(f"{place}: this version is there already; pass --overwrite to replace it")
    kept = config.exists() and not (overwrite and not others)
    wanted = _config(path, name, max_batch, threads)
    if kept:
        found = _read_config(config)
        theirs = found.get("max_batch_size", [0])[-1]
        if max_batch is None and wanted.max_batch and isinstance(theirs, int):
            wanted = dataclasses.replace(wanted, max_batch=theirs)
        reason = wanted.contradiction(found)
        if reason is not None:
            raise UsageError(f"{config}: contradicts {path}: {reason}")
    with _write_errors(home):
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{version}.", dir=home) as folder:
            made = Path(folder) / "new"
            file = _copy(path, made)
            if not kept:
                write_text(config, wanted.text())
            if place.exists():
                os.replace(place, Path(folder) / "old")
            os.replace(made, place)
    return Placed(place / file, config, wanted.max_batch, kept, tuple(sorted([*others, version])))


def _versions(home: Path) -> list[int]:
    """The versions that are there; Triton passes over folders that are no numbers or begin with 0."""
    if not home.is_dir():
        return []
    return [int(own.name) for own in home.iterdir() if own.is_dir() and re.fullmatch(r"[1-9]\d*", own.name)]


def _read_config(config: Path) -> Message:
    try:
        return parse_text(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{config}: cannot be read: {error}") from error
    except UsageError as error:
        raise UsageError(f"{config}: {error}") from error


def _config(path: Path, name: str, max_batch: int | None, threads: int | None) -> Config:
    """The config for the model at `path`, as onnxruntime sees it."""
    session = open_session(path, threads=threads)
    ran = [_output_shapes(session, batch) for batch in (1, 2)]
    values = [*session.get_inputs(), *session.get_outputs()]
    shapes = {value.name: _shape(value.shape) for value in values}
    for value in session.get_outputs():
        if not value.shape and ran[0] is not None:  # onnxruntime calls an unknown rank [] too
            shapes[value.name] = (ANY,) * len(ran[0][value.name])
    fixed = next((name for name, shape in shapes.items() if not shape or shape[0] != ANY), None)
    why_not = None if fixed is None else f"the first axis of {fixed!r} is not free"
    for batch, found in enumerate(ran, start=1):
        if found is None and fixed is None:
            why_not = f"it does not run on made-up inputs at batch {batch}"
        others = [name for name, shape in (found or {}).items() if not shape or shape[0] != batch]
        if why_not is None and others:
            why_not = f"the first axis of {others[0]!r} is not the batch"
    if max_batch and why_not is not None:
        raise UsageError(f"{path}: Triton cannot make up batches of {max_batch}: {why_not}; give --max-batch 0")
    batch = max_batch if max_batch is not None else 0 if why_not else MAX_BATCH
    inputs, outputs = (
        [Array(value.name, _type(path, value.name, value.type), shapes[value.name]) for value in own]
        for own in (session.get_inputs(), session.get_outputs())
    )
    return Config(name, batch, inputs, outputs)


def _output_shapes(session: "onnxruntime.InferenceSession", batch: int) -> dict[str, tuple[int, ...]] | None:
    """The shapes of the outputs on made-up inputs; None where the model does not run on them."""
    try:
        return {name: np.shape(array) for name, array in run(session, random_feeds(session, batch)).items()}
    except (OnnxMergeError, ValueError):  # numpy finds no shape in a sequence
        return None


def _shape(sizes: Sequence[object]) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else ANY for size in sizes)


def _type(path: Path, name: str, kind: str) -> str:
    found = re.fullmatch(r"tensor\((\w+)\)", kind)
    if found is None or found[1] not in TYPES:
        raise ModelError(f"{path}: {name!r} is of type {kind}, which Triton does not know")
    return f"TYPE_{TYPES[found[1]]}"


def _copy(path: Path, folder: Path) -> Path:
    """Copy a model into the new folder `folder`; where its main file lies there."""
    folder.mkdir()
    external = external_files(path)
    main = Path(_MODEL) / _MODEL if external else Path(_MODEL)
    for source, place in [(path, main), *((path.parent / own, Path(_MODEL) / own) for own in external)]:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / place)
    return main


@contextlib.contextmanager
def _write_errors(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):
            home.rmdir()  # where nothing lies in it yet
        raise UsageError(f"{home}: cannot be written: {error.strerror or error}") from error
