"""Train the perceptrons that the fuse benchmarks start from, as their papers do, and cache them as ONNX files.

MNIST, pixels normalised, SGD with rate 0.01 and momentum 0.5, batches of 64, 10 epochs, no bias: CLAFusion (Nguyen et
al.), table 6, after OTFusion (Singh and Jaggi).
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from datasets import CACHE, SHARED
from onnx import TensorProto, helper, numpy_helper

FOLDER = CACHE / "mlps"
MEAN, STD = 0.1307, 0.3081
EPOCHS, BATCH, RATE, MOMENTUM = 10, 64, 0.01, 0.5


def mnist(samples: int = 10_000) -> Path:
    """`samples` seeded training images and the whole test set as `x` [N, 784], with labels."""
    path = CACHE / f"mnist_flat_{samples}.npz"
    if not path.exists():
        images, labels, test_images, test_labels = _normalised()
        chosen = np.sort(np.random.default_rng(0).choice(len(images), samples, replace=False))
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"x": images[chosen], "labels": labels[chosen], "test_x": test_images, "test_labels": test_labels}
        np.savez(path, **arrays)
    return path


def perceptron(hidden: Sequence[int], seed: int) -> Path:
    """The ONNX file of a trained 784-hidden-10 perceptron with ReLU and no biases."""
    path = FOLDER / f"mlp_{'_'.join(map(str, hidden))}_seed{seed}.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(_to_onnx(_train([784, *hidden, 10], seed)), path)
    return path


def _train(sizes: Sequence[int], seed: int) -> list[np.ndarray]:
    """The weights [in, out] of each layer."""
    torch.manual_seed(seed)
    images, labels, _, _ = (torch.from_numpy(array) for array in _normalised())
    layers = [torch.nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)]
    network = torch.nn.Sequential(*[part for layer in layers for part in (layer, torch.nn.ReLU())][:-1])
    optimiser = torch.optim.SGD(network.parameters(), lr=RATE, momentum=MOMENTUM)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(BATCH):
            optimiser.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimiser.step()
    return [layer.weight.detach().numpy().T.copy() for layer in layers]


def _to_onnx(weights: Sequence[np.ndarray]) -> onnx.ModelProto:
    nodes, value = [], "x"
    for number, _ in enumerate(weights, start=1):
        nodes.append(helper.make_node("MatMul", [value, f"w{number}"], [f"z{number}"], f"layer{number}"))
        value = f"z{number}"
        if number < len(weights):
            nodes.append(helper.make_node("Relu", [value], [f"a{number}"], f"relu{number}"))
            value = f"a{number}"
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 784])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["N", weights[-1].shape[1]])],
        [numpy_helper.from_array(array, f"w{number}") for number, array in enumerate(weights, start=1)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def _normalised() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    with np.load(SHARED / "data" / "mnist.npz") as raw:
        images = [
            ((raw[name] / 255 - MEAN) / STD).reshape(-1, 784).astype(np.float32) for name in ("x_train", "x_test")
        ]
        labels = [raw[name].astype(np.int64) for name in ("y_train", "y_test")]
    return images[0], labels[0], images[1], labels[1]


if __name__ == "__main__":
    mnist()
    for seed in range(5):
        print(perceptron((400, 200, 100, 50, 25), seed), perceptron((400, 200, 100), seed), flush=True)
    print(perceptron((400, 200, 100), 5))
