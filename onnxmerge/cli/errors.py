"""Turn errors into one sentence on stderr and the exit code of the contract."""

import functools
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import typer

from onnxmerge.errors import OnnxMergeError

INTERRUPTED = 130
"""What shells expect of a program that Ctrl-C ended."""
_FAULT = 4


def reports_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command: 1 a bound was broken, 2 usage or data, 3 a model, 4 a fault of ours; tracebacks only with -v."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        verbose = bool(kwargs.get("verbose"))
        try:
            command(*args, **kwargs)
        except typer.Exit:
            raise
        except OnnxMergeError as error:
            _fail(error.args, error.exit_code, verbose)
        except KeyboardInterrupt as error:
            _fail([str(error) or "interrupted"], INTERRUPTED, False)
        except Exception as error:
            hint = "" if verbose else "; -v shows where"
            _fail([f"a fault of onnxmerge: {type(error).__name__}: {error}{hint}"], _FAULT, verbose)

    return wrapped


def _fail(messages: Sequence[object], code: int, verbose: bool) -> None:
    if verbose:
        traceback.print_exc()
    for message in messages:
        print(f"onnxmerge: error: {message}", file=sys.stderr)
    raise typer.Exit(code)
