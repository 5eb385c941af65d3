"""Read YAML that holds data alone; write files whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnxmerge.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs apart
    fcntl = None  # type: ignore[assignment]

_LARGEST = 100_000
"""Nodes that a YAML file may have."""


def read_yaml(path: Path) -> Any:
    """What a YAML file without tags holds.

    Raises:
        UsageError: it cannot be read, or is no YAML.
    """
    import yaml  # only what reads YAML loads it

    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return loader.construct_document(node)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise UsageError(f"{path}: is nested too deep") from error
    # the last four come from scalars that are not what they look like, such as the date 2020-13-45
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise UsageError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error


def _size(node: Any, known: dict[Any, int]) -> int:
    """How many nodes there are once every alias is written out.

    Raises:
        ValueError: more than `_LARGEST`, or one holds itself.
    """
    if node not in known:
        known[node] = _LARGEST
        inside = [] if isinstance(node.value, str) else node.value  # of a mapping, pairs
        parts = [part for own in inside for part in (own if isinstance(own, tuple) else (own,))]
        known[node] = 1 + sum(_size(part, known) for part in parts)
    if known[node] >= _LARGEST:
        raise ValueError("its aliases (*) stand for too much")
    return known[node]


def place_while_written(target: Path) -> Path:
    """Where `target` lies while it is written: always there, so that what a killed run left is found and replaced."""
    return target.with_name(f".{target.name}.partial")


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on any failure.

    Raises:
        UsageError: the disk is full or the folder cannot be written.
    """
    target = Path(path)
    temporary = place_while_written(target)
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise UsageError(f"{target}: cannot write the file: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def claim_folder(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """Create the output folder `path` and yield it; until the block ends, no other run gets it.

    Raises:
        UsageError: it holds files already and neither `overwrite` nor a resume was asked for, it cannot be made or
            written, or another run has it.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file, not an output folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot create the output folder: {error.strerror or error}") from error
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise UsageError(f"{folder}: cannot write into the output folder")
    with _alone(folder, folder):
        if any(folder.iterdir()) and not overwrite:
            raise UsageError(f"{folder}: the output folder is not empty; pass --overwrite to replace its files")
        yield folder


@contextlib.contextmanager
def claim_file(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """See that the output file `path` may be written and yield it; until the block ends, no other run gets it.

    Raises:
        UsageError: it, or its data file, exists and `overwrite` was not asked for, its folder cannot be written, or
            another run has it.
    """
    target = Path(path)
    partial = place_while_written(target)
    try:
        partial.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"{target}: cannot write the file: {error.strerror or error}") from error
    with _alone(partial, target):
        try:
            for file in (target, target.with_name(f"{target.name}.data")):
                if file.exists() and not overwrite:
                    raise UsageError(f"{file}: exists already; pass --overwrite to replace it")
            yield target
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _alone(folder: Path, output: Path) -> Iterator[None]:
    """Hold `folder` against other runs that write `output`.

    The lock is the system's, on the folder itself: it goes with the process, however that ends.
    """
    if fcntl is None:
        yield
        return
    busy = UsageError(f"{output}: another run is writing there")
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise busy from error  # it ended just now and took its folder along
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        except OSError:
            pass  # a file system without locks
        if not folder.exists() or not os.path.samestat(os.fstat(handle), folder.stat()):
            raise busy
        yield
    finally:
        os.close(handle)
