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

import markdown
from datasets import CACHE
from mobilenets import EPOCHS, mobilenet
from zipping import Cost, Made, Series, drops, make_all, parser_of, print_originals, ratio, spread, width_of

FOLDER = CACHE / "zip_mobilenets"
TASKS = tuple(EPOCHS)
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
    parser = parser_of(__doc__, [1.0])
    parser.add_argument("--blocks", type=int, nargs="+", choices=list(PAPER), default=list(PAPER))
    options = parser.parse_args()
    shared = [units(blocks) for blocks in options.blocks]
    series = Series(FOLDER, TASKS, mobilenet, shared, options.widths, options.steps, options.finished)
    show(series, make_all(series, options.ways, options.seeds), options.cost)


if __name__ == "__main__":
    main()
