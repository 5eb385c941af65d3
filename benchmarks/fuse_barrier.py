"""Loss and accuracy on the straight path between the weights of two perceptrons, as they are and aligned.

python benchmarks/fuse_barrier.py [--pairs 5] [--points 21] [--samples 10000]

Pairs of 784-400-200-100-10 (seeds n and n + 1) on MNIST. At share s of B a weight is (1 - s) A + s B, B in A's order of
channels. The barrier is the greatest height of the loss over the straight line between the ends. Labels only score.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import markdown
import numpy as np
import onnx_ir as oir
from fusing import SHALLOW, THREADS, deviation, layer_map, tasks
from matplotlib.figure import Figure
from mlps import perceptron
from scipy.special import log_softmax

from onnxmerge.data import Split
from onnxmerge.methods.fuse.choices import Matching, Rule
from onnxmerge.methods.fuse.fusing import FuseOptions, find_counterparts, fuse_counterparts
from onnxmerge.methods.progress import Silent
from onnxmerge.methods.task import Task
from onnxmerge.runtime.activations import BATCH, stream

PLOT = Path(__file__).with_name("fuse_barrier.svg")
ALIGNED = {
    "as they are": {"rule": Rule.AVERAGE, "match": Matching.NONE},
    "assignment by weights": {"rule": Rule.AVERAGE, "match": Matching.WEIGHTS},
    "OT (distances of pre-activations)": {"rule": Rule.TRANSPORT},
    "assignment (their correlation)": {"rule": Rule.AVERAGE},
}
SETS = ("train", "test")
LOSS, ACCURACY = 0, 1


def path(a: Task, b: Task, shares: Sequence[float], options: FuseOptions) -> Iterator[oir.Model]:
    """The networks from A to aligned B."""
    counterparts = find_counterparts(a, [b], [layer_map(a, b)], options)
    for share in shares:
        yield fuse_counterparts(a, counterparts, [1 - share, share], options, Silent())


def score(model: oir.Model, task: Task, split: Split) -> tuple[float, float]:
    """Cross-entropy, and accuracy in per cent."""
    (name,) = task.outputs
    losses, correct = [], []
    outputs = stream(model, task.feeds(split, task), [name], threads=THREADS)
    for batch, found in zip(split.batches(BATCH), outputs, strict=True):
        rows = np.arange(len(batch.labels))
        losses.append(-log_softmax(found[name].astype(np.float64), axis=1)[rows, batch.labels])
        correct.append(found[name].argmax(1) == batch.labels)
    return float(np.concatenate(losses).mean()), 100 * float(np.concatenate(correct).mean())


def barriers(losses: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """[pairs] of losses [pairs, points]."""
    straight = losses[:, :1] * (1 - shares) + losses[:, -1:] * shares
    return (losses - straight).max(axis=1)


def measure(pairs: Sequence[Sequence[Task]], shares: np.ndarray, samples: int) -> dict[str, np.ndarray]:
    """For each alignment [pairs, points, sets, (loss, accuracy)]."""
    found = {}
    for name, how in ALIGNED.items():
        options = FuseOptions(samples=samples, threads=THREADS, **how)
        found[name] = np.array(
            [
                [
                    [score(model, a, split) for split in (a.data.calibration.take(samples, 0), a.data.held_out)]
                    for model in path(a, b, shares, options)
                ]
                for a, b in pairs
            ]
        )
    return found


def draw(found: dict[str, np.ndarray], shares: np.ndarray) -> None:
    """Loss above and errors below, each over its own range: mean over pairs, with its deviation as a band."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    grid = figure.subplots(2, len(SETS), sharex=True, sharey="row")
    for place, images in enumerate(SETS):
        for name, values in found.items():
            for axes, own in (
                (grid[0, place], values[:, :, place, LOSS]),
                (grid[1, place], 100 - values[:, :, place, ACCURACY]),
            ):
                mean, around = own.mean(axis=0), own.std(axis=0, ddof=min(1, len(own) - 1))
                (line,) = axes.plot(shares, mean, marker="o", markersize=2.5, label=name)
                axes.fill_between(shares, mean - around, mean + around, color=line.get_color(), alpha=0.2, linewidth=0)
        grid[0, place].set(title=images, yscale="log")
        grid[1, place].set(xlabel="share of B", yscale="log", xlim=(0, 1))
    grid[0, 0].set_ylabel("cross-entropy")
    grid[1, 0].set_ylabel("wrong answers (%)")
    for axes in grid.flat:
        axes.grid(alpha=0.3, which="both")
        axes.yaxis.set_major_formatter("{x:g}")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--points", type=int, default=21)
    parser.add_argument("--samples", type=int, default=10_000, help="training images to align with and to score on")
    options = parser.parse_args()
    shares = np.linspace(0, 1, options.points)
    pairs = [tasks([perceptron(SHALLOW, seed), perceptron(SHALLOW, seed + 1)]) for seed in range(options.pairs)]
    found = measure(pairs, shares, options.samples)
    rows = []
    for name, values in found.items():
        row = [name]
        for place, _ in enumerate(SETS):
            row.append(deviation(barriers(values[:, :, place, LOSS], shares), 3))
            row.append(deviation(values[:, :, place, ACCURACY].min(axis=1)))
            row.append(deviation(values[:, [0, -1], place, ACCURACY].mean(axis=1)))
        rows.append(row)
    header = [
        f"{images}: {what}"
        for images in SETS
        for what in ("barrier of the loss", "least accuracy", "ends, mean accuracy")
    ]
    print(markdown.table(["B", *header], rows))
    draw(found, shares)


if __name__ == "__main__":
    main()
