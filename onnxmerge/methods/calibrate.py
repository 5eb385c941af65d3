"""calibrate: train a merged model towards its originals or labels, and keep what does best on held-out data."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as oir

from onnxmerge.calibration.settings import Settings
from onnxmerge.errors import UsageError
from onnxmerge.files import claim_folder
from onnxmerge.ir.labels import dims
from onnxmerge.ir.layers import parameter_count
from onnxmerge.ir.load import load
from onnxmerge.ir.opset import raise_opset
from onnxmerge.ir.save import save, stored_bytes
from onnxmerge.methods.candidates import Shelf
from onnxmerge.methods.measure import Judge
from onnxmerge.methods.progress import Progress, Silent
from onnxmerge.methods.recipe import recipe_of
from onnxmerge.methods.task import Network, Task, check_inputs, simple_network, sources_of, with_data
from onnxmerge.report.provenance import hardware, library_versions
from onnxmerge.report.recipe import as_recipe, with_steps
from onnxmerge.report.schema import Candidate, Result
from onnxmerge.report.write import write_report
from onnxmerge.scratch import scratch

GIVEN, CALIBRATED = "given", "merged"
_OLDEST = 13
"""The lowest opset that can be trained."""


def calibrate_model(
    merged: str | os.PathLike[str],
    teachers: Mapping[str, str | os.PathLike[str]],
    data: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    settings: Settings | None = None,
    samples: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Train the merged model `merged` and write it to the folder `output`.

    Args:
        merged: its outputs are called `TASK/output`, or as the teachers call them where these have one task.
        teachers: for each task its original.
        data: one source for all tasks, or one for each (see `onnxmerge.data`).
        output: gets merged.onnx, report.json and report.html.
        settings: how long, how fast, and with which losses.
        samples: at most this many samples of each task to train with.
        overwrite: replace the files of an earlier run.
        resume: go on with an earlier run of the same recipe.
        progress: told what is going on.

    Returns:
        What report.json holds: the candidates "given" and "merged".

    Raises:
        UsageError: tasks, data, settings or the output folder do not fit, or nothing was learned before a loss was no
            number.
        ModelError: a model cannot be read or holds an operator that cannot be trained.
        KeyboardInterrupt: the run can be resumed.
    """
    settings = settings or Settings(steps=1000)
    progress = progress or Silent()
    progress.stage("load")
    begun = time.perf_counter()
    model = load(merged)
    models = {task: load(path) for task, path in teachers.items()}
    opset = max(own.opset_imports.get("", 0) for own in (model, *models.values()))
    for own in (model, *models.values()):
        raise_opset(own, max(opset, _OLDEST))
    networks = [simple_network(task, teachers[task], own) for task, own in models.items()]
    outputs = _outputs(merged, model, networks)
    check_inputs(merged, model, networks)
    sources = sources_of(data, networks)
    tasks = _at_most(with_data(networks, sources, seed=settings.seed), samples, settings.seed)
    asked = {"merged": merged, "teacher": teachers, "data": sources, "steps": settings.steps, "samples": samples}
    if settings.label_weight == 1:  # the option that the command line has for it
        asked |= {"labels": True, "label_weight": None}
    recipe = recipe_of("calibrate", tasks, asked, settings, decides={"samples": samples}, reads=[merged])
    claimed = claim_folder(output, overwrite=overwrite or resume)
    with claimed as folder, scratch() as temporary:
        shelf = Shelf(folder, recipe, resume=resume)
        if shelf.model_path(CALIBRATED).exists() and shelf.model_path(CALIBRATED).samefile(merged):
            raise UsageError(f"{output}: holds the merged model itself; choose another output folder")
        notes = _without_teacher(model, outputs)
        judge = Judge(tasks, temporary, settings.threads, outputs=outputs)
        given = _candidate(GIVEN, Path(merged), model, judge)
        found = shelf.get(CALIBRATED)
        if found is None:
            losses, said = _train(model, tasks, outputs, settings, shelf, progress)
            notes += said
            path = shelf.model_path(CALIBRATED)
            save(model, path, with_steps(model.metadata_props, recipe.step))
            found = _candidate(CALIBRATED, path, model, judge)
            found.steps, found.losses, found.seconds = losses[-1][0], losses, time.perf_counter() - begun
            shelf.put(found)
        result = Result(
            method="calibrate",
            versions=library_versions(),
            inputs=[task.record() for task in tasks],
            candidates=[given, found],
            chosen=found.name,
            recipe=as_recipe([recipe.step], shelf.model_path(CALIBRATED)),
            hardware=hardware(),
            notes=notes,
        )
        write_report(result, folder)
        return result


