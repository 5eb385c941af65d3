"""Table 1 of Merging of neural networks (Pašen and Boža), the sine problem: networks trained by torch, merged by gate.

python benchmarks/gate_sine.py [--seeds 10] [--finished]

One hidden layer of 100; y = sin(10 pi x) + z, x uniform in (0, 1), z of standard deviation 0.2; 10 000 samples of each
seed, and 10 000 more to test. As in section 3.1 every strategy has 900 epochs (SGD with momentum 0.9, rate 0.01, then
0.001): one network for 900, the best of three for 300 each, or two for 300, gates for 150 and fine-tuning for 150, what
gate does on the same samples (a tenth of them held out). Batches are of 32, samples in one order in every epoch, as in
the program that the authors published; gate shuffles them, so there is also one network for 900 epochs with shuffled
samples. Networks of all seeds are trained at once, each on its own samples.

What is finished is kept in benchmarks/cache/gate_sine; `--finished` prints the table of what there is. Delete that
folder when the code has changed.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import markdown
import numpy as np
import onnx
import torch
from datasets import CACHE
from onnx import TensorProto, helper, numpy_helper

from onnxmerge import GateSettings, gate_models
from onnxmerge.files import write_text
from onnxmerge.runtime.session import open_session, run

FOLDER = CACHE / "gate_sine"
HIDDEN, SAMPLES, BATCH = 100, 10_000, 32
STEPS = -(-SAMPLES // BATCH)
"""In an epoch."""
RATE, MOMENTUM = 0.01, 0.9
TEACHERS = 3
"""Of each seed; the first two are merged."""
SHUFFLED = "shuffled"
STRATEGIES = (("teacher", TEACHERS, 300, 250), ("long", 1, 900, 800), (SHUFFLED, 1, 900, 800))
"""What is trained by torch: name, copies, epochs, and the epoch after which the rate falls."""
PAPER = {
    "student": (0.049, 0.116, 0.078, 0.077, 0.015),
    "best of three": (0.105, 0.373, 0.253, 0.240, 0.076),
    "one model": (0.053, 0.363, 0.281, 0.249, 0.097),
}
"""Min, max, median, mean, standard deviation of the test loss."""


def samples(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y [samples, 1]."""
    generator = np.random.default_rng(seed)
    x = generator.uniform(size=(SAMPLES, 1))
    y = np.sin(10 * np.pi * x) + generator.normal(0, 0.2, (SAMPLES, 1))
    return x.astype(np.float32), y.astype(np.float32)


def test_samples(seed: int) -> tuple[np.ndarray, np.ndarray]:
    return samples(1_000_000 + seed)


def train(seeds: Sequence[int], copies: int, epochs: int, slower: int, shuffled: bool) -> list[list[list[np.ndarray]]]:
    """For each seed `copies` networks (their four arrays) after `epochs`; the rate falls after epoch `slower`."""
    torch.manual_seed(1000 * epochs + seeds[0])
    data = [samples(seed) for seed in seeds for _ in range(copies)]
    x, y = (torch.tensor(np.stack(arrays)) for arrays in zip(*data, strict=True))
    count = len(data)
    bound = 1 / HIDDEN**0.5
    weights = [  # as torch.nn.Linear starts them
        torch.empty(count, 1, HIDDEN).uniform_(-1, 1),
        torch.empty(count, 1, HIDDEN).uniform_(-1, 1),
        torch.empty(count, HIDDEN, 1).uniform_(-bound, bound),
        torch.empty(count, 1, 1).uniform_(-bound, bound),
    ]
    for weight in weights:
        weight.requires_grad_()
    optimiser = torch.optim.SGD(weights, lr=RATE, momentum=MOMENTUM)
    for epoch in range(epochs):
        optimiser.param_groups[0]["lr"] = RATE if epoch < slower else RATE / 10
        if shuffled:
            order = torch.rand(count, SAMPLES, 1).argsort(1)
            x, y = x.gather(1, order), y.gather(1, order)
        for x_of, y_of in zip(x.split(BATCH, 1), y.split(BATCH, 1), strict=True):
            optimiser.zero_grad(set_to_none=True)
            made = torch.relu(torch.baddbmm(weights[1], x_of, weights[0])) @ weights[2] + weights[3]
            (made - y_of).square().mean((1, 2)).sum().backward()  # each network has a gradient of its own
            optimiser.step()
    arrays = [weight.detach().numpy() for weight in weights]
    networks = [[array[number] for array in arrays] for number in range(count)]
    return [networks[n : n + copies] for n in range(0, count, copies)]


