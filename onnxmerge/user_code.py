"""A user's own Python, named `module:name`: what it raises ends in one sentence that names it."""

import contextlib
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnxmerge.errors import OnnxMergeError, UsageError

PATTERN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_code(text: str) -> bool:
    """Whether `text` is written `module:name`; anything that exists is a path."""
    return PATTERN.fullmatch(text) is not None and not Path(text).exists()


@contextlib.contextmanager
def guarded(name: str) -> Iterator[None]:
    """Run code that is not ours; modules are looked for in the current folder too.

    Args:
        name: what the code is called in the sentence.

    Raises:
        UsageError: the code raises anything, or ends the process.
    """
    sys.path.insert(0, "")  # the console script does not look in the current folder by itself
    try:
        yield
    except OnnxMergeError:
        raise
    except (Exception, SystemExit) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OnnxMergeError) else None
        if cause is not None:
            raise cause from error
        raise UsageError(f"{name}: failed with {type(error).__name__}: {' '.join(str(error).split())}") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove("")


def imported(source: str) -> Any:
    """What `source`, written `module:name`, names.

    Raises:
        UsageError: it is not written so, or there is no such module or name.
    """
    if PATTERN.fullmatch(source) is None:
        raise UsageError(f"{source}: is not written module:name")
    module, _, name = source.partition(":")
    with guarded(source):
        return getattr(importlib.import_module(module), name)
