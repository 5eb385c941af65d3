"""Turn errors into one sentence on stderr and the exit code of the contract."""

import functools
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.core import TyperGroup

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


class Commands(TyperGroup):
    """The commands; a command line that none of them takes is told in one sentence as well."""

    def main(self, args: Sequence[str] | None = None, *others: Any, **more: Any) -> Any:
        """See `click.Command.main`."""
        given = sys.argv[1:] if args is None else args
        if not given or not more.get("standalone_mode", True):  # the help; a caller that wants exceptions
            return super().main(args, *others, **more)
        try:
            code = super().main(args, *others, **{**more, "standalone_mode": False})
        except typer.TyperException as error:
            sentence = error.format_message().replace("Value error, ", "").rstrip(".")
            context = getattr(error, "ctx", None)
            hint = f" ({context.command_path} --help tells more)" if context is not None else ""
            print(f"onnxmerge: error: {sentence}{hint}", file=sys.stderr)
            code = error.exit_code
        sys.exit(code or 0)


def _fail(messages: Sequence[object], code: int, verbose: bool) -> None:
    if verbose:
        traceback.print_exc()
    for message in messages:
        print(f"onnxmerge: error: {message}", file=sys.stderr)
    raise typer.Exit(code)
