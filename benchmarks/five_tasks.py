"""Five tasks on images of one size, and a residual network trained on each, cached as ONNX files.

The networks that `zip_five.py` starts from, after MTZ (He et al. 2018), section 4.3: CIFAR-100, traffic signs,
Omniglot, SVHN and UCF101 there; here what is at hand: MNIST, Fashion-MNIST, USPS, CIFAR-10, and the rotation of a
CIFAR-10 image (by 0, 90, 180 or 270 degrees, drawn with seed 0 for each image). Every image is [3, 32, 32] with one
normalisation, as one camera would give it: 28x28 images get a black border, 16x16 ones are doubled, grey becomes three
equal channels.

The network is ResNet-20 (He et al. 2016) for CIFAR with a stride of 2 in its first convolution and 1x1 convolutions
where the width changes: 0.27 million parameters (the paper: ResNet-28, 28 layers). SGD with a one-cycle schedule,
images shifted and, where that leaves their class, flipped at random, bfloat16 while training; every task and seed
starts from weights of its own. Run as a script it trains one seed of all; on one quiet core that takes about a quarter
of an hour.
"""

import argparse
import itertools
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from datasets import CACHE, CIFAR_MEAN, CIFAR_STD, SHARED, cifar
from torch import Tensor, nn

FOLDER = CACHE / "five_tasks"
EPOCHS = {"cifar10": 8, "fashion": 4, "mnist": 2, "usps": 12, "rotation": 6}
"""The tasks in the order in which they are zipped, and how long each network trains."""
TASKS = tuple(EPOCHS)
CLASSES = {"rotation": 4}
FLIPPED = ("cifar10", "fashion")
"""Tasks whose images keep their class in the mirror."""
RATE, MOMENTUM, DECAY, BATCH, SHIFT = 0.2, 0.9, 5e-4, 128, 3
SIDE, COLOURS = 32, 3
WIDTHS, BLOCKS = (16, 32, 64), 3


# --- images -----------------------------------------------------------------------------------------------------------


def images(task: str) -> Path:
    """All training and test images of `task` as `input` [N, 3, 32, 32], normalised, with labels."""
    if task == "cifar10":
        return cifar(labels=True, samples=50_000)
    path = FOLDER / f"{task}.npz"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial.npz")
        np.savez(temporary, **(_rotated() if task == "rotation" else _grey(task)))
        temporary.rename(path)
    return path


def _grey(task: str) -> dict[str, np.ndarray]:
    with np.load(SHARED / "data" / f"{'fashion_mnist' if task == 'fashion' else task}.npz") as raw:
        return {
            "input": _normalised(raw["x_train"]),
            "labels": raw["y_train"].astype(np.int64),
            "test_input": _normalised(raw["x_test"]),
            "test_labels": raw["y_test"].astype(np.int64),
        }


def _normalised(pixels: np.ndarray) -> np.ndarray:
    """[N, 16, 16] or [N, 28, 28] grey pixels as [N, 3, 32, 32]."""
    twice = SIDE // pixels.shape[1]
    pixels = pixels.repeat(twice, axis=1).repeat(twice, axis=2)
    border = (SIDE - pixels.shape[1]) // 2
    pixels = np.pad(pixels, ((0, 0), (border, border), (border, border)))
    return (pixels[:, None] / np.float32(255) - CIFAR_MEAN) / CIFAR_STD


def _rotated() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    arrays = {}
    with np.load(cifar(labels=True, samples=50_000)) as upright:
        for prefix in ("", "test_"):
            arrays[f"{prefix}input"] = upright[f"{prefix}input"]
            turns = generator.integers(4, size=len(arrays[f"{prefix}input"]))
            for turn in range(1, 4):
                chosen = arrays[f"{prefix}input"][turns == turn]
                arrays[f"{prefix}input"][turns == turn] = np.rot90(chosen, turn, axes=(2, 3))
            arrays[f"{prefix}labels"] = turns
    return arrays


# --- training ---------------------------------------------------------------------------------------------------------


