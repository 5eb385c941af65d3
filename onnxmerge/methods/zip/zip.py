"""zip: networks with different tasks become one multi-task network that computes their first layers once.

For each candidate of the plan: fuse the first units into one stem, fit each task's tail behind it, calibrate, validate.
The one that saves most among those that keep the bounds is chosen. Sources: Zippering (Chou et al. 2019) for
the sequence over k, MTZ (He et al. 2018) for sharing across tasks, PLeaS and RegMean for the least-squares fusion.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxmerge.files import claim_folder, write_text
from onnxmerge.methods.candidates import Interrupted, Shelf
from onnxmerge.methods.pictures import held_out_pictures
from onnxmerge.methods.progress import Progress, Silent
from onnxmerge.methods.recipe import recipe_of
from onnxmerge.methods.task import load_networks, sources_of, with_data
from onnxmerge.methods.zip.alignment import find_sharable
from onnxmerge.methods.zip.choices import TREE, Mode
from onnxmerge.methods.zip.fictive import find_sharable_of_any_width
from onnxmerge.methods.zip.fitting import Fitting
from onnxmerge.methods.zip.job import Job
from onnxmerge.methods.zip.plan import Plan, as_made, make_plan
from onnxmerge.methods.zip.run import Run
from onnxmerge.methods.zip.settings import ZipSettings
from onnxmerge.report.schema import Result
from onnxmerge.report.write import write_report
from onnxmerge.scratch import scratch


def zip_models(
    models: Sequence[str | os.PathLike[str]],
    data: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    settings: ZipSettings | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Zip networks of different tasks into one and write everything to the folder `output`.

    Args:
        models: the ONNX files, at least two; the first gives the stem its channel order.
        data: one source for all tasks, or one for each (see `onnxmerge.data`); labels are optional.
        output: gets merged.onnx, one model for each candidate, plan.json, report.json and report.html.
        settings: see `ZipSettings`.
        overwrite: replace the files of an earlier run.
        resume: keep the candidates of an earlier run with the same recipe and go on.
        progress: told what is going on.

    Returns:
        What report.json holds.

    Raises:
        UsageError: settings, data or the output folder do not fit, or the networks cannot share their inputs.
        ModelError: a network cannot be read or holds an operator that cannot be handled.
        KeyboardInterrupt: after the candidates finished so far have been reported.
    """
    settings = settings or ZipSettings()
    settings.check(len(models))
    progress = progress or Silent()
    progress.stage("load")
    networks = load_networks(models, same_inputs=settings.mode is Mode.COMPUTE)
    sources = sources_of(data, networks)
    tasks = with_data(networks, sources, seed=settings.seed)
    sharable = (find_sharable_of_any_width if settings.mode is Mode.WEIGHTS else find_sharable)(tasks)
    plan = make_plan(tasks, sharable, settings.share, settings.width, settings.sharing, settings.mode)
    candidates = [candidate.model_dump(exclude={"predicted"}) for candidate in plan.candidates]
    recipe = recipe_of(
        "zip",
        tasks,
        {"models": models, "data": sources, "share": settings.share, "max_drop": settings.max_drop},
        settings,
        decides={"share": settings.share == TREE, "candidates": candidates},
    )
    claimed = claim_folder(output, overwrite=overwrite or resume)
    with claimed as folder, scratch() as temporary:
        shelf, own = Shelf(folder, recipe, resume=resume), Path(temporary)
        fitting = Fitting(settings.samples, settings.seed, settings.threads, own, progress, settings.weights)
        run = Run(Job(tasks, sharable, plan, settings, fitting, shelf, progress), recipe, own)
        interrupted = run.make_candidates()
        result = run.result()
        shelf.choose(result.chosen)
        if result.chosen is not None:
            result.pictures = held_out_pictures(tasks, folder / "merged.onnx", threads=settings.threads)
        write_text(folder / "plan.json", as_made(plan, result, tasks, sharable).to_json())
        write_report(result, folder)
        if interrupted:
            raise Interrupted(result)
        return result


def plan_zip(
    models: Sequence[str | os.PathLike[str]],
    share: str = "auto",
    width: Sequence[float] = (1.0,),
    sharing: Sequence[float] = (1.0,),
    mode: Mode = Mode.COMPUTE,
) -> Plan:
    """What `zip_models` would share, before any weight is touched; needs no data."""
    networks = load_networks(models, same_inputs=mode is Mode.COMPUTE)
    sharable = (find_sharable_of_any_width if mode is Mode.WEIGHTS else find_sharable)(networks)
    return make_plan(networks, sharable, share, width, sharing, mode)
