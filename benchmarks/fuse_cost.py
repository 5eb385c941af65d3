"""What fusing costs: stage by stage for two ResNet-50s, against width, against samples, against the number of networks.

Weights are drawn at random and images are not labelled: cost does not depend on either. Each measurement runs in a
process of its own. Peaks are resident memory above what the process had after its imports.

    python benchmarks/fuse_cost.py [--only resnet width samples models] [--size 112] [--samples 500] [--threads N]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import markdown
import numpy as np
import onnx
from datasets import CACHE, SHARED, cifar
from matplotlib.figure import Figure
from onnx import TensorProto, helper, numpy_helper
from pack import resnet50
from stage_cost import Stages

from onnxmerge.ir.save import save
from onnxmerge.methods.align import align_layers
from onnxmerge.methods.fuse import counterparts, fusing, selecting
from onnxmerge.methods.pairs import pair_statistics
from onnxmerge.methods.progress import Silent
from onnxmerge.methods.task import Task, load_networks, with_data
from onnxmerge.passes.match_channels import assign, correlation_cost, transport
from onnxmerge.passes.refit import Refit

FOLDER = CACHE / "fuse_cost"
PLOT = Path(__file__).with_name("fuse_cost.svg")
WIDTHS = (256, 512, 1024, 2048, 4096)
SAMPLES = (500, 1000, 2000, 5000, 10_000)
NETWORKS = (2, 3, 4, 6)
SMALL = SHARED / "models" / "resnet8_cifar10.onnx"
ENTROPY = 0.05
ROWS = 4096
"""Samples of a pair of perceptrons."""


# --- networks and data ------------------------------------------------------------------------------------------------


def residual_network(size: int, seed: int) -> Path:
    """A ResNet-50 with batch norms for images of `size` pixels."""
    path = FOLDER / f"resnet50_{size}_{seed}.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        resnet50(path, 1000, 0, keep_norms=True)
        model = onnx.load(path)
        for axis in (2, 3):
            model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size
        onnx.save(_drawn_anew(model, seed), path)
    return path


def small_network(seed: int) -> Path:
    """A ResNet-8 for CIFAR-10 with other weights."""
    path = FOLDER / f"resnet8_{seed}.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(_drawn_anew(onnx.load(SMALL), seed), path)
    return path


def _drawn_anew(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """The same network with every filter and matrix drawn anew from a normal distribution of the same size."""
    generator = np.random.default_rng(seed)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim > 1:
            drawn = (generator.standard_normal(array.shape) * array.std()).astype(array.dtype)
            tensor.CopyFrom(numpy_helper.from_array(drawn, tensor.name))
    return model


def perceptron(width: int, seed: int) -> Path:
    """`width` inputs, two hidden layers of `width`, ten outputs."""
    path = FOLDER / f"mlp{width}_{seed}.onnx"
    if path.exists():
        return path
    generator = np.random.default_rng(seed)
    nodes, weights, value = [], [], "x"
    for number, out in enumerate((width, width, 10)):
        array = (generator.standard_normal((out, width)) * (2 / width) ** 0.5).astype(np.float32)
        weights += [numpy_helper.from_array(array, f"w{number}")]
        weights += [numpy_helper.from_array(np.zeros(out, np.float32), f"b{number}")]
        inputs = [value, f"w{number}", f"b{number}"]
        nodes.append(helper.make_node("Gemm", inputs, [f"z{number}"], f"layer{number}", transB=1))
        value = f"z{number}"
        if number < 2:
            nodes.append(helper.make_node("Relu", [value], [f"a{number}"], f"relu{number}"))
            value = f"a{number}"
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", width])
    made = helper.make_tensor_value_info(value, TensorProto.FLOAT, ["N", 10])
    graph = helper.make_graph(nodes, path.stem, [given], [made], weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def images(size: int, count: int) -> Path:
    """CIFAR images brought to `size` pixels by repeating rows and columns."""
    path = FOLDER / f"images_{size}_{count}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with np.load(cifar(labels=False)) as raw:
            small = raw["input"][:count]
        places = np.arange(size) * small.shape[-1] // size
        large = small[:, :, places][..., places]
        np.savez(path, image=large, test_image=large[:8])
    return path


def noise(width: int) -> Path:
    path = FOLDER / f"noise_{width}.npz"
    if not path.exists():
        rows = np.random.default_rng(0).standard_normal((ROWS, width)).astype(np.float32)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, x=rows, test_x=rows[:8])
    return path


def tasks_of(paths: Sequence[Path], data: Path) -> list[Task]:
    networks = load_networks(paths)
    return with_data(networks, {network.name: data for network in networks}, seed=0)


# --- measurements, each in a process of its own -----------------------------------------------------------------------


def measure_stages(size: int, samples: int, threads: int | None) -> dict[str, object]:
    """Fuse two ResNet-50s."""
    paths, data = [residual_network(size, seed) for seed in (1, 2)], images(size, samples)
    stages = Stages()
    watched = {
        "find_spaces": "spaces",
        "find_steps": "spaces",
        "balance": "balance",
        "correspond": "match nodes",
        "pair_statistics": "channel statistics",
        "match_by_activations": "match channels",
        "target_channels": "match channels",
        "select": "select channels: gather",
        "solve_least_squares": "least squares: solve",
        "solve_by_channel": "least squares: solve",
    }
    stages.watch(selecting, "_share_out", "select channels: choose")
    for name, stage in watched.items():
        for module in (fusing, counterparts):
            if hasattr(module, name):
                stages.watch(module, name, stage)
    stages.watch_method(fusing.TakeChannels, "call", "take channels")
    stages.watch_method(Refit, "call", "least squares: gather")
    with stages.stage("load and normalise"):
        tasks = tasks_of(paths, data)
    model_bytes = sum(tensor.nbytes for task in tasks for tensor in _weights(task))
    with stages.stage("align layers"):
        aligned = align_layers(tasks[0], tasks[1], samples=samples, threads=threads)
    with stages.stage("the rest"):
        options = fusing.FuseOptions(samples=samples, threads=threads)
        fused = fusing.fuse_networks(tasks[0], tasks[1:], [aligned.pairs], [1.0, 1.0], options, Silent())
    with stages.stage("save"):
        save(fused, FOLDER / "fused.onnx")
    return {"models": model_bytes / 1e6, "stages": {name: vars(cost) for name, cost in stages.costs.items()}}


def _weights(task: Task) -> list[np.ndarray]:
    return [value.const_value.numpy() for value in task.model.graph.initializers.values() if value.const_value]


Seconds = dict[str, tuple[float, float]]
"""By what was done: wall-clock and processor seconds."""


def measure_width(width: int, threads: int | None) -> Seconds:
    """Match two perceptrons, the second also cut to half its channels, and refit the first towards both."""
    tasks = tasks_of([perceptron(width, seed) for seed in (1, 2)], noise(width))
    seconds: Seconds = {}
    with _timed(seconds, "statistics"):
        found = pair_statistics(
            tasks[0],
            tasks[1],
            tasks[1].model,
            tasks[:1],
            {"z0": "z0"},
            {"z0": 1},
            samples=ROWS,
            seed=0,
            threads=threads,
        )
    cost = correlation_cost(found["z0"])
    with _timed(seconds, "assignment"):
        assign(cost)
    with _timed(seconds, "transport, w to w/2"):
        transport(cost[:, : width // 2])
    with _timed(seconds, "transport with entropy, w to w/2"):
        transport(cost[:, : width // 2], ENTROPY)
    aligned = align_layers(tasks[0], tasks[1], threads=threads)
    options = fusing.FuseOptions(samples=ROWS, threads=threads)
    with _timed(seconds, "fuse"):
        stages = Stages()
        stages.watch(fusing, "select", "select")
        stages.watch_method(Refit, "call", "refit")
        fusing.fuse_networks(tasks[0], tasks[1:], [aligned.pairs], [1.0, 1.0], options, Silent())
    return seconds | {name: (cost.seconds, cost.processor) for name, cost in stages.costs.items()}


class _timed:
    def __init__(self, seconds: Seconds, name: str):
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._begun = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        begun, processor = self._begun
        self._seconds[self._name] = time.perf_counter() - begun, time.process_time() - processor


def measure_fuse(count: int, samples: int, threads: int | None) -> dict[str, float]:
    """Align and fuse `count` ResNet-8s."""
    tasks = tasks_of([small_network(seed) for seed in range(count)], cifar(labels=False))
    stages = Stages()
    with stages.stage("fuse") as cost:
        reference, *others = tasks
        maps = [align_layers(reference, task, threads=threads).pairs for task in others]
        options = fusing.FuseOptions(samples=samples, threads=threads)
        fusing.fuse_networks(reference, others, maps, [1.0] * count, options, Silent())
    return vars(cost)


def measured(*call: object) -> dict:
    """What a measurement prints in a process of its own; its last number is that of threads, 0 for all cores."""
    command, threads = [sys.executable, __file__, "--measure", *map(str, call)], str(call[-1])
    limits = {} if threads == "0" else {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | limits)
    return json.loads(process.stdout)


# --- tables and plot --------------------------------------------------------------------------------------------------


def report_stages(size: int, samples: int, threads: int | None) -> None:
    found = measured("stages", size, samples, threads or 0)
    rows = [
        [name, f"{cost['seconds']:.1f}", f"{cost['processor']:.1f}", f"{cost['peak']:.0f}", f"{cost['statistics']:.0f}"]
        for name, cost in found["stages"].items()
    ]
    costs = found["stages"].values()
    peak, statistics = max(c["peak"] for c in costs), max(c["statistics"] for c in costs)
    total = [sum(c[key] for c in costs) for key in ("seconds", "processor")]
    rows.append(["all", f"{total[0]:.1f}", f"{total[1]:.1f}", f"{peak:.0f}", f"{statistics:.0f}"])
    print(f"Two ResNet-50s, {samples} images of {size}x{size}:\n")
    print(markdown.table(["stage", "seconds", "CPU seconds", "peak (MB)", "statistics (MB)"], rows))
    ratio = peak / (found["models"] + statistics)
    print(f"\nmodels {found['models']:.0f} MB, peak / (models + statistics) = {ratio:.2f}\n")


def report_widths(threads: int | None) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    rows = []
    for width in WIDTHS:
        found = measured("width", width, threads or 0)
        rows.append([width, *(f"{wall:.2f} / {processor:.2f}" for wall, processor in found.values())])
        for name, (_, processor) in found.items():
            curves.setdefault(name, []).append((width, processor))
        print(rows[-1], file=sys.stderr)
    print(f"Two perceptrons of that width, {ROWS} samples, seconds / CPU seconds:\n")
    print(markdown.table(["width", *curves], rows) + "\n")
    return curves


def report_samples(threads: int | None) -> list[tuple[float, float]]:
    found = [(count, measured("fuse", 2, count, threads or 0)) for count in SAMPLES]
    rows = [[count, *_cells(cost)] for count, cost in found]
    print("Two ResNet-8s:\n")
    print(markdown.table(["samples", "seconds", "CPU seconds", "peak (MB)"], rows) + "\n")
    return [(count, cost["processor"]) for count, cost in found]


def report_models(threads: int | None) -> list[tuple[float, float]]:
    found = [(count, measured("fuse", count, 2000, threads or 0)) for count in NETWORKS]
    rows = [[count, *_cells(cost), f"{cost['processor'] / count:.1f}"] for count, cost in found]
    print("K ResNet-8s, 2000 samples:\n")
    print(markdown.table(["K", "seconds", "CPU seconds", "peak (MB)", "CPU seconds / K"], rows) + "\n")
    return [(count, cost["processor"]) for count, cost in found]


def _cells(cost: dict[str, float]) -> list[str]:
    return [f"{cost['seconds']:.1f}", f"{cost['processor']:.1f}", f"{cost['peak']:.0f}"]


def draw(
    widths: dict[str, list[tuple[float, float]]],
    samples: list[tuple[float, float]],
    networks: list[tuple[float, float]],
) -> None:
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, points in widths.items():
        left.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    left.set(xscale="log", yscale="log", xlabel="width", ylabel="CPU seconds", title="two perceptrons")
    left.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
    left.minorticks_off()
    left.set_ylim(top=2e5)  # room for the legend
    left.legend(frameon=False, fontsize=7, ncols=2, loc="upper left")
    middle.plot(*zip(*samples, strict=True), marker="o", markersize=3)
    middle.set(xlabel="samples", title="two ResNet-8s", xlim=(0, None), ylim=(0, None))
    right.plot(*zip(*networks, strict=True), marker="o", markersize=3)
    right.set(xlabel="networks", title="K ResNet-8s, 2000 samples", xlim=(0, None), ylim=(0, None))
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("resnet", "width", "samples", "models")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="the plot is drawn when all have run")
    parser.add_argument("--size", type=int, default=112, help="of the ResNet-50s' images")
    parser.add_argument("--samples", type=int, default=500, help="of the ResNet-50s")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, *numbers = options.measure
        *sizes, threads = map(int, numbers)
        measure = {"stages": measure_stages, "width": measure_width, "fuse": measure_fuse}[name]
        print(json.dumps(measure(*sizes, threads or None)))
        return
    cifar(labels=False)
    if "resnet" in options.only:
        report_stages(options.size, options.samples, options.threads)
    widths = report_widths(options.threads) if "width" in options.only else None
    samples = report_samples(options.threads) if "samples" in options.only else None
    networks = report_models(options.threads) if "models" in options.only else None
    if widths and samples and networks:
        draw(widths, samples, networks)


if __name__ == "__main__":
    main()
