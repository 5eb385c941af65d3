"""onnxmerge run: the steps of a recipe, one after the other."""

import contextlib
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from onnxmerge.cli import options
from onnxmerge.cli.errors import reports_errors
from onnxmerge.cli.recipe import Step, arguments, read_recipe
from onnxmerge.errors import UsageError
from onnxmerge.user_code import is_code


@reports_errors
def run(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="recipe.yaml", help="The recipe.", show_default=False)],
    trust_code: Annotated[
        bool,
        typer.Option("--trust-code", help="Let data, passes and edits be code of the recipe's choice (module:name)."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands and stop.")] = False,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Run the steps of a recipe; the first that fails ends it with its exit code.

    Paths are relative to the recipe's folder. All steps are read before the first is run.
    """
    assert context.parent is not None
    commands = context.parent.command.commands  # type: ignore[attr-defined]
    how = {"resume": resume, "overwrite": overwrite, "verbose": verbose, "quiet": quiet}
    steps = read_recipe(recipe)
    with contextlib.chdir(recipe.resolve().parent):
        lines = [_line(recipe, number, step, commands, trusted=trust_code) for number, step in enumerate(steps, 1)]
        for number, (step, line) in enumerate(zip(steps, lines, strict=True), 1):
            command = commands[step.command]
            flags = [f"--{own.name}" for own in command.params if how.get(own.name)]
            whole = shlex.join(["onnxmerge", step.command, *flags, *line])
            if dry_run:
                print(whole)
                continue
            if not quiet:
                print(f"step {number} of {len(steps)}: {whole}", file=sys.stderr)
            code = command.main([*flags, *line], prog_name=step.command, standalone_mode=False)
            if code:
                raise typer.Exit(code)


def _line(recipe: Path, number: int, step: Step, commands: Mapping[str, TyperCommand], *, trusted: bool) -> list[str]:
    """The step as a command line, tried as far as that goes without running it.

    Raises:
        UsageError: it names the step and what is wrong with it.
    """
    where = f"{recipe}: step {number} ({step.command})"
    if step.command == "run" or step.command not in commands:
        known = ", ".join(name for name in commands if name != "run")
        raise UsageError(f"{where}: there is no such command; there are {known}")
    command = commands[step.command]
    try:
        line = arguments(step, command)
        given = command.make_context(step.command, list(line)).params
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    except typer.TyperException as error:
        raise UsageError(f"{where}: {error.format_message()}") from error
    code = next(_code(given), None)
    if code is not None and not trusted:
        raise UsageError(f"{where}: {code} would run code; --trust-code allows it")
    return line


def _code(given: Mapping[str, Any]) -> Iterator[str]:
    """What of a command's parameters names a user's own Python. Installed passes go by names without a colon."""
    yield from (f"data {own}" for own in given.get("data") or () if _is_function(own))
    yield from (f"pass {own}" for own in given.get("passes") or () if ":" in own)
    yield from (f"edit {own}" for own in given.get("edits") or ())


def _is_function(source: str) -> bool:
    return not Path(source).exists() and is_code(source.rpartition("=")[2])
