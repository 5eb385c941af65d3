"""Write files whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from onnxmerge.errors import UsageError


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
