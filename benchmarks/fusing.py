"""What the benchmarks of fuse on perceptrons share: the networks with their data, fused by one rule, and scored."""

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as oir
from mlps import mnist

from onnxmerge.methods.align import Pair, align_layers
from onnxmerge.methods.ensemble import Ensemble
from onnxmerge.methods.fuse.fusing import FuseOptions, fuse_networks
from onnxmerge.methods.measure import Judge
from onnxmerge.methods.progress import Silent
from onnxmerge.methods.task import Task, load_networks, with_data

DEEP, SHALLOW = (400, 200, 100, 50, 25), (400, 200, 100)
"""The hidden layers of CLAFusion's two perceptrons; OTFusion's are SHALLOW."""
THREADS = 1
"""For onnxruntime: layers this small gain nothing from more."""


def tasks(paths: Sequence[Path]) -> list[Task]:
    """The networks with all of MNIST."""
    networks = load_networks(paths)
    return with_data(networks, {network.name: mnist(60_000) for network in networks}, seed=0)


def accuracy(model: oir.Model, reference: Task) -> float:
    """In per cent, on the reference's held-out samples."""
    names = {reference.name: [value.name for value in model.graph.outputs]}
    with tempfile.TemporaryDirectory() as folder:
        return 100 * Judge([reference], Path(folder), THREADS, outputs=names).score(model)[reference.name].accuracy


def ensemble_accuracy(members: Sequence[Task]) -> float:
    """In per cent, of the mean prediction of all networks."""
    with tempfile.TemporaryDirectory() as folder:
        ensemble = Ensemble(members, [1.0] * len(members), Path(folder), THREADS)
        return 100 * ensemble.score(members[0].model).original_accuracy


def layer_map(reference: Task, other: Task) -> list[Pair]:
    """The map that the product takes (first: the reference's)."""
    return align_layers(reference, other, threads=THREADS).pairs


def fused(
    reference: Task, other: Task, pairs: Sequence[Pair], samples: int, threads: int = THREADS, **options: object
) -> float:
    """The accuracy of two networks fused into the first one's architecture."""
    settings = FuseOptions(samples=samples, threads=threads, **options)
    return accuracy(fuse_networks(reference, [other], [pairs], [1.0, 1.0], settings, Silent()), reference)


def spread(values: Sequence[float]) -> str:
    """Mean, deviation and range over seeds."""
    return f"{deviation(values)} ({min(values):.2f} to {max(values):.2f})"


def deviation(values: Sequence[float], digits: int = 2) -> str:
    """Mean and deviation over seeds."""
    around = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} +- {around:.{digits}f}"
