"""Train the VGG networks that `fuse_vggs.py` starts from, at one core's scale, and cache them as ONNX files.

CLAFusion (Nguyen et al.), section 4.2 and appendices B and C.2.1, on CIFAR-10: the teacher A has the ten convolutions
of VGG13 with doubled widths, the student B the eight of VGG11 with halved widths; the first and the last convolution
are as wide in both. Every width here is an eighth of the paper's (1028 counts as 1024), so A has 0.51 and B 0.05
million parameters against 33 and 3. Kernels are 3x3, no biases, no batch norm, a pooling behind each of the five
groups, one linear head.

Unlike the paper (300 epochs, SGD, rate 0.05 halved every 30 epochs): EPOCHS epochs of SGD with a one-cycle schedule up
to RATE, gradients clipped to norm 1 from He's initialisation (without norms nothing starts otherwise), images flipped
at random, bfloat16 while training. On one quiet core A takes about five minutes and B two; run as a script
it trains all pairs.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from datasets import CACHE, cifar
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

FOLDER = CACHE / "vggs"
TEACHER = ((8, 16), (32, 32), (64, 64), (128, 128), (128, 64))
STUDENT = ((8,), (8,), (16, 16), (32, 32), (32, 64))
EPOCHS = {TEACHER: 8, STUDENT: 12}
RATE, MOMENTUM, DECAY, BATCH, CLIP = 0.1, 0.9, 5e-4, 128, 1.0
SIDE, COLOURS, CLASSES, KERNEL = 32, 3, 10, 3

Groups = tuple[tuple[int, ...], ...]
"""The widths of the convolutions of each group; a pooling ends a group."""


def images() -> Path:
    """All 50 000 training images and the test set as `input` [N, 3, 32, 32], normalised, with labels."""
    return cifar(labels=True, samples=50_000)


def vgg(groups: Groups, seed: int) -> Path:
    """The ONNX file of a trained VGG with these `groups`."""
    path = _path(groups, f"seed{seed}")
    if not path.exists():
        _save(groups, _train(groups, seed), path)
    return path


def untrained(groups: Groups, seed: int) -> Path:
    """The ONNX file of a VGG as training finds it, started by another number than the trained one of this seed."""
    path = _path(groups, f"untrained{seed}")
    if not path.exists():
        torch.manual_seed(1000 + seed)
        _save(groups, list(_network(groups).parameters()), path)
    return path


def _path(groups: Groups, name: str) -> Path:
    return FOLDER / f"vgg_{'_'.join('-'.join(map(str, group)) for group in groups)}_{name}.onnx"


def _save(groups: Groups, weights: Sequence[Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(_to_onnx(groups, [weight.detach().numpy().copy() for weight in weights]), path)


def _train(groups: Groups, seed: int) -> list[Tensor]:
    """The kernels [out, in, 3, 3] in order, and the head [classes, in]."""
    torch.set_num_threads(1)  # with more, sums are rounded in another order and other networks come out
    torch.manual_seed(seed)
    with np.load(images()) as data:
        inputs, labels = torch.from_numpy(data["input"]), torch.from_numpy(data["labels"])
    network = _network(groups).to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(network.parameters(), RATE, MOMENTUM, weight_decay=DECAY, nesterov=True)
    steps = EPOCHS[groups] * len(inputs) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    batches = itertools.chain.from_iterable(iter(lambda: torch.randperm(len(inputs)).split(BATCH), None))
    for rows in itertools.islice(batches, steps):
        _step(network, optimiser, _flipped(inputs[rows]), labels[rows])
        schedule.step()
    return list(network.parameters())


def _step(network: nn.Module, optimiser: torch.optim.Optimizer, inputs: Tensor, labels: Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(inputs.to(memory_format=torch.channels_last))
    nn.functional.cross_entropy(logits.float(), labels).backward()
    nn.utils.clip_grad_norm_(network.parameters(), CLIP)
    optimiser.step()


def _network(groups: Groups) -> nn.Sequential:
    parts: list[nn.Module] = []
    width = COLOURS
    for group in groups:
        for wider in group:
            convolution = nn.Conv2d(width, wider, KERNEL, padding=KERNEL // 2, bias=False)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            parts += [convolution, nn.ReLU()]
            width = wider
        parts.append(nn.MaxPool2d(2))
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(width, CLASSES, bias=False))


def _flipped(inputs: Tensor) -> Tensor:
    return torch.where((torch.rand(len(inputs)) < 0.5)[:, None, None, None], inputs.flip(3), inputs)


def _to_onnx(groups: Groups, weights: Sequence[np.ndarray]) -> onnx.ModelProto:
    nodes, value, number = [], "input", 0
    for group, widths in enumerate(groups, start=1):
        for _ in widths:
            number += 1
            inputs = [value, f"w{number}"]
            nodes.append(helper.make_node("Conv", inputs, [f"z{number}"], f"conv{number}", pads=[KERNEL // 2] * 4))
            nodes.append(helper.make_node("Relu", [f"z{number}"], [f"a{number}"], f"relu{number}"))
            value = f"a{number}"
        nodes.append(
            helper.make_node("MaxPool", [value], [f"p{group}"], f"pool{group}", kernel_shape=[2, 2], strides=[2, 2])
        )
        value = f"p{group}"
    nodes.append(helper.make_node("Flatten", [value], ["features"], "flatten"))
    nodes.append(helper.make_node("MatMul", ["features", "head"], ["logits"], "head"))
    arrays = {f"w{place}": array for place, array in enumerate(weights[:-1], start=1)} | {"head": weights[-1].T.copy()}
    graph = helper.make_graph(
        nodes,
        "vgg",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", COLOURS, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


if __name__ == "__main__":
    for seed in range(3):
        print(vgg(STUDENT, seed), vgg(TEACHER, seed), flush=True)
