"""Time the merged model against the originals, fairly.

With onnxruntime's defaults the worker threads of a session keep spinning for some tens of milliseconds after a run, on
cores that the next session needs: several originals in one process slow each other down, and a merged model beats them
for the wrong reason. Two ResNet-20s on two cores took 1.03 ms one after the other with the defaults, 0.59 with
`session.force_spinning_stop`, and 0.575 as two unshared halves of one graph. The baseline is therefore measured with
that option, for merged and originals alike, and the defaults apart from it.

Honest and default variants never alternate: timed in turn with spinning sessions, the graph of 0.575 ms read anything
from 0.58 to 1.28. Each kind has a phase of its own, whose sessions are closed, and their threads gone, at its end.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxmerge.errors import UsageError
from onnxmerge.runtime.timed_run import timed_run

WARMUP = 10
"""Untimed rounds: past cuDNN's search for algorithms, arena growth and cold caches."""

BLOCKS = 5
"""Parts into which the rounds are cut to see whether the speedup holds."""

Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one run, medians over all rounds; `separate` is all originals, one after the other."""

    merged: float
    separate: float
    """The honest baseline: one session for each original, none left spinning; `merged` is measured the same way."""
    separate_default: float
    """One session for each original with onnxruntime's defaults."""
    times: dict[str, list[float]]
    """All rounds of each of the three, and of `unshared` where that was asked."""
    speedup_range: tuple[float, float]
    """Lowest and highest speedup over `BLOCKS` successive parts of the same measurement."""
    cuda_graphs: bool | None = None
    """Whether all models ran as CUDA graphs; None on the CPU."""

    @property
    def speedup(self) -> float:
        """separate / merged."""
        return self.separate / self.merged

    @property
    def reliable(self) -> bool:
        """Whether the speedup is worth quoting: False where it wavers, or mostly tells how long waking threads took.

        On cores that other work keeps busy, a worker that stopped spinning waits for its turn in every run, several
        milliseconds each time: many sessions then look far slower than one. Spinning workers hide that, so an honest
        baseline well above the default one gives it away. One thread needs no waking.
        """
        low, high = self.speedup_range
        return high - low <= 0.2 * self.speedup and self.separate <= 1.5 * self.separate_default


def latency(
    merged: str | Path | bytes,
    separate: Sequence[str | Path | bytes],
    feeds: Feeds,
    separate_feeds: Sequence[Feeds],
    *,
    unshared: tuple[str | Path, Feeds] | None = None,
    threads: int | None = None,
    providers: Sequence[str] = ("cpu",),
    runs: int = 50,
    min_seconds: float = 1.0,
    seed: int = 0,
) -> Latency:
    """Time `merged` and the originals `separate` on the same providers and number of threads.

    Args:
        merged: the merged model, a file or its bytes.
        separate: the originals.
        feeds: inputs of the merged model.
        separate_feeds: inputs of each original.
        unshared: all originals in one graph that shares nothing, and its inputs; timed in turn with `merged`.
        threads: threads inside one operator; None leaves the choice to onnxruntime.
        providers: short names, see `open_session`.
        runs: timed rounds at least, in each of the two phases; `BLOCKS` or more.
        min_seconds: seconds at least, in each phase.
        seed: of the order inside each round.

    Raises:
        UsageError: no originals, not one set of inputs for each, or too few runs; and as `open_session` does.
        ModelError: a model cannot be opened or run.
    """
    if not separate or len(separate) != len(separate_feeds):
        raise UsageError(f"{len(separate)} originals and {len(separate_feeds)} sets of inputs: one for each is needed")
    if runs < BLOCKS:
        raise UsageError(f"{runs} timed runs are too few: at least {BLOCKS} are needed")

    kinds: list[bool | None] = []

    def ready(model: str | Path | bytes, inputs: Feeds, spinning: bool) -> Callable[[], None]:
        made = timed_run(model, inputs, providers=providers, threads=threads, spinning=spinning)
        kinds.append(made.cuda_graph)
        return made

    def ready_originals(spinning: bool) -> Callable[[], None]:
        originals = [ready(model, inputs, spinning) for model, inputs in zip(separate, separate_feeds, strict=True)]

        def run_originals() -> None:
            for run_original in originals:
                run_original()

        return run_originals

    def phase(variants: Mapping[str, Callable[[], None]]) -> dict[str, list[float]]:
        return measure_latency(variants, warmup=WARMUP, runs=runs, min_seconds=min_seconds, seed=seed)

    # No name is kept for the sessions: those of a phase close when it returns.
    times = phase(
        {"merged": ready(merged, feeds, False), "separate": ready_originals(False)}
        | ({} if unshared is None else {"unshared": ready(*unshared, False)})
    )
    times |= phase({"separate_default": ready_originals(True)})
    parts = zip(*(np.array_split(times[name], BLOCKS) for name in ("separate", "merged")), strict=True)
    speedups = [float(np.median(originals) / np.median(one)) for originals, one in parts]
    return Latency(
        **{name: float(np.median(times[name])) for name in ("merged", "separate", "separate_default")},
        times=times,
        speedup_range=(min(speedups), max(speedups)),
        cuda_graphs=None if None in kinds else all(kinds),
    )


def measure_latency(
    variants: Mapping[str, Callable[[], None]],
    *,
    warmup: int = WARMUP,
    runs: int,
    min_seconds: float = 0.0,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Milliseconds of each run of each variant, in rounds: every variant once, in an order shuffled anew.

    What slows the machine for a while then slows all variants alike, and none always follows the same other.

    Args:
        variants: what to time, by name.
        warmup: rounds that are run but not timed.
        runs: timed rounds at least.
        min_seconds: rounds go on until this has passed since the first timed one.
        seed: of the shuffling.
    """
    for _ in range(warmup):
        for variant in variants.values():
            variant()
    generator = np.random.default_rng(seed)
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    while len(times[names[0]]) < runs or time.perf_counter() - begin < min_seconds:
        for index in generator.permutation(len(names)):
            name = names[index]
            start = time.perf_counter_ns()
            variants[name]()
            times[name].append((time.perf_counter_ns() - start) / 1e6)
    return times