def _train(
    model: oir.Model,
    tasks: Sequence[Task],
    outputs: Mapping[str, Sequence[str]],
    settings: Settings,
    shelf: Shelf,
    progress: Progress,
) -> tuple[list[tuple[int, float]], list[str]]:
    """Train `model` in place; the held-out losses, and what the report must say."""
    # torch is loaded only when it is needed
    from onnxmerge.methods.calibrating import calibrate_merged, remarks, require_learning

    progress.stage("calibrate", settings.steps)
    outcome = calibrate_merged(model, tasks, outputs, settings, progress, shelf.checkpoint(CALIBRATED))
    require_learning(outcome)
    notes = remarks("the model", outcome)
    if outcome.best_step == 0:
        notes.append("No measurement of the held-out loss was below that of the start: the weights are those given.")
    elif outcome.best_step < outcome.losses[-1][0]:
        notes.append(f"The weights are those of step {outcome.best_step}, where the held-out loss was least.")
    return outcome.losses, notes


def _candidate(name: str, path: Path, model: oir.Model, judge: Judge) -> Candidate:
    return Candidate(
        name=name,
        share=int(model.metadata_props.get("onnxmerge.share", "0")),
        path=str(path),
        parameters=parameter_count(model),
        bytes=stored_bytes(path),
        tasks=judge.score(model),
        steps=0,
        seconds=0.0,
    )


def _outputs(path: str | os.PathLike[str], merged: oir.Model, networks: Sequence[Network]) -> dict[str, list[str]]:
    """What the merged model calls each teacher's outputs: `TASK/output`, or all as the teachers do."""
    present = {value.name or "": value for value in merged.graph.outputs}
    plain = all(output in present for network in networks for output in network.outputs)
    found = {}
    for network in networks:
        own = network.outputs if plain else [f"{network.name}/{output}" for output in network.outputs]
        for output, theirs in zip(own, network.model.graph.outputs, strict=True):
            if output not in present:
                raise UsageError(
                    f"{path}: has no output {output}; its outputs are {', '.join(present)} "
                    "(--teacher takes TASK=MODEL.onnx with TASK as in these names)"
                )
            shapes = dims(present[output]), dims(theirs)
            if not _may_be_equal(*shapes):
                is_, was = (_described(shape) for shape in shapes)
                raise UsageError(f"{path}: its output {output} is {is_}, but that of {network.path} is {was}")
        found[network.name] = own
    return found


def _may_be_equal(ours: Sequence[int | None], theirs: Sequence[int | None]) -> bool:
    """Whether two shapes agree in every size that both know; of a shape that nobody knows nothing is known."""
    if not ours or not theirs:
        return True
    return len(ours) == len(theirs) and all(
        None in pair or len(set(pair)) == 1 for pair in zip(ours, theirs, strict=True)
    )


def _described(shape: Sequence[int | None]) -> str:
    return "x".join("N" if size is None else str(size) for size in shape)


def _at_most(tasks: list[Task], samples: int | None, seed: int) -> list[Task]:
    """The tasks with at most so many samples to train with; those that share data go on sharing them."""
    if samples is None:
        return tasks
    fewer = {id(t.data): replace(t.data, calibration=t.data.calibration.take(samples, seed)) for t in tasks}
    return [replace(task, data=fewer[id(task.data)]) for task in tasks]


def _without_teacher(merged: oir.Model, outputs: Mapping[str, Sequence[str]]) -> list[str]:
    """A warning where outputs that nothing is learned for may change with what they share."""
    taught = {name for names in outputs.values() for name in names}
    others = [value.name or "" for value in merged.graph.outputs if value.name not in taught]
    if not others:
        return []
    return [f"These outputs have no teacher, and change with what they share with others: {', '.join(others)}."]