def trained(
    build: Callable[[int], nn.Module], task: str, seed: int, epochs: int, path: Path, *, bfloat16: bool
) -> Path:
    """Train `build(classes)` on a task and write it to `path`, unless it is there; prints its accuracy and the time."""
    if path.exists():
        return path
    begun = time.perf_counter()
    torch.set_num_threads(1)  # with more, sums are rounded in another order and other networks come out
    torch.manual_seed(len(TASKS) * seed + TASKS.index(task))
    network = build(CLASSES.get(task, 10))
    _train(network, task, epochs, bfloat16)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    export(network.eval(), temporary)
    temporary.rename(path)
    print(f"{path.stem}: {accuracy(path, task):.2f} %, trained in {time.perf_counter() - begun:.0f} s", flush=True)
    return path


def _train(network: nn.Module, task: str, epochs: int, bfloat16: bool) -> None:
    with np.load(images(task)) as data:
        inputs, labels = torch.from_numpy(data["input"]), torch.from_numpy(data["labels"])
    network.to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.SGD(network.parameters(), RATE, MOMENTUM, weight_decay=DECAY, nesterov=True)
    steps = epochs * len(inputs) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    batches = itertools.chain.from_iterable(iter(lambda: torch.randperm(len(inputs)).split(BATCH), None))
    for rows in itertools.islice(batches, steps):
        batch = _varied(inputs[rows], task in FLIPPED).to(memory_format=torch.channels_last)
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = network(batch)
        nn.functional.cross_entropy(logits.float(), labels[rows]).backward()
        optimiser.step()
        schedule.step()


def _varied(inputs: Tensor, flip: bool) -> Tensor:
    """Each image shifted by up to SHIFT pixels both ways, its border repeated, and half of them flipped."""
    count = len(inputs)
    if flip:
        inputs = torch.where((torch.rand(count) < 0.5)[:, None, None, None], inputs.flip(3), inputs)
    inputs = nn.functional.pad(inputs, [SHIFT] * 4, mode="replicate")
    rows, columns = (torch.randint(2 * SHIFT + 1, (count, 1)) + torch.arange(SIDE) for _ in range(2))
    picked = inputs.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def export(network: nn.Module, path: Path) -> None:
    """Opset 18, a dynamic batch axis N, batch norms as nodes of their own."""
    with warnings.catch_warnings():  # this exporter is chosen on purpose: it writes batch norms as they are
        warnings.filterwarnings("ignore", "You are using the legacy TorchScript-based ONNX export", DeprecationWarning)
        torch.onnx.export(
            network.to(memory_format=torch.contiguous_format),
            (torch.zeros(1, COLOURS, SIDE, SIDE),),
            str(path),
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
            opset_version=18,
            training=torch.onnx.TrainingMode.PRESERVE,  # in eval mode already; EVAL would fold the batch norms away
            do_constant_folding=False,
            dynamo=False,
        )


def accuracy(path: Path, task: str) -> float:
    """Per cent of the test images that the file names right in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    with np.load(images(task)) as data:
        inputs, labels = data["test_input"], data["test_labels"]
    found = np.concatenate([session.run(None, {"input": batch})[0] for batch in np.array_split(inputs, 40)])
    return 100 * float((found.argmax(1) == labels).mean())


# --- the residual network ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions beside a skip, which is a 1x1 convolution where the width changes."""

    def __init__(self, inside: int, out: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        widens = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.skip = nn.Identity() if inside == out else widens
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.skip(x))


def residual_network(classes: int) -> nn.Sequential:
    """ResNet-20 whose first convolution has a stride of 2: feature maps of 16x16, 8x8 and 4x4."""
    width = WIDTHS[0]
    parts: list[nn.Module] = [nn.Conv2d(COLOURS, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for stage, wider in enumerate(WIDTHS):
        for block in range(BLOCKS):
            parts.append(Block(width, wider, 2 if stage and not block else 1))
            width = wider
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def network(task: str, seed: int = 0) -> Path:
    """The ONNX file of a trained residual network, called after its task."""
    return trained(residual_network, task, seed, EPOCHS[task], FOLDER / f"seed{seed}" / f"{task}.onnx", bfloat16=True)


def train_all(doc: str | None, tasks: Iterable[str], network: Callable[[str, int], Path]) -> None:
    """The command of a file of networks: train those of one seed that are not there."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for task in tasks:
        network(task, options.seed)


if __name__ == "__main__":
    train_all(__doc__, TASKS, network)
