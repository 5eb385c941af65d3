"""pack: models that share weights, or nothing, become one graph with the same outputs.

Inputs are tied, equal weights stored once, and equal sub-graphs computed once; nothing is approximated.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as oir

from onnxmerge.errors import GateFailed, UsageError
from onnxmerge.files import claim_file
from onnxmerge.ir.identity import draws_numbers
from onnxmerge.ir.layers import parameter_count
from onnxmerge.ir.light import read_light
from onnxmerge.ir.save import staged, stored_bytes
from onnxmerge.ir.stored import is_external
from onnxmerge.methods.pack.packing import Endpoint, Packed, pack_graphs
from onnxmerge.methods.pack.parity import Difference, Original, compare
from onnxmerge.methods.progress import Progress, Silent
from onnxmerge.methods.recipe import TASKS
from onnxmerge.methods.task import task_names
from onnxmerge.report.provenance import hardware, library_versions, sha256
from onnxmerge.report.recipe import as_recipe, step_of, with_steps
from onnxmerge.report.schema import Candidate, InputRecord, Result, TaskScore

TOLERANCE = 1e-5
"""Largest relative difference of an output that passes as another order of the runtime's sums."""


def pack_models(
    models: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    share_inputs: Sequence[str] = (),
    separate_inputs: bool = False,
    check: bool = True,
    seed: int = 0,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Pack models into one graph and write it to `output`; its outputs are called `TASK/output`.

    Args:
        models: the ONNX files, at least two; a task is called after its file.
        output: the `.onnx` file; weights go to `output` + ".data" when a model has such a file, or beyond 1.8 GB.
        share_inputs: groups such as "A:x=B:input_1" of inputs that shall be one, besides those of one name, type and
            shape.
        separate_inputs: tie only what `share_inputs` names; the other inputs are called `TASK/input`.
        check: run the packed model and the originals on made-up inputs before anything is written.
        seed: of these inputs.
        threads: for onnxruntime.
        overwrite: replace the files of an earlier run.
        progress: told what is going on.

    Returns:
        The result, with the packed model as its only candidate.

    Raises:
        UsageError: the output exists, or inputs that shall be one contradict each other.
        ModelError: a model cannot be read or converted.
        GateFailed: an output differs from the original's by more than `TOLERANCE` (relative); nothing is written.
    """
    progress = progress or Silent()
    begun = time.perf_counter()
    names = task_names(models)
    paths = dict(zip(names, map(Path, models), strict=True))
    with claim_file(output, overwrite=overwrite) as target:
        progress.stage("read", len(names))
        graphs: dict[str, oir.Model] = {}
        for task, path in paths.items():
            graphs[task] = read_light(path)
            progress.advance(task)
        asked = parse_share_inputs(share_inputs, graphs)
        records = [_record(task, path, graphs[task]) for task, path in paths.items()]
        random = [task for task, model in graphs.items() if draws_numbers(model)]
        metadata = {key: value for task, model in graphs.items() for key, value in _own_metadata(task, model).items()}
        beside = any(is_external(model) for model in graphs.values())
        progress.stage("pack")
        packed = pack_graphs(graphs, asked, separate=separate_inputs)
        step = step_of(
            "pack",
            {record.path: record.sha256 for record in records},
            {"models": models, "share_input": share_inputs, "separate_inputs": separate_inputs or None},
        )
        metadata = with_steps({**metadata, TASKS: json.dumps(packed.inputs)}, step)
        notes = [*_sharing(packed), *packed.notes]
        differences: dict[str, Difference] = {}
        with staged(packed.model, target, metadata, beside=beside) as file:
            if check:
                progress.stage("check")
                originals = {task: Original(paths[task], packed.inputs[task]) for task in names if task not in random}
                differences, unchecked = compare(file, originals, seed=seed, threads=threads)
                notes += [*_verdicts(differences, random, target), *unchecked]
            size = stored_bytes(file)
    candidate = Candidate(
        name=target.stem,
        share=0,
        path=str(target),
        parameters=parameter_count(packed.model),
        bytes=size,
        tasks={task: TaskScore(relative_error=difference.relative) for task, difference in differences.items()},
        steps=0,
        seconds=time.perf_counter() - begun,
    )
    return Result(
        method="pack",
        versions=library_versions(),
        inputs=records,
        candidates=[candidate],
        chosen=candidate.name,
        recipe=as_recipe([step], target),
        hardware=hardware(),
        notes=notes,
    )


def parse_share_inputs(groups: Sequence[str], models: Mapping[str, oir.Model]) -> list[list[Endpoint]]:
    """What `--share-input TASK:input=TASK:input[=...]` names; task and input names may hold `:` and `=` themselves.

    Raises:
        UsageError: a part names no input, there is only one, or one stands in two groups.
    """
    known = {f"{task}:{value.name}": (task, value.name or "") for task, m in models.items() for value in m.graph.inputs}
    taken: set[Endpoint] = set()
    found = []
    for text in groups:
        group: list[Endpoint] = []
        rest = text
        while rest:
            fitting = [name for name in known if rest == name or rest.startswith(f"{name}=")]
            if not fitting:
                raise UsageError(f"--share-input {text}: no input is called {rest!r}; there are {', '.join(known)}")
            name = max(fitting, key=len)
            group.append(known[name])
            rest = rest[len(name) + 1 :]
        if len(group) < 2:
            raise UsageError(f"--share-input {text}: give at least two inputs, as in A:x=B:y")
        if len(set(group)) < len(group) or taken & set(group):
            raise UsageError(f"--share-input {text}: an input is named twice")
        taken |= set(group)
        found.append(group)
    return found


def _own_metadata(task: str, model: oir.Model) -> dict[str, str]:
    """The model's metadata and texts under keys that begin with its task."""
    texts = {"doc_string": model.doc_string, "graph_doc_string": model.graph.doc_string}
    own = {key: text for key, text in texts.items() if text} | dict(model.metadata_props)
    return {f"{task}/{key}": value for key, value in sorted(own.items())}


def _record(task: str, path: Path, model: oir.Model) -> InputRecord:
    return InputRecord(
        task=task, path=str(path), sha256=sha256(path), parameters=parameter_count(model), bytes=stored_bytes(path)
    )


def _sharing(packed: Packed) -> list[str]:
    """What is computed once, and which inputs are shared, in sentences."""
    notes = [
        f"{shared} of the {total} nodes of {task} are computed for other tasks too."
        for task, (shared, total) in packed.nodes.items()
    ]
    readers: dict[str, list[str]] = {}
    for task, own in packed.inputs.items():
        for called in own.values():
            readers.setdefault(called, []).append(task)
    return notes + [f"The input {name} is read by {', '.join(tasks)}." for name, tasks in readers.items()]


def _verdicts(differences: Mapping[str, Difference], random: Sequence[str], target: Path) -> list[str]:
    """How the outputs compare, in sentences.

    Raises:
        GateFailed: one differs too much.
    """
    notes = [f"{task} draws random numbers, so its outputs were not compared." for task in random]
    for task, difference in differences.items():
        if difference.largest > TOLERANCE:
            raise GateFailed(
                f"{target}: the outputs of {task} differ from the original's by {difference.largest:.1e} (relative), "
                f"more than {TOLERANCE:g}; nothing was written (--no-check writes it all the same)"
            )
    same = [task for task, difference in differences.items() if difference.identical]
    if same:
        notes.append(f"On made-up inputs the outputs of {', '.join(same)} equal the original's bit for bit.")
    return notes + [
        f"On made-up inputs the outputs of {task} differ from the original's by {difference.largest:.1e} (relative)."
        for task, difference in differences.items()
        if not difference.identical
    ]
