"""bench: size, memory and latency of models, alone or against the originals they replace."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from onnxmerge.ir.layers import parameter_count
from onnxmerge.ir.load import read
from onnxmerge.ir.save import stored_bytes
from onnxmerge.report.provenance import hardware, library_versions, sha256
from onnxmerge.report.schema import Candidate, InputRecord, LatencyRecord, MemoryRecord, Result
from onnxmerge.runtime.latency import latency, measure_latency
from onnxmerge.runtime.memory import measure_memory
from onnxmerge.runtime.session import node_providers, open_session, prepare_run, random_feeds


def bench_models(
    models: Sequence[str | os.PathLike[str]],
    against: Sequence[str | os.PathLike[str]] = (),
    *,
    providers: Sequence[str] = ("cpu",),
    threads: int | None = None,
    seed: int = 0,
    runs: int = 100,
) -> Result:
    """Measure each of `models` on random inputs, batch 1.

    With `against`, each model is timed in turn with those originals, run one after the other, in one process
    (see `onnxmerge.runtime.latency`); without, the models are timed in turn with each other, spin-stopped.

    Raises:
        UsageError: a provider is missing or falls back to another.
        ModelError: a model cannot be read or run.
    """
    paths, originals = [Path(m) for m in models], [Path(m) for m in against]
    feeds = [_feeds(path, providers, threads, seed) for path in [*paths, *originals]]
    own, separate = feeds[: len(paths)], feeds[len(paths) :]
    notes: list[str] = []
    alone = {} if originals else _side_by_side(paths, own, providers, threads, runs, seed)
    memory = measure_memory(originals, separate, providers=providers, threads=threads) if originals else None
    candidates = []
    for path, inputs in zip(paths, own, strict=True):
        begun = time.perf_counter()
        record = LatencyRecord(merged=alone.get(str(path)))
        if originals:
            found = latency(
                path, originals, inputs, separate, threads=threads, providers=providers, runs=runs, seed=seed
            )
            record = LatencyRecord(
                merged=found.merged,
                separate=found.separate,
                separate_default=found.separate_default,
                speedup=found.speedup,
            )
            if not found.reliable:
                notes.append(f"The latency of {path.name} was measured on a busy machine and is not reliable.")
        used = measure_memory([path], [inputs], providers=providers, threads=threads)
        nodes = node_providers(path, inputs, providers=providers, threads=threads)
        notes.append(f"{path.name}: " + ", ".join(f"{count} nodes on {name}" for name, count in nodes.items()) + ".")
        model = read(path)
        candidates.append(
            Candidate(
                name=path.stem if [p.stem for p in paths].count(path.stem) == 1 else str(path),
                share=int(model.metadata_props.get("onnxmerge.share", "0")),
                path=str(path),
                parameters=parameter_count(model),
                bytes=stored_bytes(path),
                tasks={},
                latency_ms=record,
                memory_mb=MemoryRecord(
                    merged=None if used is None else used.unique_mb,
                    separate=None if memory is None else memory.unique_mb,
                ),
                steps=0,
                seconds=time.perf_counter() - begun,
            )
        )
    return Result(
        method="bench",
        versions=library_versions(),
        inputs=[_record(path) for path in originals],
        candidates=candidates,
        chosen=None,
        recipe={"providers": list(providers), "threads": threads, "seed": seed, "runs": runs},
        hardware=hardware(),
        notes=notes,
    )


def _feeds(path: Path, providers: Sequence[str], threads: int | None, seed: int) -> dict[str, np.ndarray]:
    read(path)  # one clear sentence for a file that is no model
    return random_feeds(open_session(path, providers=providers, threads=threads, spinning=False), batch=1, seed=seed)


def _side_by_side(
    paths: Sequence[Path],
    feeds: Sequence[Mapping[str, np.ndarray]],
    providers: Sequence[str],
    threads: int | None,
    runs: int,
    seed: int,
) -> dict[str, float]:
    ready = {
        str(path): prepare_run(open_session(path, providers=providers, threads=threads, spinning=False), inputs)
        for path, inputs in zip(paths, feeds, strict=True)
    }
    times = measure_latency(ready, runs=runs, min_seconds=1.0, seed=seed)
    return {name: float(np.median(values)) for name, values in times.items()}


def _record(path: Path) -> InputRecord:
    return InputRecord(
        task=path.stem,
        path=str(path),
        sha256=sha256(path),
        parameters=parameter_count(read(path)),
        bytes=stored_bytes(path),
    )
