"""The recipe of a run: everything that decides what its output is."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from onnxmerge.methods.task import Task
from onnxmerge.report.provenance import sha256


def recipe_of(method: str, tasks: Sequence[Task], settings: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The recipe as plain JSON: models by their hashes, data as they were given, `more` by its names."""
    recipe = {
        "method": method,
        **more,
        "models": {task.name: sha256(task.path) for task in tasks},
        "data": {task.name: task.data.source for task in tasks},
        "settings": dict(settings),
    }
    return dict(json.loads(json.dumps(recipe)))
