"""resnet20_cifar10 + resnet20_cifar100, calibrated on CIFAR-10 images without labels.

python benchmarks/zip_resnet.py sequence --steps 100     the full sequence k = 0..10, with latency
python benchmarks/zip_resnet.py three --steps 0 1000     conv1 and 3 of 9 blocks shared; six: 6 of 9
python benchmarks/zip_resnet.py goal --steps 6000        5 of 9, from 200 000 mirrored and moved images, with latency
python benchmarks/zip_resnet.py yardstick                how much independent networks agree
"""

import argparse
from pathlib import Path

import markdown
import numpy as np
import onnx_ir as oir
import torch
from datasets import CACHE, SHARED, cifar, moved_cifar

import onnxmerge
from onnxmerge.calibration.module import GraphModule
from onnxmerge.methods.zip.choices import Start
from onnxmerge.report.schema import Candidate, Result
from onnxmerge.runtime.session import open_session, run

TEN, HUNDRED = "resnet20_cifar10", "resnet20_cifar100"
SHARES = {"sequence": "auto", "three": "4", "six": "7", "goal": "6"}
MODELS = [SHARED / "models" / f"{name}.onnx" for name in (TEN, HUNDRED)]


def zipped(
    share: str, steps: int, seed: int, start: Start, folder: str, *, measure: bool, moved: bool = False
) -> Result:
    images, labelled = (moved_cifar(),) * 2 if moved else (cifar(labels=False), cifar(labels=True))
    samples = 8000 if moved else 2000
    settings = onnxmerge.ZipSettings(
        share=share, steps=steps, seed=seed, measure=measure, start=(start,), max_drop=None, samples=samples
    )
    # the CIFAR-10 network reads the same images with labels, so that its accuracy is known; no step trains with them
    return onnxmerge.zip_models(
        MODELS, {TEN: labelled, HUNDRED: images}, CACHE / folder, settings=settings, resume=True
    )


def row(candidate: Candidate) -> list[object]:
    ten, hundred = candidate.tasks[TEN], candidate.tasks[HUNDRED]
    latency = candidate.latency_ms
    drop = (ten.original_accuracy or 0) - (ten.accuracy or 0)
    return [
        candidate.share,
        candidate.start or "",
        candidate.steps,
        markdown.percent(ten.accuracy),
        f"{100 * drop:+.2f}",
        markdown.percent(ten.agreement, 1),
        markdown.percent(hundred.agreement, 1),
        f"{candidate.bytes / 1e6:.2f}",
        "" if latency.merged is None else f"{latency.merged:.2f}",
        "" if latency.separate is None else f"{latency.separate:.2f}",
        "" if latency.separate_default is None else f"{latency.separate_default:.2f}",
        "" if latency.speedup is None else f"{latency.speedup:.2f}",
        f"{torch_difference(candidate):.1e}",
        f"{candidate.seconds:.0f}",
    ]


HEADER = [
    *("k", "start", "steps", "C10 acc %", "drop", "C10 agree %", "C100 agree %", "MB"),
    *("merged ms", "separate ms", "separate default ms", "speed-up", "ORT - torch", "seconds"),
]


def torch_difference(candidate: Candidate) -> float:
    """Largest difference between the written model in onnxruntime and in torch, over the largest output."""
    assert candidate.path is not None
    with np.load(cifar(labels=False)) as data:
        images = data["test_input"][:64]
    session = open_session(Path(candidate.path))
    expected = run(session, {"input": images}, [o.name for o in session.get_outputs()])
    with torch.no_grad():
        found = GraphModule(oir.load(candidate.path))({"input": torch.from_numpy(images)})
    return max(float(np.abs(found[n].numpy() - e).max() / np.abs(e).max()) for n, e in expected.items())


def yardstick() -> None:
    """Top-1 agreement of independently trained networks of one task on the CIFAR-10 test images."""
    with np.load(cifar(labels=False)) as data:
        images = data["test_input"]
    rows = []
    for task in ("cifar10", "cifar100"):
        named = {}
        for depth in (8, 14, 20):
            session = open_session(SHARED / "models" / f"resnet{depth}_{task}.onnx")
            batches = np.array_split(images, 40)
            named[depth] = np.concatenate([run(session, {"input": b}, ["output"])["output"].argmax(1) for b in batches])
        rows += [
            [task, f"resnet{a} ~ resnet{b}", markdown.percent(float((named[a] == named[b]).mean()), 1)]
            for a, b in ((8, 14), (8, 20), (14, 20))
        ]
    print(markdown.table(["task", "networks", "agree %"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["sequence", "three", "six", "goal", "yardstick"])
    parser.add_argument("--steps", type=int, nargs="+", default=[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--start", type=Start, choices=list(Start), default=Start.SUBSPACE)
    options = parser.parse_args()
    if options.what == "yardstick":
        yardstick()
        return
    share, measure = SHARES[options.what], options.what in ("sequence", "goal")
    rows = []
    for steps in options.steps:
        for seed in range(options.seeds):
            folder = f"resnet-{options.start}-{options.what}-{steps}-{seed}"
            goal = options.what == "goal"
            result = zipped(share, steps, seed, options.start, folder, measure=measure, moved=goal)
            rows += [[seed, *row(candidate)] for candidate in result.candidates]
            print(markdown.table(["seed", *HEADER], rows), flush=True)


if __name__ == "__main__":
    main()
