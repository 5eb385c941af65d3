"""Recipes: commands and their options as YAML, to be read, kept beside the models, and run again.

    steps:
    - zip:
        models: [digits.onnx, fashion.onnx]
        data: {digits: digits.npz, fashion: fashion.npz}
        output: zipped
        share: 5
    - validate:
        merged: zipped/merged.onnx
        against: [digits.onnx, fashion.onnx]
        data: {digits: digits.npz, fashion: fashion.npz}
        max-drop: 0.01

A step is a command of the command line; its keys are the command's arguments and options by their long names.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from onnxmerge.errors import UsageError
from onnxmerge.files import read_yaml

_SHOWN = frozenset({"COMMANDLINE", "ENVIRONMENT"})
"""Where a parameter of a recipe came from: defaults are left out."""
_HOW = frozenset({"dry_run", "as_json", "verbose", "quiet", "resume", "overwrite"})
"""Parameters that say how a command is run, not what it makes."""


@dataclass(frozen=True)
class Step:
    """One step of a recipe.

    Attributes:
        command: its name.
        values: by the name of an argument or option: a text, a number, a truth value, a list of these, or
            {task or setting: text}.
    """

    command: str
    values: Mapping[str, Any]


def read_recipe(path: Path) -> list[Step]:
    """The steps of the recipe in the file `path`.

    Raises:
        UsageError: it cannot be read, or is no list of steps.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or set(content) != {"steps"} or not isinstance(content["steps"], list):
        raise UsageError(f"{path}: a recipe has one key, steps, with a list of commands")
    return [_step(path, number, own) for number, own in enumerate(content["steps"], 1)]


def _step(path: Path, number: int, content: object) -> Step:
    if not isinstance(content, dict) or len(content) != 1:
        raise UsageError(f"{path}: step {number}: a step is one command with its options, such as zip: {{...}}")
    ((command, values),) = content.items()
    if not isinstance(values, dict):
        raise UsageError(f"{path}: step {number} ({command}): its options are no mapping of names to values")
    return Step(str(command), {str(name): value for name, value in values.items()})


def arguments(step: Step, command: TyperCommand) -> list[str]:
    """The step as the command line of `command`, without the command's name.

    Raises:
        UsageError: the command has no such option, or the option cannot have that value.
    """
    known = {_name(parameter): parameter for parameter in command.params}
    options: list[str] = []
    operands: list[str] = []
    for name, value in step.values.items():
        if name not in known:
            raise UsageError(f"there is no {name!r}; {step.command} has {', '.join(known)}")
        parameter = known[name]
        if parameter.param_type_name == "argument":
            operands += _texts(name, value)
        elif getattr(parameter, "is_flag", False):
            options += _flag(name, value, parameter)
        elif parameter.multiple:
            options += [part for text in _texts(name, value) for part in (_long(parameter), text)]
        else:
            options += [_long(parameter), ",".join(_texts(name, value))]
    return [*options, "--", *operands]


def _flag(name: str, value: object, parameter: Any) -> list[str]:
    if not isinstance(value, bool):
        raise UsageError(f"{name} is true or false, not {value!r}")
    if value:
        return [_long(parameter)]
    return [parameter.secondary_opts[0]] if parameter.secondary_opts else []


def _texts(name: str, value: object) -> list[str]:
    if isinstance(value, Mapping):
        plain = {key: str(own).lower() if isinstance(own, bool) else own for key, own in value.items()}
        return [f"{key}={text}" for key, own in plain.items() for text in _texts(name, own)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [text for own in value for text in _texts(name, own)]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{name} cannot be {value!r}")
    return [str(value)]


def _plain(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_plain(own) for own in value]
    return value if isinstance(value, bool | int | float) else str(value)


class Told(TyperCommand):
    """A command that ends by telling on stderr the recipe that it amounts to."""

    def invoke(self, ctx: Any) -> Any:
        """See `click.Command.invoke`."""
        result = super().invoke(ctx)
        # a step of a recipe has no parent; of several processes the first tells
        if ctx.parent is not None and not ctx.params.get("quiet") and os.environ.get("RANK", "0") == "0":
            print(f"# recipe (onnxmerge run replays it):\n{_recipe_of(self, ctx)}", end="", file=sys.stderr)
        return result


def _recipe_of(command: TyperCommand, context: Any) -> str:
    """The call in `context` as a recipe of one step: what was given, and none of the defaults."""
    from onnxmerge.report.recipe import as_yaml

    values = {
        _name(parameter): _plain(context.params[parameter.name])
        for parameter in command.params
        if parameter.name not in _HOW and context.get_parameter_source(parameter.name).name in _SHOWN
    }
    return as_yaml({"steps": [{context.info_name: values}]})


def _name(parameter: Any) -> str:
    """What a parameter is called in a recipe."""
    return _long(parameter).removeprefix("--") if parameter.param_type_name == "option" else parameter.name


def _long(parameter: Any) -> str:
    return next(option for option in parameter.opts if option.startswith("--"))
