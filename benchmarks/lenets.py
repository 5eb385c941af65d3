"""Train LeNet-300-100 and LeNet-5, dense and sparse, for `zip_lenets.py`, and cache them as ONNX files.

MTZ (He, Zhou and Thiele 2018), section 4.1: LeNet-300-100 is 784-300-100-10 with ReLU; LeNet-5 is two convolutions
5x5 with 20 and 50 kernels, each with ReLU and a 2x2 pooling behind it, then 500 neurons with ReLU, then the head.
Pixels are scaled to 0..1. 5000 seeded training images teach nobody: they are the held-out samples of what is merged.
The test set only scores, but EPOCHS and DENSITY were chosen so that errors on it come near the paper's.

Unlike the paper (plain SGD for about 11 000 iterations): AdamW with a one-cycle schedule for the EPOCHS below, bfloat16
while training. Run as a script it trains all networks.

A sparse network is a dense one after one pass of L-OBS (Dong, Chen and Pan 2017), without retraining: of each layer the
weights of least importance w^2 / (2 [H^-1]_qq) become zero, H the second moments of the layer's inputs, and those that
are kept change so that each neuron's output on the training images changes least.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as oir
import onnxruntime
import torch
from datasets import CACHE, SHARED
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from onnxmerge.ir.layers import Layer
from onnxmerge.ir.load import load
from onnxmerge.ir.save import save
from onnxmerge.passes.refit import Refit, Teacher
from onnxmerge.runtime.activations import Stored
from onnxmerge.runtime.statistics import Regression

FOLDER = CACHE / "lenets"
MLP, CNN = "lenet300", "lenet5"
MNIST, FASHION = "mnist", "fashion_mnist"
HELD_OUT = 5000
EPOCHS = {(MLP, MNIST): 12, (MLP, FASHION): 20, (CNN, MNIST): 2, (CNN, FASHION): 7}
BATCH = {MLP: 256, CNN: 128}
RATE, DECAY, DROPOUT = 3e-3, 1e-2, 0.2
DENSITY = {"conv1": 0.5, "conv2": 0.09, "dense": 0.06, "dense1": 0.14, "dense2": 0.28, "head": 0.5}
"""Share of a layer's weights that L-OBS keeps."""
PRUNING_SAMPLES = 10_000
DAMPING = 1e-4


@dataclass(frozen=True)
class LeNet:
    """One network: its architecture, its data set, the seed of its start and of the order of its images."""

    kind: str
    data: str
    seed: int
    sparse: bool = False

    @property
    def name(self) -> str:
        """Of its file, and so of its task."""
        return f"{self.data}_{self.kind}_{'sparse_' * self.sparse}{self.seed}"

    @property
    def path(self) -> Path:
        """Its file, trained and pruned first if need be."""
        path = FOLDER / f"{self.name}.onnx"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.sparse:
                save(pruned(load(LeNet(self.kind, self.data, self.seed).path), self.data), path)
            else:
                onnx.save(_to_onnx(self.kind, _train(self)), path)
        return path


def images(data: str) -> Path:
    """55 000 training images as `input` [N, 1, 28, 28], the other 5000 held out; no labels."""
    path = CACHE / f"{data}_without_labels.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        inputs, _ = _raw(data, "train")
        used = _used(len(inputs))
        np.savez(path, input=inputs[used], test_input=inputs[~used])
    return path


def errors(model: Path, data: str) -> dict[str, float]:
    """Per cent of the test images that each output of a file gets wrong."""
    inputs, labels = test_images(data)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    wrong = dict.fromkeys(names, 0)
    for rows in np.array_split(np.arange(len(inputs)), 10):
        for name, found in zip(names, session.run(names, {"input": inputs[rows]}), strict=True):
            wrong[name] += int((found.argmax(1) != labels[rows]).sum())
    return {name: 100 * count / len(labels) for name, count in wrong.items()}


def pruned(model: oir.Model, data: str) -> oir.Model:
    """A copy whose layers have only a share DENSITY of their weights, by L-OBS."""
    with np.load(images(data)) as arrays:
        samples = Stored({"input": arrays["input"][:PRUNING_SAMPLES]})
    sparse = model.clone()
    names = [value.name or "" for node in model.graph for value in node.outputs]
    teacher = Teacher(model, samples, samples, PRUNING_SAMPLES, {name: name for name in ["input", *names]})
    Refit({data: teacher}, [], _prune, threads=1)(sparse)
    return sparse


def _prune(layer: Layer, statistics: Sequence[Regression], current: np.ndarray) -> np.ndarray:
    (own,) = statistics
    return prune(own.gram[0] / own.rows, own.cross[0] / own.rows, current[0], density(layer))[None]


def density(layer: Layer) -> float:
    """The share of its weights that a sparse network keeps; merged networks put prefixes to a layer's name."""
    return DENSITY[layer.name.rpartition("/")[2].removesuffix("_weight")]


