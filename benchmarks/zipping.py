"""Zips of one family of networks at several depths, kept as they are made: what the tables of zip have in common."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from five_tasks import images

from onnxmerge import ZipSettings, zip_models
from onnxmerge.methods.measure import Bench
from onnxmerge.methods.progress import Silent
from onnxmerge.methods.task import load_networks, with_data
from onnxmerge.methods.zip.choices import Mode, Start
from onnxmerge.methods.zip.plan import Plan, PlannedCandidate
from onnxmerge.methods.zip.zip import plan_zip
from onnxmerge.report.schema import Candidate, LatencyRecord, MemoryRecord

FITTED = ZipSettings().start
"""What the product tries."""


@dataclass(frozen=True)
class Way:
    """Where candidates start, and whether calibration reads labels."""

    starts: tuple[Start, ...] = FITTED
    labels: bool = False


WAYS = {
    "no labels": Way(),
    "labels": Way(labels=True),
    "one model, no labels": Way((Start.KEEP,)),
    "one model, labels": Way((Start.KEEP,), labels=True),
}


Made = Mapping[str, Sequence[Mapping[str, Candidate]]]
"""For each way, the candidates of every seed by their names."""


@dataclass(frozen=True)
class Cost:
    """What a merged model and its originals cost; `reliable`: see `onnxmerge.runtime.latency`."""

    latency: LatencyRecord
    memory: MemoryRecord
    reliable: bool


class Clock(Silent):
    """Tells on stderr when each stage begins."""

    def __init__(self, name: str):
        self._name, self._begun = name, time.perf_counter()

    def stage(self, name: str, total: int | None = None) -> None:
        """See `Progress`."""
        print(f"{self._name}: {time.perf_counter() - self._begun:5.0f} s: {name}", file=sys.stderr, flush=True)


@dataclass
class Series:
    """Zips of one family of networks at several depths.

    Attributes:
        folder: where everything is kept.
        tasks: in the order in which they are zipped.
        network: gives the file of a task's network of a seed, trained if it is not there.
        shared: the numbers of units to share.
        widths: how many channels the stems have, relative to the first network.
        steps: of calibration.
        finished: only what is in the cache is known.
        mode: of sharing.
        sharing: which share of each space's channels is shared.
    """

    folder: Path
    tasks: Sequence[str]
    network: Callable[[str, int], Path]
    shared: Sequence[int]
    widths: Sequence[float]
    steps: int
    finished: bool
    mode: Mode = Mode.COMPUTE
    sharing: Sequence[float] = (1.0,)

    def paths(self, seed: int) -> list[Path]:
        """The networks of a seed."""
        return [self.network(task, seed) for task in self.tasks]

    @cached_property
    def plan(self) -> Plan:
        """What can be shared, and which of it is."""
        plan = plan_zip(self.paths(0), width=self.widths, sharing=self.sharing, mode=self.mode)
        plan.candidates = [planned for planned in plan.candidates if planned.units in self.shared]
        return plan

    def candidates(self, way: str, seed: int) -> dict[str, Candidate]:
        """What is there of one way and seed, by its name; unless only that is asked for, all.

        One model as it is has one width, so its ways leave the others out.
        """
        subset = "-".join(map(str, self.shared)) + "_w" + "-".join(f"{width:g}" for width in self.widths)
        subset += "_s" + "-".join(f"{share:g}" for share in self.sharing) + f"_{self.mode}"
        folder = self.folder / subset / f"{way.replace(',', '').replace(' ', '-')}_{self.steps}_{seed}"
        fitted = WAYS[way].starts == FITTED
        planned = [own for own in self.plan.candidates if fitted or not own.channels]
        if planned and not self.finished:
            self._make(way, seed, folder, planned)
        records = [folder / f"{own.name}.json" for own in planned]
        found = [json.loads(record.read_text())["candidate"] for record in records if record.exists()]
        return {candidate["name"]: Candidate.model_validate(candidate) for candidate in found}

    def _make(self, way: str, seed: int, folder: Path, planned: list[PlannedCandidate]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        plan = folder.with_suffix(".plan.json")
        plan.write_text(self.plan.model_copy(update={"candidates": planned}).to_json())
        settings = ZipSettings(
            share=str(plan),
            mode=self.mode,
            max_drop=None,
            steps=self.steps,
            start=WAYS[way].starts,
            labels=WAYS[way].labels,
            seed=seed,
            threads=1,
            measure=False,
        )
        zip_models(self.paths(seed), self.data, folder, settings=settings, resume=True, progress=Clock(folder.name))

    @property
    def data(self) -> dict[str, Path]:
        """Each task's images."""
        return {task: images(task) for task in self.tasks}

    @cached_property
    def bench(self) -> Bench:
        """Measures against the networks of seed 0."""
        networks = load_networks(self.paths(0))
        return Bench(with_data(networks, self.data, seed=0), networks[0].inputs, None, ("cpu",))

    def cost(self, candidate: Candidate | None, *, again: bool) -> Cost | None:
        """Measured if it has not been, or `again`; None if there is nothing to measure or only cached ones count."""
        if candidate is None or candidate.path is None:
            return None
        path = Path(candidate.path).with_suffix(".cost.json")
        if again or not (path.exists() or self.finished):
            latency, reliable = self.bench.latency(Path(candidate.path))
            memory = self.bench.memory(Path(candidate.path))
            found = {"latency": latency.model_dump(), "memory": memory.model_dump(), "reliable": reliable}
            path.write_text(json.dumps(found))
        if not path.exists():
            return None
        stored = json.loads(path.read_text())
        return Cost(LatencyRecord(**stored["latency"]), MemoryRecord(**stored["memory"]), stored["reliable"])


def ratio(originals: float | None, merged: float | None) -> str:
    """How many times less the merged model takes."""
    return "" if not originals or not merged else f"{originals / merged:.2f}"


def spread(values: Sequence[float]) -> str:
    """Mean over seeds, and deviation where there are several."""
    around = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{around}" if values else ""


def drops(candidates: Sequence[Candidate], task: str) -> list[float]:
    """Points of accuracy lost in each."""
    return [100 * (candidate.tasks[task].drop or 0.0) for candidate in candidates]


def width_of(planned: PlannedCandidate) -> str:
    """As it is in the candidate's name."""
    return planned.name.partition("-w")[2].partition("-")[0] or "1"


def print_originals(made: Made, tasks: Sequence[str]) -> None:
    """The accuracy of the networks themselves, over all seeds."""
    seeds = [next(iter(own.values())) for own in next(iter(made.values())) if own]
    for task in tasks:
        print(f"{task}: {spread([100 * (own.tasks[task].original_accuracy or 0.0) for own in seeds])} %")
    print()


def parser_of(doc: str | None, widths: Sequence[float]) -> argparse.ArgumentParser:
    """The options that all tables have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--widths", type=float, nargs="+", default=list(widths))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--finished", action="store_true", help="show what is in the cache, make nothing")
    parser.add_argument("--cost", action="store_true", help="measure latency and memory again")
    return parser


def make_all(series: Series, ways: Sequence[str], seeds: int) -> Made:
    """Every candidate of every way, seed by seed."""
    made: dict[str, list[dict[str, Candidate]]] = {way: [] for way in ways}
    for seed in range(seeds):
        for way in ways:
            made[way].append(series.candidates(way, seed))
    return made
