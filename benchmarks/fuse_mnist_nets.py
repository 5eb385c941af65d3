"""Fuse the shared `mnist-net_256x2` and `mnist-net_256x4` into each of them by `fuse_models`, without labels.

python benchmarks/fuse_mnist_nets.py [--seeds 3] [--steps 0 500]

Everything but what is asked for is the product's default; a seed draws the samples and the order of the steps.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import markdown
import numpy as np
from datasets import CACHE, SHARED
from fusing import THREADS, deviation

from onnxmerge import FuseSettings, fuse_models
from onnxmerge.report.schema import Result

NETWORKS = ("mnist-net_256x2", "mnist-net_256x4")
CANDIDATES = ("least-squares-mean", "least-squares-selected", "heads", "calibrated")
ALLOWED = 0.3
"""Points that the fused network may lose against the better parent."""


def columns() -> Path:
    """All training images as `0` [N, 784, 1] in 0..1 without labels, and the test set with them."""
    path = CACHE / "mnist_columns.npz"
    if not path.exists():
        with np.load(SHARED / "data" / "mnist.npz") as raw:
            images, test = ((raw[name] / np.float32(255)).reshape(-1, 784, 1) for name in ("x_train", "x_test"))
            labels = raw["y_test"].astype(np.int64)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **{"0": images, "test_0": test, "test_labels": labels})
    return path


def fuse(into: str, steps: int, seed: int) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        return fuse_models(
            [SHARED / "models" / f"{name}.onnx" for name in NETWORKS],
            columns(),
            Path(folder) / "fused",
            settings=FuseSettings(into=into, steps=steps, seed=seed, threads=THREADS, measure=False),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 500])
    options = parser.parse_args()
    rows = []
    for into in NETWORKS:
        for steps in options.steps:
            results = [fuse(into, steps, seed) for seed in range(options.seeds)]
            found: dict[str, list[float]] = {}
            for result in results:
                for candidate in result.candidates:
                    own = 100 * candidate.tasks[into].accuracy
                    found.setdefault(candidate.name, []).append(own)
                    if candidate.name == result.chosen:
                        found.setdefault("chosen", []).append(own)
            cells = [deviation(found[name]) if name in found else "" for name in CANDIDATES]
            names = ", ".join(sorted({str(result.chosen) for result in results}))
            rows.append([into, steps, *cells, f"{deviation(found['chosen'])} ({names})"])
            print(rows[-1], flush=True)
    parents = [100 * results[0].originals[name].accuracy for name in NETWORKS]
    ensemble = 100 * results[0].originals[into].original_accuracy
    print(f"parents: {', '.join(f'{own:.2f}' for own in parents)}; mean {statistics.mean(parents):.2f}")
    print(f"ensemble: {ensemble:.2f}; asked: {max(parents) - ALLOWED:.2f}")
    print(markdown.table(["into", "steps", *CANDIDATES, "chosen"], rows))


if __name__ == "__main__":
    main()
