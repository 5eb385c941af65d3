"""Time and memory of the space analysis: ResNet-50, and residual networks and transformers of growing depth.

python benchmarks/spaces.py
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import markdown
import numpy as np
import onnx
from datasets import CACHE
from matplotlib.figure import Figure
from onnx import TensorProto, helper, numpy_helper

FOLDER = CACHE / "spaces"
PLOT = Path(__file__).with_name("spaces.svg")
NODES = (300, 1000, 3000, 6000, 10000, 20000)
REPEATS = 3
WIDTH = 16
RESNET50 = ((64, 3), (128, 4), (256, 6), (512, 3))


class Graph:
    """A graph under construction; every weight is drawn from a seeded generator."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._generator = np.random.default_rng(0)

    def weight(self, *shape: int) -> str:
        array = self._generator.uniform(0.01, 0.02, shape).astype(np.float32)
        self.weights.append(numpy_helper.from_array(array, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def ints(self, *values: int) -> str:
        self.weights.append(numpy_helper.from_array(np.array(values, np.int64), f"w{len(self.weights)}"))
        return self.weights[-1].name

    def op(self, op_type: str, *inputs: str, **attributes: object) -> str:
        self.nodes.append(
            helper.make_node(op_type, inputs, [f"v{len(self.nodes)}"], f"n{len(self.nodes)}", **attributes)
        )
        return self.nodes[-1].output[0]

    def conv(self, x: str, read: int, made: int, kernel: int = 3, stride: int = 1, norm: bool = True) -> str:
        pads = [kernel // 2] * 4
        x = self.op("Conv", x, self.weight(made, read, kernel, kernel), pads=pads, strides=[stride] * 2)
        return self.op("BatchNormalization", x, *(self.weight(made) for _ in range(4))) if norm else x

    def linear(self, x: str, read: int, made: int) -> str:
        return self.op("Add", self.op("MatMul", x, self.weight(read, made)), self.weight(made))

    def save(self, path: Path, shape: list[int | str], output: str) -> None:
        graph = helper.make_graph(
            self.nodes,
            path.stem,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.weights,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)


def resnet50(path: Path) -> None:
    graph = Graph()
    x = graph.op("Relu", graph.conv("x", 3, 64, 7, 2))
    x, read = graph.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]), 64
    for stage, (width, blocks) in enumerate(RESNET50):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            branch = graph.op("Relu", graph.conv(x, read, width, 1))
            branch = graph.op("Relu", graph.conv(branch, width, width, 3, stride))
            branch = graph.conv(branch, width, 4 * width, 1)
            skip = x if block else graph.conv(x, read, 4 * width, 1, stride)
            x, read = graph.op("Relu", graph.op("Add", branch, skip)), 4 * width
    x = graph.op("Flatten", graph.op("GlobalAveragePool", x))
    graph.save(path, ["N", 3, 224, 224], graph.op("Gemm", x, graph.weight(read, 1000)))


def residual_chain(path: Path, nodes: int) -> None:
    graph = Graph()
    x = graph.op("Relu", graph.conv("x", 3, WIDTH))
    while len(graph.nodes) < nodes - 3:
        branch = graph.conv(graph.op("Relu", graph.conv(x, WIDTH, WIDTH)), WIDTH, WIDTH)
        x = graph.op("Relu", graph.op("Add", branch, x))
    x = graph.op("Flatten", graph.op("GlobalAveragePool", x))
    graph.save(path, ["N", 3, 16, 16], graph.op("Gemm", x, graph.weight(WIDTH, 10)))


def transformer(path: Path, nodes: int) -> None:
    graph = Graph()
    x = graph.linear("x", 12, WIDTH)
    while len(graph.nodes) < nodes - 2:
        normed = graph.op("LayerNormalization", x, graph.weight(WIDTH), graph.weight(WIDTH))
        heads = []
        for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
            split = graph.op("Reshape", graph.linear(normed, WIDTH, WIDTH), graph.ints(0, 0, 4, WIDTH // 4))
            heads.append(graph.op("Transpose", split, perm=perm))
        scores = graph.op("Softmax", graph.op("MatMul", heads[0], heads[1]))
        mixed = graph.op("Transpose", graph.op("MatMul", scores, heads[2]), perm=[0, 2, 1, 3])
        mixed = graph.op("Reshape", mixed, graph.ints(0, 0, WIDTH))
        x = graph.op("Add", x, graph.linear(mixed, WIDTH, WIDTH))
        inner = graph.op("Relu", graph.linear(x, WIDTH, 3 * WIDTH))
        x = graph.op("Add", x, graph.linear(inner, 3 * WIDTH, WIDTH))
    graph.save(path, ["N", 7, 12], graph.linear(x, WIDTH, 5))


def measure(path: Path) -> tuple[int, float, float, float, int]:
    """Nodes, seconds to load and to find the spaces (median), megabytes that the analysis adds at its peak, spaces."""
    report = subprocess.run([sys.executable, __file__, str(path)], check=True, capture_output=True, text=True).stdout
    nodes, load, find, extra, spaces = report.split()
    return int(nodes), float(load), float(find), float(extra), int(spaces)


def analyse(path: str) -> None:
    """Print what `measure` reads, about this process."""
    from onnxmerge.ir.load import load
    from onnxmerge.ir.spaces import find_spaces

    begun = time.perf_counter()
    model = load(path)
    loaded = time.perf_counter() - begun
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = peak_megabytes()
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        spaces = find_spaces(model)
        times.append(time.perf_counter() - begun)
    added = peak_megabytes() - before
    print(len(list(model.graph)), loaded, statistics.median(times), added, len(spaces.permutable()))


def peak_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e3


def main() -> None:
    rows = []
    resnet50(FOLDER / "resnet50.onnx")
    size = (FOLDER / "resnet50.onnx").stat().st_size / 1e6
    nodes, load, find, extra, spaces = measure(FOLDER / "resnet50.onnx")
    rows.append(["ResNet-50", nodes, spaces, f"{load:.2f}", f"{find:.2f}", f"{1e6 * find / nodes:.0f}", f"{extra:.0f}"])
    curves = {}
    for name, build in (("residual", residual_chain), ("transformer", transformer)):
        points = []
        for count in NODES:
            path = FOLDER / f"{name}{count}.onnx"
            build(path, count)
            nodes, load, find, extra, spaces = measure(path)
            points.append((nodes, find))
            rows.append(
                [name, nodes, spaces, f"{load:.2f}", f"{find:.2f}", f"{1e6 * find / nodes:.0f}", f"{extra:.0f}"]
            )
        curves[name] = points
    header = ["network", "nodes", "spaces", "load (s)", "find spaces (s)", "us per node", "added at peak (MB)"]
    print(markdown.table(header, rows))
    print(f"ResNet-50's file: {size:.0f} MB")
    draw(curves)


def draw(curves: dict[str, list[tuple[int, float]]]) -> None:
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    axes.set(xlabel="nodes", ylabel="seconds to find all spaces", xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        analyse(sys.argv[1])
    else:
        main()
