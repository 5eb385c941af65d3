"""One training step of a graph in the training engine, against the same network and step written by hand in torch.

python benchmarks/training_step.py [--rounds 40] [--batch 64] [--device cpu|cuda]

Forward, backward and one step of AdamW for a ResNet-20 and a MobileNetV1 on 32x32 images, in float32 and in bfloat16,
channels last for both; the engine also looks whether all gradients are numbers, and each array has a rate of its own.
The two take turns; medians. A ratio of 1 says that the engine costs nothing. On a GPU the clock is read when all is
done; where nvidia-smi is at hand a last column says for how much of its time the GPU computes while the engine trains.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import five_tasks
import markdown
import mobilenets
import torch
from torch import Tensor, nn

import onnxmerge.calibration.engine as engine
from onnxmerge.calibration.devices import chosen_device, computing
from onnxmerge.calibration.module import GraphModule
from onnxmerge.calibration.settings import Training
from onnxmerge.ir.load import load
from onnxmerge.passes.fold_batch_norm import FoldBatchNorm

STEPS = 1_000_000
"""Of the schedule, which must not end while a GPU is watched."""


class _Folded(nn.Module):
    """By hand, batch norms folded as in the graph: every convolution has a bias and no norm behind it."""

    def __init__(self, network: nn.Module):
        super().__init__()
        for module in list(network.modules()):
            for child, layer in list(module.named_children()):
                if isinstance(layer, nn.BatchNorm2d):
                    setattr(module, child, nn.Identity())
                elif isinstance(layer, nn.Conv2d) and layer.bias is None:
                    layer.bias = nn.Parameter(torch.zeros(layer.out_channels))
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 32, 32] -> [N, classes]"""
        return self.network(x)


class _Shrinking:
    """The problem (`engine.Problem`) of giving zero for some images."""

    terms: ClassVar[dict[str, float]] = {}

    def __init__(self, network: GraphModule, images: Tensor):
        self._network, self._images = network, images
        self.trained, self.samples = network.trainable_by_name(), len(images)

    def losses(self) -> Iterator[Tensor]:
        (made,) = self._network({"input": self._images}).values()
        yield made.float().square().mean()

    def skip(self, rounds: int) -> None: ...

    def judge(self) -> float:
        return 0.0

    def settle(self, step: int) -> None: ...


def by_hand(network: nn.Module, images: Tensor, optimiser: torch.optim.Optimizer, settings: Training) -> float:
    """Take a step; its loss."""
    optimiser.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        loss = network(images).float().square().mean()
    loss.backward()
    optimiser.step()
    return loss.item()


def now(device: torch.device) -> float:
    """Seconds, when all that was asked of `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def utilisation(step: Callable[[], object]) -> str:
    """Percent of its time that the GPU computes while `step` is taken again and again, for three seconds."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    asked = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=200", "-i", gpu]
    with subprocess.Popen(asked, stdout=subprocess.PIPE, text=True) as watching:
        begun = time.perf_counter()
        while time.perf_counter() - begun < 3:
            step()
        watching.terminate()
        told = [int(line) for line in watching.communicate()[0].split() if line.isdigit()]
    return f"{statistics.median(told[len(told) // 2 :]):.0f} %" if told else ""


def ratio(build: nn.Module, rounds: int, batch: int, settings: Training, device: torch.device) -> list[str]:
    """Milliseconds of both, and their ratio; of a GPU also how busy the engine keeps it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        five_tasks.export(build.eval(), path)
        model = load(path)
    FoldBatchNorm()(model)
    graph = GraphModule(model).to(device)
    own = _Folded(build).to(device, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, 32, 32).to(device, memory_format=torch.channels_last)
    loop, optimiser = engine._Loop(_Shrinking(graph, images), settings), torch.optim.AdamW(own.parameters(), 1e-4)
    sides = (loop.advance, lambda _: by_hand(own, images, optimiser, settings))
    times: list[list[float]] = [[], []]
    for number in range(1, rounds + 4):
        for side, step in enumerate(sides):
            begun = now(device)
            step(number)
            if number > 3:
                times[side].append(now(device) - begun)
    ours, theirs = (1e3 * statistics.median(own) for own in times)
    row = [f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}"]
    return [*row, utilisation(lambda: loop.advance(rounds + 3))] if is_watched(device) else row


def is_watched(device: torch.device) -> bool:
    """Whether somebody knows how busy it is."""
    return device.type == "cuda" and shutil.which("nvidia-smi") is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    device, rows = chosen_device(options.device), []
    for name, build in (("ResNet-20", five_tasks.residual_network), ("MobileNetV1", mobilenets.mobile_network)):
        for precision in ("float32", "bfloat16"):
            how = Training(steps=STEPS, rate=1e-4, relative_rate=False, precision=precision)
            with computing(None):
                rows.append([name, precision, *ratio(build(10), options.rounds, options.batch, how, device)])
    columns = ["network", "precision", "engine, ms", "by hand, ms", "throughput of the engine"]
    print(markdown.table([*columns, "GPU busy"] if is_watched(device) else columns, rows))


if __name__ == "__main__":
    main()
