"""validate: hold a merged model against its originals in onnxruntime, and say which bounds it breaks."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as oir

from onnxmerge.errors import UsageError
from onnxmerge.ir.labels import dims
from onnxmerge.ir.layers import parameter_count
from onnxmerge.ir.load import load, read
from onnxmerge.ir.save import stored_bytes
from onnxmerge.methods.bounds import Bounds, score_checks, size_checks, speed_checks, timed, tolerance_check
from onnxmerge.methods.measure import Bench, Judge, nodes_note, unreliable_note
from onnxmerge.methods.task import Network, check_inputs, sources_of, task_outputs, with_data
from onnxmerge.report.provenance import hardware, library_versions
from onnxmerge.report.recipe import recipe_of_call
from onnxmerge.report.schema import BoundCheck, Candidate, Result, TaskScore
from onnxmerge.scratch import scratch


def validate_model(
    merged: str | os.PathLike[str],
    against: Mapping[str, str | os.PathLike[str]],
    data: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    *,
    bounds: Bounds | None = None,
    samples: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    providers: Sequence[str] = ("cpu",),
) -> tuple[Result, list[str]]:
    """Score `merged` on held-out data.

    Args:
        merged: its outputs are called `TASK/output`.
        against: for each task its original.
        data: one source for all tasks, or one for each.
        bounds: latency is measured only when `min_speedup` is asked.
        samples: at most this many held-out samples of each task.
        seed: of the choice of samples.
        threads: for onnxruntime.
        providers: where merged model and originals run, short names in order of preference.

    Returns:
        The result, with the merged model as its only candidate, and one sentence for each broken bound.

    Raises:
        UsageError: the data, the tasks or the bounds do not fit, or a provider is missing or falls back to another.
        ModelError: a model cannot be read.
    """
    bounds = bounds or Bounds()
    begun = time.perf_counter()
    model = load(merged)
    scored = _as_stored(merged, model)
    networks = [_original(task, path) for task, path in against.items()]
    _check_outputs(merged, model, networks)
    check_inputs(merged, model, networks)
    tolerances = bounds.tolerances([name for names in task_outputs(networks).values() for name in names])
    sources = sources_of(data, networks)
    tasks = with_data(networks, sources, seed=seed)
    path, file = Path(merged), str(merged)
    bench = Bench(tasks, [value.name or "" for value in model.graph.inputs], threads, providers)
    nodes = bench.nodes(path)
    scores: dict[str, TaskScore] = {}
    checks: list[BoundCheck] = []
    with scratch() as folder:
        judge = Judge(tasks, folder, threads, samples=samples, seed=seed, providers=providers)
        for task in tasks:
            started = time.perf_counter()
            tally = judge.tally(task, scored, tolerances)
            scores[task.name] = tally.score()
            names = task_outputs([task])[task.name]
            gaps = [(name, gap) for name, gap in zip(names, tally.gaps, strict=True) if gap is not None]
            found = [tolerance_check(file, name, gap) for name, gap in gaps]
            found += score_checks(file, task.name, scores[task.name], bounds)
            checks += timed(found, time.perf_counter() - started)
    if bounds.min_agreement is not None and all(score.agreement is None for score in scores.values()):
        raise UsageError(f"{merged}: no task names classes, so there is no agreement that a bound could ask for")
    candidate = Candidate(
        name=path.stem,
        share=int(model.metadata_props.get("onnxmerge.share", "0")),
        path=file,
        parameters=parameter_count(model),
        bytes=stored_bytes(path),
        tasks=scores,
        steps=0,
        seconds=time.perf_counter() - begun,
        nodes=nodes,
    )
    checks += size_checks(file, candidate.bytes, bounds)
    notes = [nodes_note(path, nodes)]
    if bounds.min_speedup is not None:
        started = time.perf_counter()
        candidate.latency_ms, reliable = bench.latency(path)
        if not reliable:
            notes.append(unreliable_note(path))
        checks += timed(speed_checks(file, candidate.latency_ms.speedup, bounds), time.perf_counter() - started)
    given = {"merged": merged, "against": against, "data": data, **bounds.options(), "samples": samples, "seed": seed}
    given |= {"threads": threads, "providers": providers}
    result = Result(
        method="validate",
        versions=library_versions(),
        inputs=[task.record() for task in tasks],
        candidates=[candidate],
        chosen=None,
        recipe=recipe_of_call("validate", given),
        hardware=hardware(),
        notes=notes,
        checks=checks,
    )
    broken = result.broken
    result.chosen = None if broken else candidate.name
    result.notes += broken
    return result, broken


def _as_stored(path: str | os.PathLike[str], normal: oir.Model) -> oir.Model:
    """The model at `path` as stored, where it takes the batches that its normal form takes; else the normal form.

    Folding constants takes the rounding out of quantized weights.
    """
    stored = read(path)
    takes = [dims(value)[:1] for value in stored.graph.inputs] == [dims(value)[:1] for value in normal.graph.inputs]
    return stored if takes and not stored.functions else normal


def _original(task: str, path: str | os.PathLike[str]) -> Network:
    model = load(path)
    return Network(task, Path(path), model, parameter_count(model))


def _check_outputs(path: str | os.PathLike[str], merged: oir.Model, networks: Sequence[Network]) -> None:
    present = [value.name or "" for value in merged.graph.outputs]
    for network in networks:
        for output in network.outputs:
            if f"{network.name}/{output}" not in present:
                raise UsageError(
                    f"{path}: has no output {network.name}/{output}; its outputs are {', '.join(present)} "
                    "(--against takes TASK=MODEL.onnx with TASK as in these names)"
                )
