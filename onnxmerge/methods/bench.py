"""bench: size, memory and latency of models, alone or against the originals they replace."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from onnxmerge.errors import UsageError
from onnxmerge.ir.layers import parameter_count
from onnxmerge.ir.load import read
from onnxmerge.ir.save import stored_bytes
from onnxmerge.methods.bounds import Bounds, size_checks, speed_checks, timed
from onnxmerge.methods.measure import graph_note, memory_record, nodes_note, unreliable_note
from onnxmerge.methods.timing import Timed, Timer
from onnxmerge.report.provenance import hardware, library_versions, sha256
from onnxmerge.report.recipe import recipe_of_call
from onnxmerge.report.schema import (
    BatchLatency,
    BoundCheck,
    Candidate,
    InputRecord,
    LatencyRecord,
    Result,
)
from onnxmerge.runtime.memory import Memory, measure_memory
from onnxmerge.runtime.session import node_providers
from onnxmerge.scratch import scratch


def bench_models(
    models: Sequence[str | os.PathLike[str]],
    against: Sequence[str | os.PathLike[str]] = (),
    *,
    batches: Sequence[int] | None = None,
    bounds: Bounds | None = None,
    providers: Sequence[str] = ("cpu",),
    threads: int | None = None,
    seed: int = 0,
    runs: int = 100,
) -> Result:
    """Measure each of `models` on random inputs.

    With `against`, each model is timed in turn with those originals, run one after the other, in one process
    (see `onnxmerge.runtime.latency`), and with the originals in one graph that shares nothing; without, the models are
    timed in turn with each other, spin-stopped. `latency_ms` and memory are those of the smallest batch.

    Args:
        models: the files.
        against: the originals that each of them replaces.
        batches: samples in one run; None: 1, or what a model is fixed to.
        bounds: what each of `models` must keep: `max_bytes`, and with `against` `min_speedup` at every batch size.
        providers: where to run, short names in order of preference.
        threads: for onnxruntime.
        seed: of the inputs and of the order of runs.
        runs: timed rounds at least, of one sample (see `Timer`).

    Raises:
        UsageError: a provider is missing or falls back to another, a model cannot take a batch size, or a speed-up is
            asked for and there are no originals.
        ModelError: a model cannot be read or run.
    """
    paths, originals, bounds = [Path(m) for m in models], [Path(m) for m in against], bounds or Bounds()
    if bounds.min_speedup is not None and not originals:
        raise UsageError("a least speed-up is over originals, and none was named with --against")
    checks: list[BoundCheck] = []
    candidates = []
    separate: dict[int, Memory | None] = {}
    with scratch() as folder:
        timer = Timer(originals, folder, providers, threads, seed, runs)
        sizes = {path: timer.sizes(path, batches) for path in paths}
        asked = [(path, size) for path in paths for size in sizes[path]]
        for path, size in asked:  # what cannot run is told before anything is timed
            for own in (path, *originals):
                timer.feeds(own, size)
        alone = {} if originals else timer.alone(asked)
        for path in paths:
            begun = time.perf_counter()
            found = {n: timer.against_originals(path, n) if originals else alone[path, n] for n in sizes[path]}
            candidate = _candidate(path, [own.latency for own in found.values()], timer)
            least = sizes[path][0]
            if originals and least not in separate:
                separate[least] = _memory(originals, least, timer)
            candidate.memory_mb = memory_record(_memory([path], least, timer), separate.get(least))
            candidate.name = path.stem if [p.stem for p in paths].count(path.stem) == 1 else str(path)
            candidate.seconds = time.perf_counter() - begun
            candidates.append(candidate)
            timer.notes.append(nodes_note(path, candidate.nodes))
            timer.notes += [
                note for n, own in found.items() for note in graph_note(path, own.cuda_graphs, _at(n, found))
            ]
            timer.notes += [unreliable_note(path, _at(n, found)) for n, own in found.items() if not own.reliable]
            for size, measured in found.items():
                speed = speed_checks(str(path), measured.latency.speedup, bounds, _at(size, found))
                checks += timed(speed, measured.seconds)
            checks += size_checks(str(path), candidate.bytes, bounds)
    given = {"models": models, "against": against, "batch": batches, **bounds.options(), "providers": providers}
    given |= {"threads": threads, "seed": seed}
    result = Result(
        method="bench",
        versions=library_versions(),
        inputs=[_input(path) for path in originals],
        candidates=candidates,
        chosen=None,
        recipe=recipe_of_call("bench", given),
        hardware=hardware(),
        notes=timer.notes,
        checks=checks,
    )
    result.notes += result.broken
    return result


def _at(size: int, found: dict[int, Timed]) -> str:
    return f"batch {size}" if len(found) > 1 else ""


def _candidate(path: Path, batches: list[BatchLatency], timer: Timer) -> Candidate:
    model, first = read(path), batches[0]
    feeds = timer.feeds(path, first.batch)
    return Candidate(
        name=path.stem,
        share=int(model.metadata_props.get("onnxmerge.share", "0")),
        path=str(path),
        parameters=parameter_count(model),
        bytes=stored_bytes(path),
        tasks={},
        latency_ms=LatencyRecord(
            merged=first.merged.p50,
            separate=None if first.separate is None else first.separate.p50,
            separate_default=None if first.separate_default is None else first.separate_default.p50,
            speedup=first.speedup,
        ),
        steps=0,
        seconds=0.0,
        batches=batches,
        nodes=node_providers(path, feeds, providers=timer.providers, threads=timer.threads),
    )


def _memory(paths: Sequence[Path], batch: int, timer: Timer) -> Memory | None:
    feeds = [timer.feeds(path, batch) for path in paths]
    return measure_memory(paths, feeds, providers=timer.providers, threads=timer.threads)


def _input(path: Path) -> InputRecord:
    return InputRecord(
        task=path.stem,
        path=str(path),
        sha256=sha256(path),
        parameters=parameter_count(read(path)),
        bytes=stored_bytes(path),
    )
