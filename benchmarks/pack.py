"""pack on ResNet-50s: one backbone and several heads, 224x224, weights drawn at random, norms folded as exporters do.

Beside it `onnx.compose.merge_models` (inputs tied by hand, which it cannot do) with and without `onnxsim.simplify`
(pip install onnxsim). Each build runs in a process of its own; its peak is the resident set's high-water mark.

    python benchmarks/pack.py [--threads N] [--runs 50] [--classes 200 100 365] [--keep-norms]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import markdown
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxmerge.runtime.latency import latency
from onnxmerge.runtime.session import open_session, random_feeds, run

STAGES = ((3, 64, 256), (4, 128, 512), (6, 256, 1024), (3, 512, 2048))
"""Blocks, inner width and outer width of each stage (He et al. 2016)."""


class Builder:
    """Writes the nodes and weights of one network."""

    def __init__(self, keep_norms: bool):
        self.keep_norms = keep_norms
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, *shape: int, scale: float) -> str:
        """Store a normal weight of the given standard deviation."""
        name = f"w{len(self.weights)}"
        array = (scale * self.random.standard_normal(shape)).astype(np.float32)
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        """Add a node with one output."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=f"{op}_{name}", **attributes))
        return name

    def conv(self, x: str, inside: int, out: int, kernel: int, stride: int = 1, gain: float = 2.0) -> str:
        """A convolution with a bias, or with a batch norm behind it."""
        weights = [self.weight(out, inside, kernel, kernel, scale=(gain / (inside * kernel**2)) ** 0.5)]
        if not self.keep_norms:
            weights.append(self.weight(out, scale=0.1))
        pads = [kernel // 2] * 4
        y = self.node("Conv", x, *weights, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pads)
        if self.keep_norms:
            statistics = [self.weight(out, scale=0.1) for _ in range(4)]
            for index in (0, 3):  # scale and variance are positive
                tensor = next(w for w in self.weights if w.name == statistics[index])
                tensor.CopyFrom(numpy_helper.from_array(1 + abs(numpy_helper.to_array(tensor)), tensor.name))
            y = self.node("BatchNormalization", y, *statistics)
        return y


def resnet50(path: Path, classes: int, head: int, keep_norms: bool) -> None:
    net = Builder(keep_norms)
    x = net.node("Relu", net.conv("image", 3, 64, 7, 2))
    x = net.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    width = 64
    for stage, (blocks, inner, outer) in enumerate(STAGES):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            y = net.node("Relu", net.conv(x, width, inner, 1))
            y = net.node("Relu", net.conv(y, inner, inner, 3, stride))
            y = net.conv(y, inner, outer, 1, gain=0.5)
            x = net.node("Relu", net.node("Add", y, x if block else net.conv(x, width, outer, 1, stride, gain=1.0)))
            width = outer
    x = net.node("Flatten", net.node("GlobalAveragePool", x), axis=1)
    net.random = np.random.default_rng([1, head])
    net.node("Gemm", x, net.weight(classes, width, scale=0.02), net.weight(classes, scale=0.1), transB=1)
    net.nodes[-1].output[0] = "logits"
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 224, 224])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])
    graph = helper.make_graph(net.nodes, path.stem, [image], [logits], net.weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


# --- builds, each in a process of its own -----------------------------------------------------------------------------


def build_pack(paths: list[Path], output: Path) -> None:
    import onnxmerge

    onnxmerge.pack_models(paths, output, check=False)


def build_compose(paths: list[Path], output: Path) -> None:
    onnx.save(compose(paths), output)


def build_simplified(paths: list[Path], output: Path) -> None:
    import onnxsim

    model, _ = onnxsim.simplify(compose(paths))
    onnx.save(model, output)


def compose(paths: list[Path]) -> onnx.ModelProto:
    """All models in one graph that reads one image."""
    merged = onnx.compose.add_prefix(onnx.load(paths[0]), f"{paths[0].stem}/")
    for path in paths[1:]:
        merged = onnx.compose.merge_models(merged, onnx.load(path), io_map=[], prefix2=f"{path.stem}/")
    tied = {value.name for value in merged.graph.input}
    for node in merged.graph.node:
        node.input[:] = ["image" if name in tied else name for name in node.input]
    del merged.graph.input[1:]
    merged.graph.input[0].name = "image"
    return merged


BUILDS: dict[str, Callable[[list[Path], Path], None]] = {
    "onnxmerge pack": build_pack,
    "onnx.compose": build_compose,
    "onnx.compose, onnxsim": build_simplified,
}


def build_here(name: str, output: Path, paths: list[Path]) -> None:
    begun = time.perf_counter()
    BUILDS[name](paths, output)
    seconds = time.perf_counter() - begun
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    print(f"{seconds:.2f} {peak * 1024 / 1e6:.0f}")


# --- measurements -----------------------------------------------------------------------------------------------------


def measure(name: str, paths: list[Path], folder: Path, threads: int | None, runs: int) -> list[object]:
    output = folder / f"{name.replace(' ', '_')}_{len(paths)}.onnx"
    command = [sys.executable, __file__, "--build", name, str(output), *map(str, paths)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        return [len(paths), name, f"failed: {built.stderr.strip().splitlines()[-1]}", *[""] * 9]
    seconds, peak = built.stdout.split()[-2:]
    session = open_session(output, threads=threads)
    feeds = random_feeds(session)
    got = run(session, feeds)
    expected = {f"{p.stem}/logits": run(open_session(p, threads=threads), feeds)["logits"] for p in paths}
    error = max(float(np.abs(got[key] - array).max() / np.abs(array).max()) for key, array in expected.items())
    equal = all(got[key].tobytes() == array.tobytes() for key, array in expected.items())
    del session
    found = latency(output, paths, feeds, [feeds] * len(paths), threads=threads, runs=runs)
    original_bytes = sum(path.stat().st_size for path in paths)
    low, high = found.speedup_range
    return [
        len(paths),
        name,
        len(onnx.load(output).graph.node),
        f"{output.stat().st_size / 1e6:.1f}",
        f"{output.stat().st_size / original_bytes:.3f}",
        f"{found.merged:.1f}",
        f"{found.separate:.1f}",
        f"{found.separate_default:.1f}",
        f"{found.speedup:.2f} ({low:.2f} to {high:.2f}){'' if found.reliable else ' unreliable'}",
        f"{found.separate_default / found.merged:.2f}",
        "bit for bit" if equal else f"{error:.1e}",
        f"{seconds} s, {peak} MB",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--classes", type=int, nargs=3, default=[200, 100, 365], help="of the three heads")
    parser.add_argument("--keep-norms", action="store_true", help="leave batch norms in the graph")
    parser.add_argument("--build", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        name, output, *models = options.build
        build_here(name, Path(output), [Path(model) for model in models])
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = []
        for head, classes in enumerate(options.classes):
            paths.append(folder / f"head{head}.onnx")
            resnet50(paths[-1], classes, head, options.keep_norms)
        for count in (2, 3):
            for name in BUILDS:
                rows.append(measure(name, paths[:count], folder, options.threads, options.runs))
                print(rows[-1], file=sys.stderr, flush=True)
    header = ["models", "built by", "nodes", "MB", "of the originals", "ms", "originals, ms", "with defaults, ms"]
    header += ["speed-up", "over defaults", "outputs", "build: time, peak memory"]
    print(markdown.table(header, rows))


if __name__ == "__main__":
    main()
