"""extract: one task back out of a merged model."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as oir
from onnx_ir.passes import common

from onnxmerge.errors import UsageError
from onnxmerge.files import claim_file
from onnxmerge.ir.load import read
from onnxmerge.ir.reach import remove_unneeded
from onnxmerge.ir.save import save
from onnxmerge.ir.stored import is_external
from onnxmerge.methods.recipe import TASKS
from onnxmerge.passes.merge_identical_nodes import MergeIdenticalNodes
from onnxmerge.passes.take_stream import TakeStream
from onnxmerge.report.recipe import RECIPE, hashes, history, step_of, with_steps

_TEXTS = ("doc_string", "graph_doc_string")


def extract_task(
    merged: str | os.PathLike[str],
    task: str,
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> oir.Model:
    """Write what computes the outputs `TASK/...` of a merged model to `output`, under the task's own names.

    Inputs, outputs and metadata get the names that they had in the original; nodes and weights keep those of the
    merged model. What other tasks alone need is left out.

    Args:
        merged: what `pack` or `zip` wrote.
        task: one of its tasks.
        output: the `.onnx` file; weights go beside it when those of `merged` lie beside it.
        overwrite: replace the files of an earlier run.

    Returns:
        The extracted model.

    Raises:
        UsageError: there is no such file or task, or the output exists.
        ModelError: the model cannot be read.
    """
    with claim_file(output, overwrite=overwrite) as target:
        model = read(merged)
        beside = is_external(model)
        graph = model.graph
        if not any((value.name or "").startswith(f"{task}/") for value in graph.outputs):
            tasks = dict.fromkeys(name.split("/")[0] for v in graph.outputs if "/" in (name := v.name or ""))
            raise UsageError(f"{merged}: {_unknown(task, list(tasks))}")
        cut_task(model, task)
        for value in graph.outputs:
            value.name = (value.name or "").removeprefix(f"{task}/")
        MergeIdenticalNodes()(model)
        _pass_inputs_through(graph)
        common.NameFixPass()(model)
        _restore_metadata(model, task, Path(merged))
        save(model, target, beside=beside)
        return model


def cut_task(model: oir.Model, task: str) -> dict[str, str]:
    """Leave of a merged model what computes the outputs `TASK/...`, in place; its inputs get their own names again.

    Returns:
        For each input that is left, what the merged model called it.
    """
    graph = model.graph
    own = [value for value in graph.outputs if (value.name or "").startswith(f"{task}/")]
    TakeStream(task)(model)
    graph.outputs.clear()
    graph.outputs.extend(own)
    remove_unneeded(model)
    return _restore_inputs(graph, task, model.metadata_props)


def _unknown(task: str, tasks: list[str]) -> str:
    if not tasks:
        return "is no merged model: its outputs are not called TASK/output"
    return f"has no task {task!r}; its tasks are {', '.join(tasks)}"


def _restore_inputs(graph: oir.Graph, task: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """Keep the inputs that the task had, or reads, and give them their own names again: of each the name it had."""
    try:
        told = json.loads(metadata[TASKS])[task]
    except (KeyError, TypeError, ValueError):
        told = {}
    # zip keeps no names of inputs: they are the first network's
    original = told or {(v.name or "").removeprefix(f"{task}/"): v.name or "" for v in graph.inputs if v.uses()}
    present = {value.name or "": value for value in graph.inputs}
    kept = {name: present[called] for name, called in original.items() if called in present}
    graph.inputs.clear()
    graph.inputs.extend(dict.fromkeys(kept.values()))
    called = {value: value.name or "" for value in graph.inputs}
    for name, value in kept.items():
        value.name = name
    return {value.name or "": name for value, name in called.items()}


def _pass_inputs_through(graph: oir.Graph) -> None:
    """Let an output that copies the input of its name be that input, as it was in the original."""
    for index, value in enumerate(graph.outputs):
        producer = value.producer()
        source = producer.inputs[0] if producer is not None and producer.op_type == "Identity" else None
        if producer is not None and source in graph.inputs and source is not None and source.name == value.name:
            graph.outputs[index] = source
            graph.remove(producer, safe=True)


def _restore_metadata(model: oir.Model, task: str, merged: Path) -> None:
    """The task's own metadata and texts, and how it came here."""
    steps = [*history(model.metadata_props), step_of("extract", hashes([merged]), {"merged": merged, "task": task})]
    prefix = f"{task}/"
    own = {key.removeprefix(prefix): text for key, text in model.metadata_props.items() if key.startswith(prefix)}
    own.pop(RECIPE, None)
    model.doc_string, model.graph.doc_string = (own.pop(key, None) for key in _TEXTS)
    model.metadata_props.clear()
    model.metadata_props.update(with_steps(own, *steps))
