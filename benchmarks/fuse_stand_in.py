"""Fuse perceptrons on MNIST by the statistics of other data: what least squares costs when there is no sample at hand.

python benchmarks/fuse_stand_in.py [--pairs 3] [--samples 10000]

Layer map, channel map and least squares see the stand-in alone; accuracy is always that of MNIST's test set.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import markdown
import numpy as np
from datasets import CACHE, SHARED
from fuse_mlps import SHALLOW, accuracy, fused, tasks
from mlps import MEAN, STD, mnist, perceptron
from PIL import Image

from onnxmerge.data import load_dataset
from onnxmerge.methods.align import align_layers
from onnxmerge.methods.fuse.choices import Matching, Rule
from onnxmerge.methods.task import Task, input_specs

SOURCES = {
    "MNIST itself": lambda: mnist(60_000),
    "USPS digits, stretched": lambda: flat("usps"),
    "Fashion-MNIST": lambda: flat("fashion_mnist"),
    "pink noise (`noise:28x28`)": lambda: "noise:28x28",
    "pink noise in another range (`noise:28x28:0..1`)": lambda: "noise:28x28:0..1",
    "white noise (`noise`)": lambda: "noise",
}
RULES = {
    "least squares": {},
    "assignment + repair": {"rule": Rule.REPAIR},
    "average": {"rule": Rule.AVERAGE},
}


def flat(name: str) -> Path:
    """12 000 seeded training images, or all where there are fewer, as `x` [N, 784], normalised like MNIST."""
    path = CACHE / f"{name}_flat.npz"
    if not path.exists():
        with np.load(SHARED / "data" / f"{name}.npz") as raw:
            images = raw["x_train"]
        images = np.random.default_rng(0).permutation(images)[:12_000]
        stretched = [np.asarray(Image.fromarray(image).resize((28, 28), Image.Resampling.BILINEAR)) for image in images]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, x=((np.stack(stretched) / 255 - MEAN) / STD).reshape(-1, 784).astype(np.float32))
    return path


def seen_through(task: Task, source: str | Path) -> Task:
    """The task with calibration samples of `source` and its own held-out ones."""
    stand_in = load_dataset(source, input_specs(task.model), seed=0)
    return replace(task, data=replace(task.data, calibration=stand_in.calibration))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=10_000)
    options = parser.parse_args()
    pairs = [tasks([perceptron(SHALLOW, 2 * i), perceptron(SHALLOW, 2 * i + 1)]) for i in range(options.pairs)]
    originals = [[accuracy(task.model, task) for task in pair] for pair in pairs]
    rows: list[list[object]] = [["originals", *cells([statistics.mean(own) for own in originals]), "", ""]]
    for name, source in SOURCES.items():
        row: list[object] = [name]
        for rule, more in RULES.items():
            found = []
            for pair in pairs:
                a, b = (seen_through(task, source()) for task in pair)
                found.append(fused(a, b, align_layers(a, b, threads=1).pairs, options.samples, threads=1, **more))
            row += cells(found) if rule == "least squares" else [f"{statistics.mean(found):.2f}"]
        rows.append(row)
        print(row, flush=True)
    unseen = {"rule": Rule.AVERAGE, "match": Matching.WEIGHTS}
    found = [fused(a, b, align_layers(a, b).pairs, 2, **unseen) for a, b in pairs]
    rows.append(["none: channels matched by weights", "", "", f"{statistics.mean(found):.2f}"])
    header = ["statistics from", "least squares, mean (each pair)", "assignment + repair, mean", "average, mean"]
    print(markdown.table(header, rows))


def cells(found: list[float]) -> list[str]:
    return [f"{statistics.mean(found):.2f} ({', '.join(f'{x:.2f}' for x in found)})"]


if __name__ == "__main__":
    main()
