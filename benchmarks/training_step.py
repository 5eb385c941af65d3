"""One training step of a graph in the training engine, against the same network and step written by hand in torch.

python benchmarks/training_step.py [--rounds 40] [--batch 64]

Forward, backward and one step of AdamW for a ResNet-20 and a MobileNetV1 on 32x32 images, in float32 and in bfloat16,
channels last for both; the engine also looks whether all gradients are numbers, and each array has a rate of its own.
The two take turns; medians. A ratio of 1 says that the engine costs nothing.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import five_tasks
import markdown
import mobilenets
import torch
from torch import Tensor, nn

import onnxmerge.calibration.engine as engine
from onnxmerge.calibration.module import GraphModule
from onnxmerge.calibration.settings import Training
from onnxmerge.ir.load import load
from onnxmerge.passes.fold_batch_norm import FoldBatchNorm


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


def by_hand(network: nn.Module, images: Tensor, optimiser: torch.optim.Optimizer, bfloat16: bool) -> float:
    """Take a step; its loss."""
    optimiser.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = network(images).float().square().mean()
    loss.backward()
    optimiser.step()
    return loss.item()


def ratio(build: nn.Module, rounds: int, batch: int, bfloat16: bool) -> list[str]:
    """Milliseconds of both, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        five_tasks.export(build.eval(), path)
        model = load(path)
    FoldBatchNorm()(model)
    graph = GraphModule(model)
    own = _Folded(build).to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    settings = Training(steps=rounds + 3, rate=1e-4, relative_rate=False, bfloat16=bfloat16)
    loop, optimiser = engine._Loop(_Shrinking(graph, images), settings), torch.optim.AdamW(own.parameters(), 1e-4)
    sides = (loop.advance, lambda _: by_hand(own, images, optimiser, bfloat16))
    times: list[list[float]] = [[], []]
    for number in range(1, rounds + 4):
        for side, step in enumerate(sides):
            begun = time.perf_counter()
            step(number)
            if number > 3:
                times[side].append(time.perf_counter() - begun)
    ours, theirs = (1e3 * statistics.median(own) for own in times)
    return [f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name, build in (("ResNet-20", five_tasks.residual_network), ("MobileNetV1", mobilenets.mobile_network)):
        for bfloat16 in (False, True):
            precision = "bfloat16" if bfloat16 else "float32"
            rows.append([name, precision, *ratio(build(10), options.rounds, options.batch, bfloat16)])
    print(markdown.table(["network", "precision", "engine, ms", "by hand, ms", "throughput of the engine"], rows))


if __name__ == "__main__":
    main()
