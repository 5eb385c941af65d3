"""The recipe of a run: everything that decides what its output is."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from onnxmerge.methods.task import Task
from onnxmerge.report.recipe import Made, changed, hashes, step_of, with_steps

TASKS = "onnxmerge.tasks"
"""The key of a merged model's metadata with its tasks, and what each one's inputs are called where `pack` tied them."""


@dataclass(frozen=True)
class Recipe:
    """What a run was asked for.

    Attributes:
        step: the command that runs it again.
        tasks: their names.
        fingerprint: equal for runs that make the same candidates.
    """

    step: Made
    tasks: Sequence[str]
    fingerprint: str

    def metadata(self) -> dict[str, str]:
        """What every model that the run writes carries."""
        return with_steps({TASKS: json.dumps({task: {} for task in self.tasks})}, self.step)


def recipe_of(
    command: str,
    tasks: Sequence[Task],
    given: Mapping[str, Any],
    settings: Any,
    *,
    decides: Mapping[str, Any] | None = None,
    reads: Sequence[str | os.PathLike[str]] = (),
) -> Recipe:
    """The recipe of a run of `command`.

    Args:
        command: its name.
        tasks: with their data; their models and sources decide what comes out.
        given: what was given besides settings, by the names of arguments and options; goes before a setting's name.
        settings: a dataclass object whose fields are called like options.
        decides: what else decides the candidates; the name of a setting takes that setting's place.
        reads: models that are read besides those of the tasks.
    """
    options = {**given, **changed(settings), **given}  # in the order of what was given, whose values hold
    step = step_of(command, hashes([*reads, *(task.path for task in tasks)]), options)
    basis = {
        "command": command,
        "models": [*([step.files[str(path)]] for path in reads), *(_of(task, step) for task in tasks)],
        "settings": asdict(settings) | dict(decides or {}),
    }
    fingerprint = hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()
    return Recipe(step, [task.name for task in tasks], fingerprint)


def _of(task: Task, step: Made) -> list[str]:
    return [task.name, step.files[str(task.path)], task.data.source]
