"""The tasks of one model, merged or not, each with its samples: to judge what becomes of the model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as oir

from onnxmerge.data import Split, parse_data_option
from onnxmerge.ir.labels import dims
from onnxmerge.ir.layers import parameter_count
from onnxmerge.methods.extract import cut_task
from onnxmerge.methods.recipe import TASKS
from onnxmerge.methods.task import Feeds, Network, Task, with_data


@dataclass
class Part(Task):
    """One task of a model; its inputs have their own names, its outputs those of the model.

    Attributes:
        called: what the model calls each of its inputs.
    """

    called: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    def merged_feeds(self, split: Split, merged: oir.Model) -> Feeds:
        """This task's samples for the whole model; inputs that only other tasks read get zeros."""
        own = set(self.called.values())
        others = [value for value in merged.graph.inputs if value.name not in own]
        blanks = {value.name or "": [size or 1 for size in dims(value)[1:]] for value in others}
        return Feeds(split, self.called, blanks=blanks)


def merged_tasks(model: oir.Model) -> list[str]:
    """The tasks of a merged model; none where the model is not merged.

    A model is merged when its metadata name its tasks and every output is called `TASK/output`.
    """
    try:
        tasks = list(json.loads(model.metadata_props[TASKS]))
    except (KeyError, TypeError, ValueError):
        return []
    outputs = [value.name or "" for value in model.graph.outputs]
    named = [task for task in tasks if any(output.startswith(f"{task}/") for output in outputs)]
    return named if all(any(output.startswith(f"{task}/") for task in named) for output in outputs) else []


def parts_of(path: Path, model: oir.Model, data: Sequence[str], *, seed: int) -> list[Part]:
    """The tasks of `model`, the normal form of the file `path`, with their samples.

    A model that is not merged is one task, called after the file.

    Args:
        path: of the model.
        model: stays as it is.
        data: `D` for all tasks, `TASK=D` for one.
        seed: of the held-out tenth where a source has no test samples.

    Raises:
        UsageError: a source is missing or does not fit its task.
    """
    tasks = merged_tasks(model)
    networks, called = [], []
    for name in tasks or [path.stem]:
        own = model.clone()
        called.append(
            cut_task(own, name) if tasks else {value.name or "": value.name or "" for value in own.graph.inputs}
        )
        networks.append(Network(name, path, own, parameter_count(own)))
    loaded = with_data(networks, parse_data_option(data, [network.name for network in networks]), seed=seed)
    return [
        Part(task.name, task.path, task.model, task.parameters, task.data, called=names)
        for task, names in zip(loaded, called, strict=True)
    ]


def part_outputs(parts: Sequence[Part]) -> dict[str, list[str]]:
    """What the model calls the outputs of each of its tasks."""
    return {part.name: part.outputs for part in parts}
