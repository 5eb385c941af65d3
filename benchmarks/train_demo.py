"""Train and write the demo: two small CNNs for two tasks, and the data cards and images that go with them.

    python benchmarks/train_demo.py [--data FOLDER] [--out FOLDER]

FOLDER holds mnist.npz and fashion_mnist.npz with the arrays x_train, y_train, x_test, y_test. The networks share an
architecture and nothing else: each starts from its own seed and sees its own data. The last lines printed are the
accuracies that onnxmerge/demo/ATTRIBUTION.md quotes. One machine gives the same bytes again.
"""

import argparse
import tempfile
import time
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from onnxmerge.data import InputSpec, Split, load_dataset
from onnxmerge.files import whole_file, write_text

REPOSITORY = Path(__file__).resolve().parents[1]
EPOCHS = 4
BATCH = 128
PEAK_RATE = 6e-3
THREADS = 1  # the sums' order, and with it every bit, is then the same on any number of cores
CALIBRATION_IMAGES = 2000
TEST_IMAGES = 1000

CARD = """\
# {title}: {calibration} images to calibrate with (no labels), {test} with labels held out.
file: {name}.npz
scale: 1/255
"""

WHOLE_SET_CARD = """\
file: "{archive}"
inputs: {{image: x_train}}
test_inputs: {{image: x_test}}
test_labels: y_test
layout: NHW
scale: 1/255
"""


@dataclass(frozen=True)
class Task:
    """One demo task: its name, what the card calls it, the archive with its images, and its seed."""

    name: str
    title: str
    archive: str
    seed: int


TASKS = (
    Task("digits", "Handwritten digits (MNIST)", "mnist.npz", seed=1),
    Task("fashion", "Pieces of clothing (Fashion-MNIST)", "fashion_mnist.npz", seed=2),
)


def build_network(classes: int = 10) -> nn.Sequential:
    """Four Conv-BatchNorm-ReLU layers, a global average pool, one hidden dense layer and the head."""

    modules: OrderedDict[str, nn.Module] = OrderedDict()
    channels_in = 1
    for number, (channels, stride) in enumerate(((32, 2), (64, 2), (64, 1), (64, 2)), start=1):
        modules[f"conv{number}"] = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        modules[f"norm{number}"] = nn.BatchNorm2d(channels)
        modules[f"relu{number}"] = nn.ReLU()
        channels_in = channels
    modules["pool"] = nn.AdaptiveAvgPool2d(1)
    modules["flatten"] = nn.Flatten()
    modules["hidden"] = nn.Linear(channels_in, 64)
    modules["relu5"] = nn.ReLU()
    modules["head"] = nn.Linear(64, classes)
    return nn.Sequential(modules)


def train(images: np.ndarray, labels: np.ndarray, seed: int) -> nn.Module:
    """Train on `images` (count, 28, 28) uint8 with a one-cycle schedule; returns the network in eval mode."""
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    inputs = torch.from_numpy(images).unsqueeze(1).float() / 255
    targets = torch.from_numpy(labels.astype(np.int64))
    network = convert_conv2d_weight_memory_format(build_network(), torch.channels_last)  # faster on a CPU
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_RATE, weight_decay=1e-2)
    steps = len(inputs) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=EPOCHS * steps)
    for _ in range(EPOCHS):
        shuffled = torch.randperm(len(inputs), generator=order)
        for rows in shuffled[: steps * BATCH].split(BATCH):
            loss = nn.functional.cross_entropy(network(inputs[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def export(network: nn.Module, path: Path) -> None:
    """Write `network` as ONNX opset 18 with a dynamic batch axis N and its batch norms kept as nodes."""
    with whole_file(path) as temporary:
        torch.onnx.export(
            convert_conv2d_weight_memory_format(network, torch.contiguous_format),
            (torch.zeros(1, 1, 28, 28),),
            str(temporary),
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
            opset_version=18,
            # PRESERVE: the network is in eval mode already, and EVAL would fold the batch norms away.
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            dynamo=False,
        )
        onnx.checker.check_model(str(temporary), full_check=True)


def write_images(arrays: dict[str, np.ndarray], task: Task, folder: Path) -> None:
    """Write the data card and a seeded choice of images, as they are stored in the source: uint8."""
    generator = np.random.default_rng(task.seed)
    calibration = generator.permutation(len(arrays["x_train"]))[:CALIBRATION_IMAGES]
    test = generator.permutation(len(arrays["x_test"]))[:TEST_IMAGES]
    with whole_file(folder / f"{task.name}.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            image=arrays["x_train"][calibration, np.newaxis],
            test_image=arrays["x_test"][test, np.newaxis],
            test_labels=arrays["y_test"][test],
        )
    card = CARD.format(title=task.title, name=task.name, calibration=len(calibration), test=len(test))
    write_text(folder / f"{task.name}.yaml", card)


def accuracy(session: onnxruntime.InferenceSession, split: Split) -> float:
    """Share of the samples of `split` that `session` names right, in percent."""
    right = 0
    for batch in split.batches(500):
        (logits,) = session.run(["logits"], batch.inputs)
        right += int(np.count_nonzero(logits.argmax(axis=1) == batch.labels))
    return 100 * right / len(split)


def measure(task: Task, data: Path, folder: Path) -> str:
    """Accuracy in onnxruntime on the shipped test images and on the whole test set, each read through a data card."""
    session = onnxruntime.InferenceSession(folder / f"{task.name}.onnx", providers=["CPUExecutionProvider"])
    specs = [InputSpec("image", (None, 1, 28, 28), np.dtype(np.float32))]
    shipped = load_dataset(folder / f"{task.name}.yaml", specs).held_out
    with tempfile.TemporaryDirectory() as scratch:
        card = Path(scratch) / "whole.yaml"
        write_text(card, WHOLE_SET_CARD.format(archive=(data / task.archive).resolve()))
        whole = load_dataset(card, specs).held_out
    parameters = sum(int(np.prod(tensor.dims)) for tensor in onnx.load(folder / f"{task.name}.onnx").graph.initializer)
    return (
        f"{task.name}: {parameters} parameters, {accuracy(session, whole):.2f} % of the {len(whole)} test images, "
        f"{accuracy(session, shipped):.2f} % of the {len(shipped)} shipped ones"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and write the demo models and data.")
    parser.add_argument("--data", type=Path, default=REPOSITORY / "../shared/data", help="folder of the two archives")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "onnxmerge/demo", help="folder to write to")
    options = parser.parse_args()
    # This exporter is chosen on purpose: it writes batch norms as they are.
    warnings.filterwarnings("ignore", "You are using the legacy TorchScript-based ONNX export", DeprecationWarning)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    for task in TASKS:
        with np.load(options.data / task.archive) as archive:
            arrays = {name: archive[name] for name in ("x_train", "y_train", "x_test", "y_test")}
        begin = time.perf_counter()
        network = train(arrays["x_train"], arrays["y_train"], task.seed)
        seconds = time.perf_counter() - begin
        export(network, options.out / f"{task.name}.onnx")
        write_images(arrays, task, options.out)
        print(f"{measure(task, options.data, options.out)}; trained in {seconds:.0f} s")


if __name__ == "__main__":
    main()
