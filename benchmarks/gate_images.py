"""Two networks merged by gate beside the best of three and one network trained as long as all of it together.

python benchmarks/gate_images.py [--part NAME] [--seeds 3] [--finished]

A LeNet on Fashion-MNIST (10 000 training images) and a small residual network with batch norms on CIFAR-10 (5000). The
budget is split as in Merging of neural networks (Pašen and Boža): of E epochs each of two parents has a third, learning
the gates a sixth and fine-tuning a sixth; the best of three has three thirds, one network all of them. Everything is
trained on labels, by AdamW with a one-cycle schedule: parents and the long network by plain torch, from there on gate
with its defaults, which fine-tune towards the parents' mean too; "labels alone" is without it, as published. The last
500 training images of each seed choose the best weights of a gate run and teach nobody; the test images only score.

A seed takes about four minutes of one core for LeNet and six for the residual network. Below each table stands which
layers read through which vector of gates: all that read one residual stream read through one.

Each network is kept in benchmarks/cache/gate_images; `--finished` prints the tables of what there is. Delete that
folder when the code has changed.
"""

import argparse
import json
import logging
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import markdown
import numpy as np
import torch
from five_tasks import Block
from torch import nn

from onnxmerge import GateSettings, gate_models
from onnxmerge.files import write_text
from onnxmerge.methods.gate.plan import make_gate_plan
from onnxmerge.methods.task import load_networks
from onnxmerge.runtime.session import open_session, run

FOLDER = datasets.CACHE / "gate_images"
BATCH, RATE = 64, 3e-3
HELD_OUT = 500


def lenet() -> nn.Module:
    """Two convolutions with pooling, three matrices: 6, 16, 120 and 84 hidden channels."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def resnet() -> nn.Module:
    """Three residual blocks of 8, 16 and 32 channels behind a stem, on images pooled to 16 x 16."""
    return nn.Sequential(
        nn.AvgPool2d(2),
        nn.Conv2d(3, 8, 3, 1, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Block(8, 8, 1),
        Block(8, 16, 2),
        Block(16, 32, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


@dataclass(frozen=True)
class Part:
    """One kind of network: how it is made, what it sees, and E."""

    build: Callable[[], nn.Module]
    data: Callable[[], Path]
    epochs: int


PARTS = {
    "lenet": Part(lenet, lambda: datasets.digits("fashion_mnist"), 36),
    "resnet": Part(resnet, lambda: datasets.cifar(labels=True, samples=5000), 60),
}


def samples(part: Part, seed: int) -> tuple[Path, dict[str, np.ndarray]]:
    """The seed's order of the training images, of which the last are held out, as a file for gate; and all arrays."""
    with np.load(part.data()) as raw:
        arrays = {name: raw[name] for name in raw.files}
    order = np.random.default_rng(seed).permutation(len(arrays["labels"]))
    x, labels = arrays["input"][order], arrays["labels"][order]
    path = FOLDER / f"{part.data().stem}_{seed}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = {"input": x[:-HELD_OUT], "labels": labels[:-HELD_OUT]}
        np.savez(path, **parts, test_input=x[-HELD_OUT:], test_labels=labels[-HELD_OUT:])
    return path, {**arrays, "input": x, "labels": labels}


def train(part: Part, arrays: dict[str, np.ndarray], epochs: int, seed: int) -> nn.Module:
    """A network trained on the images of `arrays`."""
    torch.manual_seed(seed)
    x, labels = torch.from_numpy(arrays["input"]), torch.from_numpy(arrays["labels"])
    network = part.build().train()
    optimiser = torch.optim.AdamW(network.parameters(), RATE)
    steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: len(x) // BATCH * BATCH].split(BATCH):
            optimiser.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(network(x[rows]), labels[rows]).backward()
            optimiser.step()
            schedule.step()
    return network.eval()


