"""cnn_mnist + cnn_fashion_mnist, all three hidden layers shared, labels unused.

Closed form alone, and calibration from the aligned least-squares start against the plain-average start: both curves.

    python benchmarks/zip_cnn.py [--seeds 3] [--steps 0 500 2000]
"""

import argparse
import tempfile
from pathlib import Path

import markdown
from datasets import CACHE, SHARED, digits
from matplotlib.figure import Figure

import onnxmerge
from onnxmerge.methods.zip.choices import Start
from onnxmerge.report.schema import Candidate

MODELS = [SHARED / "models" / "cnn_mnist.onnx", SHARED / "models" / "cnn_fashion_mnist.onnx"]
SAMPLES = 5000
RATE = 2e-2  # twice the default: these shallow networks bear it


def run(start: Start, steps: int, seed: int) -> Candidate:
    data = {"cnn_mnist": digits("mnist"), "cnn_fashion_mnist": digits("fashion_mnist")}
    settings = onnxmerge.ZipSettings(
        share="3", steps=steps, rate=RATE, samples=SAMPLES, seed=seed, start=(start,), max_drop=None, measure=False
    )
    with tempfile.TemporaryDirectory() as folder:
        return onnxmerge.zip_models(MODELS, data, folder, settings=settings).candidates[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 500, 2000])
    options = parser.parse_args()
    rows = []
    curves: dict[str, list[tuple[int, float]]] = {}
    for start in (Start.LEAST_SQUARES, Start.AVERAGE):
        for steps in options.steps:
            runs = [run(start, steps, seed) for seed in range(options.seeds)]
            cells: list[object] = [start.value, steps]
            for task in ("cnn_mnist", "cnn_fashion_mnist"):
                scores = [candidate.tasks[task] for candidate in runs]
                original = scores[0].original_accuracy or 0.0
                cells += [
                    markdown.percent(original),
                    markdown.mean_spread([score.accuracy or 0.0 for score in scores]),
                    f"{100 * (original - sum(score.accuracy or 0.0 for score in scores) / len(scores)):+.2f}",
                ]
            cells.append(f"{sum(c.seconds for c in runs) / len(runs):.0f}")
            rows.append(cells)
            print(markdown.table([""] * len(cells), [cells]).splitlines()[-1], flush=True)
            curves[start.value] = runs[0].losses or curves.get(start.value, [])
    header = ["start", "steps", "MNIST", "merged (range)", "drop", "Fashion", "merged (range)", "drop", "seconds"]
    print(markdown.table(header, rows))
    for name, losses in curves.items():
        print(name, "held-out loss:", ", ".join(f"{step}: {loss:.4f}" for step, loss in losses))
    _draw(curves)


def _draw(curves: dict[str, list[tuple[int, float]]]) -> None:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, losses), marker in zip(curves.items(), "os^", strict=False):
        axes.plot(*zip(*losses, strict=True), marker=marker, label=f"{name} start")
    axes.set(xlabel="calibration steps", ylabel="held-out loss", yscale="log")
    axes.set_title("MNIST + Fashion-MNIST, all hidden layers shared")
    axes.legend()
    axes.grid(alpha=0.3)
    path = Path(__file__).with_name("zip_cnn_curves.svg")
    figure.savefig(path)
    CACHE.mkdir(exist_ok=True)
    figure.savefig(CACHE / "zip_cnn_curves.png", dpi=110)


if __name__ == "__main__":
    main()