def write(arrays: Sequence[np.ndarray], path: Path) -> None:
    """The network as an ONNX file with the input `x` and the output `y`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ("hidden.weight", "hidden.bias", "out.weight", "out.bias")
    constants = [array.reshape(-1) if "bias" in name else array for name, array in zip(names, arrays, strict=True)]
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", names[0], names[1]], ["z"], "hidden"),
            helper.make_node("Relu", ["z"], ["f"], "relu"),
            helper.make_node("Gemm", ["f", names[2], names[3]], ["y"], "out"),
        ],
        "sine",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1])],
        [numpy_helper.from_array(array, name) for array, name in zip(constants, names, strict=True)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)


def paths(seed: int, strategy: str, count: int) -> list[Path]:
    return [FOLDER / str(seed) / f"{strategy}{number}.onnx" for number in range(count)]


def prepare(seeds: Sequence[int]) -> None:
    """Train what is missing: for each seed three networks for 300 epochs and two for 900."""
    for strategy, copies, epochs, slower in STRATEGIES:
        missing = [seed for seed in seeds if not all(path.exists() for path in paths(seed, strategy, copies))]
        if missing:
            for seed, networks in zip(
                missing, train(missing, copies, epochs, slower, strategy == SHUFFLED), strict=True
            ):
                for arrays, path in zip(networks, paths(seed, strategy, copies), strict=True):
                    write(arrays, path)


def loss(path: Path, seed: int) -> float:
    """Mean squared error on the test samples, in onnxruntime."""
    x, y = test_samples(seed)
    (made,) = run(open_session(path.read_bytes(), threads=1), {"x": x}).values()
    return float(np.square(made - y).mean())


def merged(seed: int) -> Path:
    """The student of the seed's first two teachers."""
    folder = FOLDER / str(seed) / "student"
    x, y = samples(seed)
    np.savez(FOLDER / str(seed) / "samples.npz", x=x, labels=y)
    settings = GateSettings(
        gate_steps=150 * STEPS,
        steps=150 * STEPS,
        batch=BATCH,
        optimiser="sgd",
        rate=RATE,
        milestones=(2 / 3,),
        seed=seed,
        threads=1,
        measure=False,
    )
    teachers = paths(seed, "teacher", TEACHERS)[:2]
    gate_models(teachers, FOLDER / str(seed) / "samples.npz", folder, settings=settings, overwrite=True)
    return folder / "merged.onnx"


def measure(seed: int) -> dict[str, float]:
    """The test loss of every strategy for one seed."""
    teachers = [loss(path, seed) for path in paths(seed, "teacher", TEACHERS)]
    one, shuffled = (loss(paths(seed, strategy, 1)[0], seed) for strategy in ("long", SHUFFLED))
    student = merged(seed)
    return {
        "student": loss(student, seed),
        "before fine-tuning": loss(student.with_name("pruned.onnx"), seed),
        "the two teachers, mean": statistics.mean(teachers[:2]),
        "best of three": min(teachers),
        "one model": one,
        "one model, shuffled": shuffled,
    }


def show(found: Sequence[dict[str, float]]) -> None:
    rows = []
    for strategy in found[0]:
        losses = [own[strategy] for own in found]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        own = (min(losses), max(losses), statistics.median(losses), statistics.mean(losses), spread)
        paper = " / ".join(f"{x:.3f}" for x in PAPER[strategy]) if strategy in PAPER else ""
        rows.append([strategy, *(f"{x:.3f}" for x in own), paper])
    header = ["strategy", "min", "max", "median", "mean", "std", "paper: min / max / median / mean / std"]
    print(markdown.table(header, rows))
    print()
    for one in ("one model", "one model, shuffled"):
        below = sum(own["student"] < own[one] for own in found)
        print(f"The student's test loss is below that of {one} in {below} of {len(found)} seeds.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--finished", action="store_true", help="show what is in the cache, make nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = [FOLDER / str(seed) / "losses.json" for seed in range(options.seeds)]
    if not options.finished:
        prepare(range(options.seeds))
        for seed, path in enumerate(results):
            if not path.exists():
                write_text(path, json.dumps(measure(seed), indent=2) + "\n")
                print(seed, path.read_text(), flush=True)
    show([json.loads(path.read_text()) for path in results if path.exists()])


if __name__ == "__main__":
    main()
