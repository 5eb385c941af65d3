"""Fuse perceptrons on MNIST without labels: CLAFusion's tables 9 and 10, and OTFusion's pair of equal networks.

python benchmarks/fuse_mlps.py [--seeds 5] [--samples 10000]
"""

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import markdown
from mlps import mnist, perceptron

from onnxmerge.errors import OnnxMergeError
from onnxmerge.ir.weights import set_array
from onnxmerge.methods.align import Pair, align_layers
from onnxmerge.methods.choices import Matching, Rule
from onnxmerge.methods.fusing import FuseOptions, fuse_networks
from onnxmerge.methods.measure import Judge
from onnxmerge.methods.progress import Silent
from onnxmerge.methods.task import Task, load_networks, with_data

DEEP, SHALLOW = (400, 200, 100, 50, 25), (400, 200, 100)
PAIR = {
    "vanilla average": None,
    "OT on weights": {"rule": Rule.TRANSPORT, "match": Matching.WEIGHTS},
    "OT on pre-activations": {"rule": Rule.TRANSPORT},
    "assignment": {"rule": Rule.AVERAGE},
    "assignment + repair": {"rule": Rule.REPAIR},
    "MTZ": {"rule": Rule.MTZ},
    "least squares": {},
}
PUBLISHED = {
    "vanilla average": 73.84,
    "OT on weights": 95.58,
    "OT on pre-activations": 96.33,
    "assignment": 96.55,
    "assignment + repair": 97.15,
}


def tasks(paths: Sequence[Path]) -> list[Task]:
    networks = load_networks(paths)
    return with_data(networks, {network.name: mnist(60_000) for network in networks}, seed=0)


def accuracy(model: object, reference: Task) -> float:
    names = {reference.name: [value.name for value in model.graph.outputs]}
    with tempfile.TemporaryDirectory() as folder:
        return 100 * Judge([reference], Path(folder), None, outputs=names).score(model)[reference.name].accuracy


def fused(reference: Task, other: Task, pairs: Sequence[Pair], samples: int, **options: object) -> float:
    settings = FuseOptions(samples=samples, **options)
    return accuracy(fuse_networks(reference, [other], [pairs], [1.0, 1.0], settings, Silent()), reference)


def mapped(deep: Task, shallow: Task, places: Sequence[int]) -> list[Pair]:
    """The layer map that sends layer j of the shallow network to layer places[j] of the deep one."""
    found = align_layers(deep, shallow)
    return [Pair(found.steps[0][i], found.steps[1][j], (i, j), 0.0, 0.0, None) for j, i in enumerate(places)]


def flipped(pairs: Sequence[Pair]) -> list[Pair]:
    return [Pair(p.second, p.first, p.place[::-1], p.cka, p.cost, p.correlation) for p in pairs]


def tables_9_and_10(seeds: int, samples: int) -> None:
    loaded = [tasks([perceptron(DEEP, seed), perceptron(SHALLOW, seed)]) for seed in range(seeds)]
    rows = []
    for cost in ("width", "cka", "wasserstein"):
        for ends in (True, False):
            maps = [[i + 1 for i, _ in _places(*pair, cost, ends)] for pair in loaded]
            rows.append([cost, "both" if ends else "none", "; ".join(map(str, maps))])
    print(markdown.table(["cost", "ends tied", "map for each seed"], rows), flush=True)
    parents = [[accuracy(task.model, task) for task in pair] for pair in loaded]
    print("deep:", spread([p[0] for p in parents]), "shallow:", spread([p[1] for p in parents]), flush=True)
    rows = []
    for places in itertools.combinations(range(5), 3):
        cells: list[object] = [[place + 1 for place in places]]
        pairs = [mapped(*pair, places) for pair in loaded]
        into_deep = list(zip(loaded, pairs, strict=True))
        cells.append(spread([attempt(a, b, own, samples, rule=Rule.TRANSPORT) for (a, b), own in into_deep]))
        cells.append(spread([attempt(b, a, flipped(own), samples, rule=Rule.TRANSPORT) for (a, b), own in into_deep]))
        cells.append(spread([attempt(a, b, own, samples) for (a, b), own in into_deep]))
        cells.append(spread([attempt(b, a, flipped(own), samples) for (a, b), own in into_deep]))
        rows.append(cells)
        print(cells, flush=True)
    header = ["map", "OT, add", "OT, collapse", "least squares into the deep", "least squares into the shallow"]
    print(markdown.table(header, rows))


def attempt(reference: Task, other: Task, pairs: Sequence[Pair], samples: int, **options: object) -> float | None:
    """None where the map cannot be followed (nothing can be added before the first layer)."""
    try:
        return fused(reference, other, pairs, samples, **options)
    except OnnxMergeError:
        return None


def _places(deep: Task, shallow: Task, cost: str, ends: bool) -> list[tuple[int, int]]:
    return [pair.place for pair in align_layers(deep, shallow, cost=cost, ends=ends).pairs]


def pair_of_equals(seeds: int, samples: int) -> None:
    pairs = [tasks([perceptron(SHALLOW, seed), perceptron(SHALLOW, seed + 1)]) for seed in range(seeds)]
    parents = [[accuracy(task.model, task) for task in pair] for pair in pairs]
    print("parents:", parents, "mean", spread([statistics.mean(own) for own in parents]))
    rows = []
    for name, options in PAIR.items():
        found = []
        for a, b in pairs:
            own = align_layers(a, b).pairs
            if options is None:
                model = a.model.clone()
                for key, value in model.graph.initializers.items():
                    theirs = b.model.graph.initializers[key].const_value.numpy()
                    set_array(value, (value.const_value.numpy() + theirs) / 2)
                found.append(accuracy(model, a))
            else:
                found.append(fused(a, b, own, samples, **options))
        rows.append([name, PUBLISHED.get(name, ""), spread(found), ", ".join(f"{x:.2f}" for x in found)])
        print(rows[-1], flush=True)
    print(markdown.table(["rule", "published on one pair", "here, mean and range", "each pair"], rows))


def spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "not possible"
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{statistics.mean(known):.2f} +- {deviation:.2f} ({min(known):.2f} to {max(known):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=10_000)
    options = parser.parse_args()
    pair_of_equals(options.seeds, 60_000)
    tables_9_and_10(options.seeds, options.samples)


if __name__ == "__main__":
    main()