def trained(name: str, part: Part, arrays: dict[str, np.ndarray], epochs: int, seed: int) -> Path:
    """The file of a network, trained and exported first if need be."""
    path = FOLDER / f"{name}.onnx"
    if not path.exists():
        network = train(part, arrays, epochs, seed)
        temporary = path.with_suffix(".partial")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                network,
                (torch.from_numpy(arrays["input"][:2]),),
                temporary,
                input_names=["input"],
                dynamic_shapes=({0: torch.export.Dim("N")},),
                external_data=False,
                verbose=False,
            )
        temporary.rename(path)
    return path


def accuracy(path: Path, arrays: dict[str, np.ndarray]) -> float:
    """On the test images, in onnxruntime."""
    session = open_session(path.read_bytes(), threads=1)
    made = [next(iter(run(session, {"input": x}).values())) for x in np.array_split(arrays["test_input"], 20)]
    return float((np.concatenate(made).argmax(1) == arrays["test_labels"]).mean())


def measure(kind: str, seed: int) -> dict[str, float]:
    """The test accuracy of every strategy for one seed."""
    part = PARTS[kind]
    path, arrays = samples(part, seed)
    own = {name: arrays[name][:-HELD_OUT] for name in ("input", "labels")}
    third = part.epochs // 3
    parents = [trained(f"{kind}_{seed}_{n}", part, own, third, 10 * seed + n) for n in range(3)]
    one = trained(f"{kind}_{seed}_long", part, own, part.epochs, 10 * seed + 9)
    steps = part.epochs // 6 * (len(own["labels"]) // BATCH)
    settings = GateSettings(gate_steps=steps, steps=steps, batch=BATCH, seed=seed, threads=1, measure=False)
    folder, alone = (FOLDER / f"{kind}_{seed}_{name}" for name in ("student", "labels_alone"))
    gate_models(parents[:2], path, folder, settings=settings, overwrite=True)
    gate_models(parents[:2], path, alone, settings=replace(settings, mean_weight=0.0), overwrite=True)
    scores = [accuracy(parent, arrays) for parent in parents]
    return {
        "two parents, mean": statistics.mean(scores[:2]),
        "best of three": max(scores),
        "one network": accuracy(one, arrays),
        "before fine-tuning": accuracy(folder / "pruned.onnx", arrays),
        "student": accuracy(folder / "merged.onnx", arrays),
        "student, labels alone": accuracy(alone / "merged.onnx", arrays),
    }


def show_gates(kind: str) -> None:
    """Through which vector of gates each layer reads: all that read one residual stream read through one."""
    networks = load_networks([FOLDER / f"{kind}_0_{n}.onnx" for n in range(2)], folded=False)
    places = make_gate_plan(networks, GateSettings()).places
    rows = []
    for own in places.spaces:
        read = [
            value for value in places.values if np.isin(value.gate, np.arange(*own.gates.indices(places.count))).any()
        ]
        readers = sum(len(value.readers) for value in read)
        rows.append([own.space.name, f"{own.keep} of {own.space.size}", str(len(read)), str(readers)])
    print(
        f"\n{markdown.table(['vector of gates', 'channels that stay', 'values it gates', 'layers'], rows)}", flush=True
    )


def show(kind: str, found: Sequence[dict[str, float]]) -> None:
    rows = [
        [name, markdown.mean_spread([own[name] for own in found]), ", ".join(f"{100 * own[name]:.2f}" for own in found)]
        for name in found[0]
    ]
    print(f"\n{kind}\n\n{markdown.table(['network', 'test accuracy, mean (range)', 'each seed'], rows)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), help="default: both")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--finished", action="store_true", help="show what is in the cache, make nothing")
    options = parser.parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of torchvision, which is not needed
    torch.set_num_threads(1)
    for kind in [options.part] if options.part else PARTS:
        files = [FOLDER / f"{kind}_{seed}.json" for seed in range(options.seeds)]
        for seed, path in enumerate(files):
            if not path.exists() and not options.finished:
                write_text(path, json.dumps(measure(kind, seed), indent=2) + "\n")
                print(kind, seed, path.read_text(), flush=True)
        done = [json.loads(path.read_text()) for path in files if path.exists()]
        if done:
            show(kind, done)
            show_gates(kind)


if __name__ == "__main__":
    main()
