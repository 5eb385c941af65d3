"""Memory of `validate`, and of the activation statistics that zip streams, against the number of samples.

python benchmarks/memory.py
"""

import json
import subprocess
import sys
import time
import zipfile
from itertools import pairwise
from pathlib import Path

import markdown
import numpy as np
import onnx
from datasets import CACHE
from matplotlib.figure import Figure
from numpy.lib import format as npy
from onnx import TensorProto, helper, numpy_helper

FOLDER = CACHE / "memory"
PLOT = Path(__file__).with_suffix(".svg")
MODELS = [FOLDER / f"{task}.onnx" for task in "ab"]
SIZES = (784, 64, 32, 10)
"""Units of the layers of the two perceptrons."""
COUNTS = (1_000, 3_000, 10_000, 30_000, 100_000)
FEW = 500
"""Samples of what is not grown: those to calibrate with for `validate`, those held out for the statistics."""
CHUNK = 1_000
EVERY = 0.005
"""Seconds between two looks at the process."""
STAGES = {"validate": "validate", "statistics": "statistics and least squares"}


def perceptron(path: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    nodes, weights, value = [helper.make_node("Flatten", ["image"], ["v0"], "flatten")], [], "v0"
    for number, (fan_in, units) in enumerate(pairwise(SIZES), 1):
        last = number == len(SIZES) - 1
        weight = generator.normal(0, (2 / fan_in) ** 0.5, (fan_in, units)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{number}"))
        made = "logits" if last else f"h{number}"
        nodes.append(helper.make_node("Gemm", [value, f"w{number}"], [made], f"layer{number}"))
        value = f"v{number}"
        if not last:
            nodes.append(helper.make_node("Relu", [made], [value], f"relu{number}"))
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 28, 28])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", SIZES[-1]])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def write(path: Path, **counts: int) -> None:
    """Random 28x28 images; each array in chunks, so that this process stays small."""
    generator = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, count in counts.items():
            header = {"descr": "<f4", "fortran_order": False, "shape": (count, 1, 28, 28)}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                npy.write_array_header_1_0(file, header)
                for start in range(0, count, CHUNK):
                    file.write(generator.random((min(CHUNK, count - start), 1, 28, 28), np.float32).tobytes())


def stage(name: str, data: Path, packed: Path, out: Path) -> None:
    """What a fresh process does."""
    import onnxmerge
    from onnxmerge.methods.zip.choices import Start

    if name == "validate":
        onnxmerge.validate_model(packed, {model.stem: model for model in MODELS}, data, threads=1)
        return
    settings = onnxmerge.ZipSettings(
        samples=sys.maxsize, steps=0, share="1", start=(Start.LEAST_SQUARES,), threads=1, measure=False, max_drop=None
    )
    onnxmerge.zip_models(MODELS, data, out, settings=settings, overwrite=True)


def watched(*arguments: object) -> tuple[float, float, float]:
    """Peak anonymous and peak resident memory of a process in MB, and its seconds."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, *map(str, arguments)])
    anonymous = resident = 0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        if "RssAnon" in fields:
            anonymous = max(anonymous, int(fields["RssAnon"].split()[0]))
            resident = max(resident, int(fields["VmHWM"].split()[0]))
        time.sleep(EVERY)
    if process.wait():
        raise SystemExit(f"{arguments} failed")
    return anonymous * 1024 / 1e6, resident * 1024 / 1e6, time.perf_counter() - begun


def plot(found: dict[str, list[tuple[float, float, float]]]) -> None:
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, title in STAGES.items():
        (line,) = axes.plot(COUNTS, [row[0] for row in found[name]], marker="o", markersize=4, label=title)
        axes.plot(
            COUNTS,
            [row[1] for row in found[name]],
            linestyle=":",
            color=line.get_color(),
            label=f"{title}, with mapped files",
        )
    data = [count * 784 * 4 / 1e6 for count in COUNTS]
    axes.plot(COUNTS, data, color="grey", linestyle="--", linewidth=1, label="the samples themselves")
    axes.set(xscale="log", xlabel="samples of 28x28", ylabel="peak memory (MB)", ylim=(0, None))
    axes.set_xticks(COUNTS, [f"{count:,}" for count in COUNTS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(PLOT, metadata={"Date": None})
    figure.savefig(FOLDER / "memory.png", dpi=110)


def main() -> None:
    import onnxmerge

    FOLDER.mkdir(parents=True, exist_ok=True)
    for seed, model in enumerate(MODELS):
        perceptron(model, seed)
    packed = FOLDER / "packed.onnx"
    onnxmerge.pack_models(MODELS, packed, overwrite=True, threads=1)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in STAGES}
    data = FOLDER / "samples.npz"
    for count in COUNTS:
        for name in STAGES:
            images, held_out = (FEW, count) if name == "validate" else (count, FEW)
            write(data, image=images, test_image=held_out)
            found[name].append(watched(name, data, packed, FOLDER / "out"))
            data.unlink()
            print(name, count, json.dumps(found[name][-1]), file=sys.stderr, flush=True)
    header = ["samples", "MB of samples"]
    for title in STAGES.values():
        header += [f"{title}, MB", "with mapped files", "s"]
    rows = [
        [f"{count:,}", f"{count * 784 * 4 / 1e6:.0f}"]
        + [f"{value:.0f}" for name in STAGES for value in found[name][number]]
        for number, count in enumerate(COUNTS)
    ]
    print(markdown.table(header, rows))
    plot(found)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        stage(sys.argv[1], *map(Path, sys.argv[2:]))
    else:
        main()
