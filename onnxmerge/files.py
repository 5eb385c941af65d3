"""Read YAML that holds data alone; write files whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnxmerge.errors import UsageError


def read_yaml(path: Path) -> Any:
    """What a YAML file without tags holds.

    Raises:
        UsageError: it cannot be read, or is no YAML.
    """
    import yaml  # only what reads YAML loads it

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on any failure.

    Raises:
        UsageError: the disk is full or the folder cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.partial")
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


def claim_folder(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """Create the output folder `path` and return it.

    Raises:
        UsageError: it holds files already and neither `overwrite` nor a resume was asked for, or it cannot be made.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file, not an output folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise UsageError(f"{folder}: the output folder is not empty; pass --overwrite to replace its files")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot create the output folder: {error.strerror or error}") from error
    return folder
