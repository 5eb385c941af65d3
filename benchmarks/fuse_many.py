"""Fuse two, four and six perceptrons on MNIST at once, without labels: equal ones, and deep and shallow by turns.

python benchmarks/fuse_many.py [--groups 3] [--samples 10000] [--transport-samples 200]

Group g has the networks of seeds 2g, 2g + 1, ... of six, in a circle; the first is the reference. So groups overlap,
and those of six differ only in their reference. By turns means, as in CLAFusion's table 2, that the first, third and
fifth network is the deep one. Seconds are those of matching channels and of the rule, not of finding the layer map.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import markdown
from fusing import DEEP, SHALLOW, THREADS, accuracy, deviation, ensemble_accuracy, layer_map, tasks
from mlps import perceptron

from onnxmerge.methods.fuse.choices import Rule, Targets
from onnxmerge.methods.fuse.fusing import FuseOptions, fuse_networks
from onnxmerge.methods.progress import Silent
from onnxmerge.methods.task import Task

SEEDS, COUNTS = 6, (2, 4, 6)
OT = "OT as published"
RULES = {
    OT: {"rule": Rule.TRANSPORT},
    "assignment, average": {"rule": Rule.AVERAGE},
    "least squares, mean": {"targets": Targets.MEAN},
    "least squares, selected": {"targets": Targets.SELECTED},
}
KINDS = {"equal": (SHALLOW, SHALLOW), "by turns, into the deep": (DEEP, SHALLOW)}
PUBLISHED = {("by turns, into the deep", 2): "65.72", ("by turns, into the deep", 4): "31.76"} | {
    ("by turns, into the deep", 6): "23.75"
}
"""CLAFusion's tables 1 and 2: OT of ResNet-34 and ResNet-18 by turns on CIFAR-10, before fine-tuning."""


def group(kind: str, number: int, count: int) -> list[Task]:
    """`count` networks, the reference first."""
    seeds = [(2 * number + place) % SEEDS for place in range(count)]
    return tasks([perceptron(KINDS[kind][place % 2], seed) for place, seed in enumerate(seeds)])


def fused(members: Sequence[Task], samples: int, **options: object) -> tuple[float, float]:
    """Accuracy in per cent, and seconds."""
    reference, *others = members
    layer_maps = [layer_map(reference, other) for other in others]
    begun = time.perf_counter()
    settings = FuseOptions(samples=samples, threads=THREADS, **options)
    model = fuse_networks(reference, others, layer_maps, [1.0] * len(members), settings, Silent())
    seconds = time.perf_counter() - begun
    return accuracy(model, reference), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=3, choices=range(1, SEEDS // 2 + 1))
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--transport-samples", type=int, default=200, help="for OT; the paper's number")
    options = parser.parse_args()
    scores, times = [], []
    for kind in KINDS:
        for count in COUNTS:
            groups = [group(kind, number, count) for number in range(options.groups)]
            parents = [[accuracy(task.model, task) for task in members] for members in groups]
            score = [deviation([statistics.mean(own) for own in parents]), deviation([max(own) for own in parents])]
            score.append(deviation([ensemble_accuracy(members) for members in groups]))
            seconds = []
            for name, rule in RULES.items():
                samples = options.transport_samples if name == OT else options.samples
                found = [fused(members, samples, **rule) for members in groups]
                score.append(deviation([accuracy for accuracy, _ in found]))
                took = statistics.median(seconds for _, seconds in found)
                seconds.append(f"{took:.1f} ({took / count:.2f})")
            scores.append([kind, count, *score, PUBLISHED.get((kind, count), "")])
            times.append([kind, count, *seconds])
            print(scores[-1], times[-1], flush=True)
    header = ["networks", "K", "parents, mean", "best parent", "ensemble", *RULES, "paper, OT, ResNets on CIFAR-10"]
    print(markdown.table(header, scores))
    print(markdown.table(["networks", "K", *(f"{name}: s (s / K)" for name in RULES)], times))


if __name__ == "__main__":
    main()
