"""zip beyond classifiers: four style nets (image to image), a face detector, a classifier of text lines.

The inputs are made of CIFAR-10 photographs: one enlarged, or a mosaic of 2x2, 4x4 or 8x8 of them. No labels are used.

    python benchmarks/zip_styles.py styles --tasks 2 --share 1 3 5 8 10 [--steps 50] [--seeds 1]
    python benchmarks/zip_styles.py styles --tasks 4 --share 3
    python benchmarks/zip_styles.py twins                  a detector, and a text classifier, each with a damaged twin
    python benchmarks/zip_styles.py pair                   what the two different face detectors can share
"""

import argparse
import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import markdown
import numpy as np
from datasets import CACHE, SHARED
from PIL import Image

import onnxmerge
from onnxmerge.calibration.settings import Settings
from onnxmerge.ir.load import load
from onnxmerge.ir.save import save
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.ir.weights import get_array, is_float, set_array
from onnxmerge.methods.calibrating import calibrate_merged
from onnxmerge.methods.measure import Bench, Judge
from onnxmerge.methods.progress import Silent
from onnxmerge.methods.task import load_networks, task_outputs, with_data
from onnxmerge.methods.zip.zip import plan_zip
from onnxmerge.passes.permute import Permute
from onnxmerge.report.schema import TaskScore

STYLES = [SHARED / "models" / f"{name}_nc8_256.onnx" for name in ("candy", "mosaic", "rain-princess", "udnie")]
FACES = [SHARED / "models" / f"ultraface_{name}_320.onnx" for name in ("rfb", "slim")]
TEXT = SHARED / "models" / "ppocr_v2_cls.onnx"
CELLS = (1, 2, 4, 8)
NOISE = 0.1
"""Standard deviation of what is added to a twin's weights, as a share of each array's own."""
BATCH = 4
"""Images of a calibration step: the values of one style net for one image take some 100 MB with their gradients."""


