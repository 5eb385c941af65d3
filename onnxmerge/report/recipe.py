"""How a file came to be: the commands that made it, which stand in its metadata and which `onnxmerge run` replays."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from onnxmerge.report.provenance import library_versions, sha256

RECIPE = "onnxmerge.recipe"
"""The key of the metadata that tell how a file was made."""
FOLDERS = frozenset({"zip", "fuse", "gate", "calibrate"})
"""The commands whose output is a folder, which holds `merged.onnx`."""


@dataclass(frozen=True)
class Made:
    """One step on the way to a file.

    Attributes:
        command: its name.
        options: its arguments and options by their long names; what was left at its default is not there. The output
            is not among them: where a file lies does not change its bytes.
        files: SHA-256 of each model that was read, by its path.
        versions: of Python and the libraries.
    """

    command: str
    options: Mapping[str, Any]
    files: Mapping[str, str]
    versions: Mapping[str, str]


_STEPS = TypeAdapter(list[Made])


def hashes(models: Iterable[str | os.PathLike[str]]) -> dict[str, str]:
    """SHA-256 of each file, by its path."""
    return {str(path): sha256(path) for path in models}


def step_of(command: str, files: Mapping[str, str], options: Mapping[str, Any]) -> Made:
    """The step that runs `command` now.

    Args:
        command: its name.
        files: the models that it reads (see `hashes`).
        options: by their names in Python; None and what is empty was not given.
    """
    return Made(command, _given(options), files, library_versions())


def recipe_of_call(command: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What `onnxmerge run` reads, of a command that writes no model; `options` as in `step_of`."""
    return {"steps": [{command: _given(options)}]}


def changed(settings: Any) -> dict[str, Any]:
    """The fields of the dataclass object `settings` that differ from their defaults."""
    return {
        own.name: getattr(settings, own.name) for own in fields(settings) if getattr(settings, own.name) != own.default
    }


def with_steps(metadata: Mapping[str, str], *steps: Made) -> dict[str, str]:
    """The metadata of a file, with `steps` behind those that made it so far."""
    told = [asdict(step) for step in (*history(metadata), *steps)]
    return {**metadata, RECIPE: json.dumps(told)}


def history(metadata: Mapping[str, str]) -> list[Made]:
    """The steps that made a file, in order; none where its metadata tell of none."""
    try:
        return _STEPS.validate_json(metadata[RECIPE])
    except (KeyError, ValidationError):
        return []


def as_recipe(steps: Sequence[Made], output: str | os.PathLike[str]) -> dict[str, Any]:
    """What `onnxmerge run` reads: each step with its output, which is what the next one reads or, at the end, `output`.

    Args:
        steps: in order.
        output: the file that the last step made.
    """
    files = [*(next(iter(step.files), "") for step in steps[1:]), output]
    return {"steps": [{step.command: _placed(step, file)} for step, file in zip(steps, files, strict=True)]}


def as_yaml(recipe: Mapping[str, Any]) -> str:
    """The recipe as the text of a file."""
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)


def _placed(step: Made, file: str | os.PathLike[str]) -> dict[str, Any]:
    return {**step.options, "output": str(Path(file).parent if step.command in FOLDERS else file)}


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name.replace("_", "-"): _plain(value) for name, value in options.items()}
    return {name: value for name, value in plain.items() if value is not None and value not in ([], {})}


def _plain(value: Any) -> Any:
    """As JSON and YAML have it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(own) for own in value]
    if isinstance(value, os.PathLike | str):
        return str(value)
    return value
