"""How much of resnet20_cifar10 + resnet20_cifar100 to share: 25, 50, 75 or 100 % of the channels, in both modes.

python benchmarks/zip_tradeoff.py [--units 4 7 10] [--steps 0] [--finished]

Compute mode buys speed (multiply-accumulates of both networks over those of the merged one), weights mode size (bytes).
In both a point is a number of units and a share of each space's channels; what is not shared each task computes, or
holds, for itself. 2000 unlabelled CIFAR-10 images for the closed form; scored on the 10 000 test images.

The candidates are kept in benchmarks/cache/zip_tradeoff; `--finished` prints and draws what there is. Delete that
folder when the code has changed.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import markdown
from datasets import CACHE, cifar
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from zip_resnet import HUNDRED, MODELS, TEN

from onnxmerge import ZipSettings, zip_models
from onnxmerge.methods.zip.choices import Mode, Start
from onnxmerge.methods.zip.plan import Plan
from onnxmerge.methods.zip.zip import plan_zip
from onnxmerge.report.schema import Candidate

FOLDER = CACHE / "zip_tradeoff"
SHARES = (1.0, 0.75, 0.5, 0.25)
PLOT = Path(__file__).with_suffix(".svg")


def candidates(mode: Mode, units: Sequence[int], steps: int, finished: bool) -> tuple[Plan, dict[str, Candidate]]:
    """The plan of a mode, and those of its candidates that have been made, by their names."""
    folder = FOLDER / f"{mode}_{steps}"
    plan = plan_zip(MODELS, sharing=SHARES, mode=mode)
    plan.candidates = [planned for planned in plan.candidates if planned.units in units]
    if not finished:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder.with_suffix(".plan.json")
        file.write_text(plan.to_json())
        settings = ZipSettings(
            share=str(file), mode=mode, steps=steps, start=(Start.SUBSPACE,), threads=1, measure=False, max_drop=None
        )
        data = {TEN: cifar(labels=True), HUNDRED: cifar(labels=False)}
        zip_models(MODELS, data, folder, settings=settings, resume=True)
    records = [folder / f"{planned.name}.json" for planned in plan.candidates]
    found = [json.loads(record.read_text())["candidate"] for record in records if record.exists()]
    return plan, {own["name"]: Candidate.model_validate(own) for own in found}


def points(mode: Mode, plan: Plan, made: dict[str, Candidate]) -> list[tuple[int, float, float, float, float]]:
    """For each candidate: units, share, how many times less it takes, points of CIFAR-10 lost, CIFAR-100 agreement."""
    found = []
    for planned in plan.candidates:
        own = made.get(planned.name)
        if own is None:
            continue
        share = float(planned.name.partition("-s")[2] or 1)
        saved = (
            plan.originals.bytes / own.bytes if mode is Mode.WEIGHTS else (plan.originals.macs or 0) / (own.macs or 1)
        )
        drop, agreement = own.tasks[TEN].drop or 0.0, own.tasks[HUNDRED].agreement or 0.0
        found.append((planned.units, share, saved, 100 * drop, 100 * agreement))
    return found


def draw(axes: Sequence[Axes], found: Sequence[tuple[int, float, float, float, float]]) -> None:
    """One line for each share, one marker for each number of units."""
    for share in SHARES:
        own = [point for point in found if point[1] == share]
        for place, row in zip((3, 4), axes, strict=True):
            label = f"{100 * share:.0f} %"
            row.plot(
                [point[2] for point in own], [point[place] for point in own], marker="o", markersize=4, label=label
            )
            for point in own:
                row.annotate(str(point[0]), (point[2], point[place]), (3, 3), textcoords="offset points", fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, nargs="+", default=[4, 7, 10])
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--finished", action="store_true", help="show what is in the cache, make nothing")
    options = parser.parse_args()
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    grid, rows = figure.subplots(2, 2, sharey="row"), []
    for column, (mode, saved) in enumerate(((Mode.COMPUTE, "MACs"), (Mode.WEIGHTS, "bytes"))):
        found = points(mode, *candidates(mode, options.units, options.steps, options.finished))
        rows += [
            [mode.value, units, f"{100 * share:.0f} %", f"{less:.2f} {saved}", f"{drop:.2f}", f"{agreement:.1f}"]
            for units, share, less, drop, agreement in found
        ]
        draw(grid[:, column], found)
        grid[0, column].set_title(f"{mode} mode")
        grid[1, column].set_xlabel(f"times fewer {saved}")
    grid[0, 0].set_ylabel("CIFAR-10 points lost")
    grid[1, 0].set_ylabel("CIFAR-100 agreement (%)")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    shares = grid[0, 0].get_legend_handles_labels()
    figure.legend(*shares, loc="outside lower center", ncols=4, frameon=False, title="of each space's channels shared")
    figure.savefig(PLOT, metadata={"Date": None})
    print(markdown.table(["mode", "units", "shared", "times less", "C10 points lost", "C100 agreement %"], rows))


if __name__ == "__main__":
    main()