def photographs(input_name: str, height: int, width: int, black: float, white: float, count: int) -> Path:
    """`count` mosaics to calibrate with and a fifth as many held out, [N, 3, height, width] in `black`..`white`."""
    path = CACHE / f"photographs_{input_name}_{height}x{width}_{count}.npz"
    if not path.exists():
        with np.load(SHARED / "data" / "cifar10_jpeg.npz") as archive:
            raw = dict(archive)
        made = {}
        for seed, (split, name, number) in enumerate(
            [("train", input_name, count), ("test", f"test_{input_name}", count // 5)]
        ):
            jpeg, offsets, random = raw[f"jpeg_{split}"], raw[f"offset_{split}"], np.random.default_rng(seed)
            pictures = [_mosaic(jpeg, offsets, random, CELLS[n % len(CELLS)], height, width) for n in range(number)]
            made[name] = np.stack(pictures) * np.float32((white - black) / 255) + np.float32(black)
        CACHE.mkdir(exist_ok=True)
        temporary = path.with_suffix(".partial.npz")
        np.savez(temporary, **made)
        temporary.rename(path)
    return path


def _mosaic(
    jpeg: np.ndarray, offsets: np.ndarray, random: np.random.Generator, cells: int, height: int, width: int
) -> np.ndarray:
    whole, size = Image.new("RGB", (width, height)), (width // cells, height // cells)
    for place, row in enumerate(random.choice(len(offsets) - 1, cells**2, replace=False)):
        image = Image.open(io.BytesIO(jpeg[offsets[row] : offsets[row + 1]].tobytes())).convert("RGB")
        corner = place % cells * size[0], place // cells * size[1]
        whole.paste(image.resize(size, Image.Resampling.BICUBIC), corner)
    return np.asarray(whole, np.float32).transpose(2, 0, 1)


def twin(path: Path) -> Path:
    """The same network with its channels in another order and noise on its weights: another original, much alike."""
    made = CACHE / f"{path.stem}_twin.onnx"
    if not made.exists():
        CACHE.mkdir(exist_ok=True)
        model, random = load(path), np.random.default_rng(0)
        spaces = {space.name: space for space in find_spaces(model).permutable()}
        Permute({name: random.permutation(space.size) for name, space in spaces.items()}, spaces)(model)
        for value in model.graph.initializers.values():
            if is_float(value) and value.shape is not None and len(value.shape) > 1:
                array = get_array(value)
                set_array(value, array + NOISE * array.std() * random.standard_normal(array.shape))
        save(model, made)
    return made


def zipped(models: Sequence[Path], data: Path, share: int, options: argparse.Namespace, seed: int) -> list[object]:
    """One row of the table: the closed form, then the same model calibrated."""
    settings = onnxmerge.ZipSettings(
        share=str(share), steps=0, samples=options.samples, seed=seed, threads=options.threads, measure=False
    )
    with tempfile.TemporaryDirectory() as folder:
        result = onnxmerge.zip_models(models, data, Path(folder) / "out", settings=settings)
        candidate = result.candidates[0]
        networks = load_networks(models)
        tasks = with_data(networks, {network.name: data for network in networks}, seed=seed)
        merged = load(candidate.path or "")
        after = candidate.tasks
        if options.steps and share:
            how = Settings(steps=options.steps, batch=BATCH, seed=seed, evaluations=5, threads=options.threads)
            calibrate_merged(merged, tasks, task_outputs(tasks), how, Silent())
            after = Judge(tasks, Path(folder), options.threads).score(merged)
        save(merged, Path(folder) / "calibrated.onnx")
        bench = Bench(tasks, tasks[0].inputs, options.threads, ["cpu"])
        latency, reliable = bench.latency(Path(folder) / "calibrated.onnx")
    plan = plan_zip(models, str(share))
    predicted = plan.candidates[0].predicted
    macs = None if predicted is None else predicted.macs
    return [
        f"{share} of {len(plan.units)}",
        seed,
        candidate.start or "",
        _errors(candidate.tasks),
        _errors(after),
        f"{100 * macs / plan.originals.macs:.0f} %" if macs and plan.originals.macs else "",
        f"{candidate.parameters / sum(network.parameters for network in networks):.2f}",
        f"{latency.speedup or 0:.2f}" + ("" if reliable else " (busy machine)"),
    ]


def _errors(scores: Mapping[str, TaskScore]) -> str:
    """Each task's relative error; its agreement too where it is a classifier."""
    cells = []
    for score in scores.values():
        error = "" if score.relative_error is None else f"{score.relative_error:.3f}"
        cells.append(error if score.agreement is None else f"{error} ({markdown.percent(score.agreement, 1)} % agree)")
    return " / ".join(cells)


HEADER = ["units", "seed", "start", "relative error, closed form", "calibrated", "MACs", "parameters", "speed-up"]


def rows(models: Sequence[Path], data: Path, shares: Sequence[int], options: argparse.Namespace) -> None:
    print(", ".join(path.stem for path in models), flush=True)
    found = []
    for share in shares:
        for seed in range(options.seeds):
            found.append(zipped(models, data, share, options, seed))
            print(markdown.table([""] * len(HEADER), found[-1:]).splitlines()[-1], flush=True)
    print("\n" + markdown.table(HEADER, found) + "\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["styles", "twins", "pair"])
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--share", type=int, nargs="+", default=[1, 3, 5, 8, 10])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.part == "styles":
        rows(STYLES[: options.tasks], photographs("input", 256, 256, 0, 255, 160), options.share, options)
    elif options.part == "twins":
        for path, data in (
            (FACES[0], photographs("input", 240, 320, -1, 1, 160)),
            (TEXT, photographs("x", 48, 192, -1, 1, 160)),
        ):
            rows(
                [path, twin(path)], data, [k for k in options.share if k <= len(plan_zip([path, path]).units)], options
            )
    else:
        plan = plan_zip(FACES)
        print(f"{len(plan.units)} units can be shared: {plan.limit}")


if __name__ == "__main__":
    main()