def prune(moments: np.ndarray, cross: np.ndarray, weights: np.ndarray, share: float) -> np.ndarray:
    """L-OBS in one pass.

    Args:
        moments: X'X / n [fan in + 1, fan in + 1], a column of ones last.
        cross: X'Z / n [fan in + 1, neurons], Z what the dense layer computes.
        weights: [fan in + 1, neurons], of the dense layer, the bias last, which is always kept.
        share: of the layer's weights that is kept.

    Returns:
        [fan in + 1, neurons]
    """
    damping = DAMPING * np.trace(moments) / len(moments)
    hessian, right = moments + damping * np.eye(len(moments)), cross + damping * weights
    inverse = np.linalg.inv(hessian)
    importance = (inverse @ right) ** 2 / inverse.diagonal()[:, None]
    kept = importance >= np.quantile(importance[:-1], 1 - share)
    kept[-1] = True
    return fit_kept(hessian, right, kept)


def fit_kept(hessian: np.ndarray, cross: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The weights that are least squares towards targets while all but those `kept` are zero; all [fan in, neurons]."""
    found = np.zeros_like(cross)
    for neuron, rows in enumerate(kept.T):
        found[rows, neuron] = np.linalg.solve(hessian[np.ix_(rows, rows)], cross[rows, neuron])
    return found


def _train(lenet: LeNet) -> list[np.ndarray]:
    """Weights and biases in order, as torch keeps them."""
    torch.set_num_threads(1)  # with more, sums are rounded in another order and other networks come out
    torch.manual_seed(lenet.seed)
    inputs, labels = (torch.from_numpy(array) for array in _raw(lenet.data, "train"))
    used = torch.from_numpy(_used(len(inputs)))
    inputs, labels = inputs[used], labels[used]
    network = _network(lenet.kind).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), RATE, weight_decay=DECAY)
    batch = BATCH[lenet.kind]
    steps = EPOCHS[lenet.kind, lenet.data] * len(inputs) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    batches = itertools.chain.from_iterable(iter(lambda: torch.randperm(len(inputs)).split(batch), None))
    for rows in itertools.islice(batches, steps):
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(inputs[rows])
        optimiser.zero_grad()
        nn.functional.cross_entropy(logits.float(), labels[rows]).backward()
        optimiser.step()
        schedule.step()
    return [array.detach().contiguous().numpy() for array in network.parameters()]


def _network(kind: str) -> nn.Sequential:
    if kind == MLP:
        return nn.Sequential(
            nn.Flatten(),
            *(nn.Linear(784, 300), nn.ReLU(), nn.Dropout(DROPOUT)),
            *(nn.Linear(300, 100), nn.ReLU(), nn.Dropout(DROPOUT)),
            nn.Linear(100, 10),
        )
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(800, 500), nn.ReLU(), nn.Dropout(DROPOUT)),
        nn.Linear(500, 10),
    )


def _to_onnx(kind: str, arrays: Sequence[np.ndarray]) -> onnx.ModelProto:
    layers = {MLP: ("dense1", "dense2", "head"), CNN: ("conv1", "conv2", "dense", "head")}[kind]
    nodes, constants, value = [], [], "input"

    def add(op: str, name: str, extra: Sequence[str] = (), **attributes: object) -> None:
        nonlocal value
        nodes.append(helper.make_node(op, [value, *extra], [f"{name}_out"], name, **attributes))
        value = f"{name}_out"

    for layer, weight, bias in zip(layers, arrays[::2], arrays[1::2], strict=True):
        dense = weight.ndim == 2
        if dense and not any(node.op_type == "Flatten" for node in nodes):
            add("Flatten", "flatten")
        constants.append(numpy_helper.from_array(weight.T.copy() if dense else weight, f"{layer}_weight"))
        constants.append(numpy_helper.from_array(bias, f"{layer}_bias"))
        add("Gemm" if dense else "Conv", layer, [f"{layer}_weight", f"{layer}_bias"])
        if layer != "head":
            add("Relu", f"{layer}_relu")
        if not dense:
            add("MaxPool", f"{layer}_pool", kernel_shape=[2, 2], strides=[2, 2])
    nodes[-1].output[0] = "logits"
    graph = helper.make_graph(
        nodes,
        kind,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 1, 28, 28])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_images(data: str) -> tuple[np.ndarray, np.ndarray]:
    """[10 000, 1, 28, 28] and the labels."""
    return _raw(data, "test")


def _raw(data: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(SHARED / "data" / f"{data}.npz") as raw:
        pixels = (raw[f"x_{part}"][:, None] / np.float32(255)).astype(np.float32)
        return pixels, raw[f"y_{part}"].astype(np.int64)


def _used(count: int) -> np.ndarray:
    """Which training images are not held out."""
    used = np.ones(count, bool)
    used[np.random.default_rng(0).choice(count, HELD_OUT, replace=False)] = False
    return used


if __name__ == "__main__":
    for kind in (MLP, CNN):
        for data, count in ((MNIST, 6), (FASHION, 3)):
            for seed in range(count):
                for sparse in (False, True)[: 2 if data == MNIST else 1]:
                    lenet = LeNet(kind, data, seed, sparse)
                    print(lenet, *errors(lenet.path, data).values(), flush=True)
