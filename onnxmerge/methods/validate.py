"""validate: hold a merged model against its originals in onnxruntime, and say which bounds it breaks."""

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as oir

from onnxmerge.errors import UsageError
from onnxmerge.ir.layers import parameter_count
from onnxmerge.ir.load import load
from onnxmerge.ir.save import stored_bytes
from onnxmerge.methods.measure import Bench, Judge
from onnxmerge.methods.task import Network, with_data
from onnxmerge.report.provenance import hardware, library_versions
from onnxmerge.report.schema import Candidate, Result


@dataclass(frozen=True)
class Bounds:
    """What a merged model must keep; None: not asked.

    Attributes:
        atol: every output may differ from the original's by this much,
        rtol: plus this share of the original's magnitude.
        max_drop: largest loss of the worst task (see `TaskScore.drop`).
        min_speedup: least speed-up over the originals in spin-stopped sessions.
    """

    atol: float | None = None
    rtol: float | None = None
    max_drop: float | None = None
    min_speedup: float | None = None


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
        providers: where latency is measured.

    Returns:
        The result, with the merged model as its only candidate, and one sentence for each broken bound.

    Raises:
        UsageError: the data or the tasks do not fit.
        ModelError: a model cannot be read.
    """
    bounds = bounds or Bounds()
    begun = time.perf_counter()
    model = load(merged)
    networks = [_original(task, path) for task, path in against.items()]
    _check_outputs(merged, model, networks)
    sources = data if isinstance(data, Mapping) else {network.name: data for network in networks}
    tasks = with_data(networks, sources, seed=seed)
    path = Path(merged)
    with tempfile.TemporaryDirectory(prefix="onnxmerge-") as folder:
        judge = Judge(tasks, Path(folder), threads, samples=samples, seed=seed)
        tallies = judge.tally(model, atol=bounds.atol, rtol=bounds.rtol)
    candidate = Candidate(
        name=path.stem,
        share=int(model.metadata_props.get("onnxmerge.share", "0")),
        path=str(path),
        parameters=parameter_count(model),
        bytes=stored_bytes(path),
        tasks={task: tally.score() for task, tally in tallies.items()},
        steps=0,
        seconds=time.perf_counter() - begun,
    )
    if bounds.min_speedup is not None:
        names = [value.name or "" for value in model.graph.inputs]
        candidate.latency_ms, _ = Bench(tasks, names, threads, providers).latency(path)
    broken = [
        f"task {task}: {tally.violations} of {tally.compared} output values differ by more than "
        f"{bounds.atol or 0:g} + {bounds.rtol or 0:g} |original| (largest difference {tally.largest:.3g})"
        for task, tally in tallies.items()
        if tally.violations
    ]
    broken += _broken(candidate, bounds)
    result = Result(
        method="validate",
        versions=library_versions(),
        inputs=[task.record() for task in tasks],
        candidates=[candidate],
        chosen=None if broken else candidate.name,
        recipe={"merged": str(path), "data": {task.name: task.data.source for task in tasks}, "seed": seed},
        hardware=hardware(),
        notes=broken,
    )
    return result, broken


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


def _broken(candidate: Candidate, bounds: Bounds) -> list[str]:
    broken = []
    for task, score in candidate.tasks.items():
        if bounds.max_drop is not None and score.drop is not None and score.drop > bounds.max_drop:
            broken.append(f"task {task}: drops by {score.drop:.4f}, more than {bounds.max_drop:g}")
    speedup = candidate.latency_ms.speedup
    if bounds.min_speedup is not None and (speedup is None or speedup < bounds.min_speedup):
        broken.append(f"the speed-up is {speedup or 0:.2f}, less than {bounds.min_speedup:g}")
    return broken
