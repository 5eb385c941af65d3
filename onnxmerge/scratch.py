"""Temporary folders, which may hold gigabytes: what a killed run left behind is removed by the next one."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing tells whether a run still goes on
    fcntl = None  # type: ignore[assignment]

_PREFIX = "onnxmerge-"
_YOUNG = 60.0
"""Seconds that a folder is left alone even when nothing holds it: its run may be about to."""


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yield a new folder in the system's place for temporary files; it goes when the block ends.

    The run holds it by a lock of the system's, which goes with the process, however that ends.
    """
    _clear()
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name:
        handle = _held(Path(name))
        try:
            yield Path(name)
        finally:
            if handle is not None:
                os.close(handle)


def _clear() -> None:
    """Remove the folders of runs that are no more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or time.time() - folder.stat().st_mtime < _YOUNG:
                continue
            handle = _held(folder)
            if handle is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(handle)


def _held(folder: Path) -> int | None:
    """A lock on `folder`; None where another process has it, or where there are no locks."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
