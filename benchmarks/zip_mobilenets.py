"""Zip two MobileNets block by block: Zippering's table 1 (Chou et al. 2019) at one core's scale.

python benchmarks/zip_mobilenets.py [--seeds 1] [--steps 1000] [--blocks 0 1 2 ... 13] [--widths 1 ...]
                                    [--ways NAME ...] [--finished]
python benchmarks/zip_mobilenets.py --cost      latency and memory once more; run it on a quiet machine

The networks are those of `mobilenets.py`. Row b shares the first convolution and b blocks, each of a depthwise and a
pointwise convolution. Size, multiply-accumulates, speed and memory say how many times less the merged network takes;
the speed-up is over spin-stopped sessions, and over sessions with onnxruntime's defaults. The closed form sees 2000
images of each task without labels; calibration sees the training images, 64 of each task in a step, without labels or
with them. *One model* starts from the CIFAR-10 network's stem as it is and has the same budget. A drop is in points of
accuracy on all test images against the network itself. A seed decides everything: the two networks, the samples, the
order of training.

The candidates are kept in benchmarks/cache/zip_mobilenets, for each choice of blocks and widths in a folder of its own,
and an interrupted run goes on from there; `--finished` prints the table of what there is. Delete that folder when the
code has changed.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import markdown
from datasets import CACHE
from five_tasks import images
from mobilenets import EPOCHS, mobilenet

from onnxmerge import ZipSettings, zip_models
from onnxmerge.methods.measure import Bench
from onnxmerge.methods.plan import Plan, PlannedCandidate
from onnxmerge.methods.progress import Silent
from onnxmerge.methods.task import load_networks, with_data
from onnxmerge.methods.zip import plan_zip
from onnxmerge.methods.zip_choices import Start
from onnxmerge.report.schema import Candidate, LatencyRecord, MemoryRecord

FOLDER = CACHE / "zip_mobilenets"
TASKS = tuple(EPOCHS)
FITTED = ZipSettings().starts
"""What the product tries."""
PAPER = {
    0: ("1.000", "1.00", "1.00", "0.00", "0.00"),
    1: ("1.000", "1.08", "1.09", "0.47", "-0.03"),
    2: ("1.002", "1.13", "1.14", "0.80", "0.04"),
    3: ("1.004", "1.21", "1.19", "1.37", "0.26"),
    4: ("1.009", "1.24", "1.23", "1.56", "0.62"),
    5: ("1.020", "1.30", "1.27", "2.08", "0.36"),
    6: ("1.042", "1.33", "1.28", "2.49", "0.90"),
    7: ("1.089", "1.37", "1.30", "2.77", "1.36"),
    8: ("1.140", "1.42", "1.32", "3.27", "1.40"),
    9: ("1.196", "1.48", "1.34", "3.68", "1.46"),
    10: ("1.258", "1.53", "1.37", "4.36", "2.26"),
    11: ("1.258", "1.53", "1.39", "5.32", "2.87"),
    12: ("1.258", "1.53", "1.40", "6.67", "4.32"),
    13: ("1.258", "1.53", "1.41", "9.39", "10.09"),
}
"""Merged blocks: compression, speed-up, memory saved, points lost on ImageNet and on DeepFashion."""


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
    """

    folder: Path
    tasks: Sequence[str]
    network: Callable[[str, int], Path]
    shared: Sequence[int]
    widths: Sequence[float]
    steps: int
    finished: bool

    def paths(self, seed: int) -> list[Path]:
        """The networks of a seed."""
        return [self.network(task, seed) for task in self.tasks]

    @cached_property
    def plan(self) -> Plan:
        """What can be shared, and which of it is."""
        plan = plan_zip(self.paths(0), widths=self.widths)
        plan.candidates = [planned for planned in plan.candidates if planned.units in self.shared]
        return plan

    def candidates(self, way: str, seed: int) -> dict[str, Candidate]:
        """What is there of one way and seed, by its name; unless only that is asked for, all.

        One model as it is has one width, so its ways leave the others out.
        """
        subset = "-".join(map(str, self.shared)) + "_w" + "-".join(f"{width:g}" for width in self.widths)
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
            max_drop=None,
            steps=self.steps,
            starts=WAYS[way].starts,
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
    return planned.name.partition("-w")[2] or "1"


def print_originals(made: Made, tasks: Sequence[str]) -> None:
    """The accuracy of the networks themselves, over all seeds."""
    seeds = [next(iter(own.values())) for own in next(iter(made.values())) if own]
    for task in tasks:
        print(f"{task}: {spread([100 * (own.tasks[task].original_accuracy or 0.0) for own in seeds])} %")
    print()


# --- the table --------------------------------------------------------------------------------------------------------


def units(blocks: int) -> int:
    """Units of so many blocks: the first convolution is one, a block is two."""
    return 2 * blocks + 1 if blocks else 0


def show(series: Series, made: Made, again: bool) -> None:
    """Print the table."""
    print_originals(made, TASKS)
    originals = sum(path.stat().st_size for path in series.paths(0))
    header = ["blocks", "width", "paper: size, speed, memory", "paper: points lost", "MB", "size", "MACs", "speed-up"]
    header += ["over defaults", "memory", *(f"{way}: {task}" for way in made for task in TASKS)]
    rows = []
    for planned in series.plan.candidates:
        found = {way: [own[planned.name] for own in seeds if planned.name in own] for way, seeds in made.items()}
        first = next((candidate for own in found.values() for candidate in own), None)
        if first is None:
            continue
        blocks = planned.units // 2
        row = [blocks, width_of(planned), ", ".join(PAPER[blocks][:3]), ", ".join(PAPER[blocks][3:])]
        row += [
            f"{first.bytes / 1e6:.3f}",
            ratio(originals, first.bytes),
            ratio(series.plan.originals.macs, first.macs),
        ]
        row += _cost_cells(series.cost(first, again=again))
        rows.append(row + [spread(drops(own, task)) for own in found.values() for task in TASKS])
    print(markdown.table(header, rows), flush=True)


def _cost_cells(cost: Cost | None) -> list[str]:
    if cost is None:
        return [""] * 3
    latency, memory = cost.latency, cost.memory
    return [
        ratio(latency.separate, latency.merged) + " unreliable" * (not cost.reliable),
        ratio(latency.separate_default, latency.merged),
        ratio(memory.separate, memory.merged),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--blocks", type=int, nargs="+", choices=list(PAPER), default=list(PAPER))
    parser.add_argument("--widths", type=float, nargs="+", default=[1.0])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--finished", action="store_true", help="show what is in the cache, make nothing")
    parser.add_argument("--cost", action="store_true", help="measure latency and memory again")
    options = parser.parse_args()
    shared = [units(blocks) for blocks in options.blocks]
    series = Series(FOLDER, TASKS, mobilenet, shared, options.widths, options.steps, options.finished)
    made: dict[str, list[dict[str, Candidate]]] = {way: [] for way in options.ways}
    for seed in range(options.seeds):
        for way in options.ways:
            made[way].append(series.candidates(way, seed))
    show(series, made, options.cost)


if __name__ == "__main__":
    main()
