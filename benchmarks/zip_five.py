"""Zip five residual networks with five tasks: MTZ's table 4 (He et al. 2018) at one core's scale.

python benchmarks/zip_five.py [--seeds 1] [--steps 1000] [--shared 8 9 10] [--widths 1 1.25] [--ways NAME ...]
                              [--finished]
python benchmarks/zip_five.py --mode weights --sharing 0.95 --shared 10 --widths 1 --ways labels
python benchmarks/zip_five.py --cost      latency and memory once more; run it on a quiet machine

The networks and the tasks are those of `five_tasks.py`; `--shared` counts units: the first convolution and nine blocks.
The closed form sees 2000 images of each task without labels; calibration sees the training images, 64 of each task in a
step, without labels or with them. *One model* starts from the CIFAR-10 network's stem as it is. Errors in per cent of
all test images. *Shared* is how much of a network's parameters lies in the shared units; *parameters*, *ms* and
*memory* are of the merged network, in multiples of what one network takes (the mean of the five), all heads included.
In the paper 90 % of each network are shared; its networks stand on different inputs, so that shared weights save no
time: `--mode weights`, with 95 % of each space's neurons and so 90 % of each weight.

The candidates are kept in benchmarks/cache/zip_five, for each choice of units and widths in a folder of its own, and
an interrupted run goes on from there; `--finished` prints the table of what there is. Delete that folder when the code
has changed.
"""

import statistics
from collections.abc import Sequence

import markdown
from datasets import CACHE
from five_tasks import TASKS, network
from zipping import Cost, Made, Series, drops, make_all, parser_of, spread

from onnxmerge.ir.layers import parameter_count
from onnxmerge.ir.load import load
from onnxmerge.methods.zip.choices import Mode
from onnxmerge.report.schema import Candidate

FOLDER = CACHE / "zip_five"
PAPER = (
    (
        "paper: five networks (C100, GTSR, OGlt, SVHN, UCF)",
        "5",
        "",
        "",
        "",
        "29.19",
        "1.48",
        "14.40",
        "6.86",
        "37.83",
        "17.95",
        "",
    ),
    ("paper: MTZ", "1.5", "", "", "", "29.13", "0.09", "15.65", "7.08", "39.04", "18.20", "0.25"),
)
"""Test errors on CIFAR-100, traffic signs, Omniglot, SVHN and UCF101, their mean, and what the mean lost."""


def show(series: Series, made: Made, again: bool) -> None:
    """Print the table."""
    header = [
        "shared units",
        "plan",
        "way",
        "shared",
        "parameters",
        "MACs",
        "ms",
        "memory",
        *TASKS,
        "mean",
        "mean lost",
    ]
    rows: list[list[str]] = [[name, "", "", "", *cells] for name, *cells in PAPER]
    seeds = [next(iter(own.values())) for own in next(iter(made.values())) if own]
    rows.append(["five networks", "", "", "", *["5"] * 4, *_errors(seeds, original=True), ""])
    for planned in series.plan.candidates:
        for way, found in made.items():
            own = [candidates[planned.name] for candidates in found if planned.name in candidates]
            if own:
                row = [str(planned.units), planned.name, way, *_costs(series, own[0], again)]
                rows.append([*row, *_errors(own), _lost(own)])
    print(markdown.table(header, rows), flush=True)


def _costs(series: Series, candidate: Candidate, again: bool) -> list[str]:
    counts = [parameter_count(load(path)) for path in series.paths(0)]
    inside = sum(unit.parameters for unit in series.plan.units[: candidate.share])
    cells = [f"{100 * inside / counts[0]:.0f} %", f"{candidate.parameters / statistics.mean(counts):.2f}"]
    cells.append(_times(candidate.macs, series.plan.originals.macs))
    cost = series.cost(candidate, again=again)
    return [*cells, *(["", ""] if cost is None else _times_one(cost))]


def _times_one(cost: Cost) -> list[str]:
    latency, memory = cost.latency, cost.memory
    unreliable = " unreliable" * (not cost.reliable)
    return [_times(latency.merged, latency.separate) + unreliable, _times(memory.merged, memory.separate)]


def _times(merged: float | None, separate: float | None) -> str:
    """In multiples of one network."""
    return "" if not merged or not separate else f"{len(TASKS) * merged / separate:.2f}"


def _errors(candidates: Sequence[Candidate], original: bool = False) -> list[str]:
    """Of each task, and their mean; over the seeds."""
    cells: list[list[float]] = []
    for candidate in candidates:
        scores = [candidate.tasks[task] for task in TASKS]
        right = [(score.original_accuracy if original else score.accuracy) or 0.0 for score in scores]
        errors = [100 * (1 - share) for share in right]
        cells.append([*errors, statistics.mean(errors)])
    return [spread(values) for values in zip(*cells, strict=True)]


def _lost(candidates: Sequence[Candidate]) -> str:
    return spread(
        [statistics.mean(values) for values in zip(*(drops(candidates, task) for task in TASKS), strict=True)]
    )


def main() -> None:
    parser = parser_of(__doc__, [1.0, 1.25])
    parser.add_argument("--shared", type=int, nargs="+", default=[8, 9, 10])
    parser.add_argument("--mode", type=Mode, choices=list(Mode), default=Mode.COMPUTE)
    parser.add_argument("--sharing", type=float, nargs="+", default=[1.0])
    options = parser.parse_args()
    limits = options.shared, options.widths, options.steps, options.finished
    series = Series(FOLDER, TASKS, network, *limits, options.mode, options.sharing)
    show(series, make_all(series, options.ways, options.seeds), options.cost)


if __name__ == "__main__":
    main()
