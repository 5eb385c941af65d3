"""One training step of a graph as calibration runs it, against the same network written by hand in torch.

python benchmarks/training_step.py [--rounds 40] [--batch 64]

Forward, backward and one step of AdamW for a ResNet-20 and a MobileNetV1 on 32x32 images, in float32 and in bfloat16,
channels last for both. The two take turns; medians. A ratio of 1 says that the graph costs nothing.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import five_tasks
import markdown
import mobilenets
import torch
from torch import Tensor, nn

from onnxmerge.calibration.module import GraphModule
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


def seconds(network: nn.Module, images: Tensor, optimiser: torch.optim.Optimizer, bfloat16: bool, graph: bool) -> float:
    begun = time.perf_counter()
    optimiser.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        made = next(iter(network({"input": images}).values())) if graph else network(images)
        loss = made.float().square().mean()
    loss.backward()
    optimiser.step()
    return time.perf_counter() - begun


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
    sides = [(graph, graph.trainable(), True), (own, list(own.parameters()), False)]
    optimisers = [torch.optim.AdamW(parameters, 1e-4) for _, parameters, _ in sides]
    times: list[list[float]] = [[], []]
    for number in range(rounds + 3):
        for side, (network, _, is_graph) in enumerate(sides):
            taken = seconds(network, images, optimisers[side], bfloat16, is_graph)
            if number >= 3:
                times[side].append(taken)
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
    print(markdown.table(["network", "precision", "graph, ms", "by hand, ms", "throughput of the graph"], rows))


if __name__ == "__main__":
    main()
