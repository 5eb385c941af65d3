"""Time and peak memory of each stage for the ResNet-20 pair: load, spaces, statistics and alignment, fuse.

Each stage runs in a process of its own, so that its peak is its own; the peak is the resident set's high-water mark.

    python benchmarks/stages.py
"""

import pickle
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import markdown
from datasets import SHARED, cifar

from onnxmerge.ir.spaces import find_spaces
from onnxmerge.methods.progress import Silent
from onnxmerge.methods.task import load_networks, with_data
from onnxmerge.methods.zip.alignment import align, find_sharable
from onnxmerge.methods.zip.choices import Start
from onnxmerge.methods.zip.fitting import Fitting
from onnxmerge.methods.zip.stems.stem import Stems
from onnxmerge.methods.zip.stems.tails import fit_tails
from onnxmerge.methods.zip.structure import Widths

MODELS = [SHARED / "models" / f"{name}.onnx" for name in ("resnet20_cifar10", "resnet20_cifar100")]
STAGES = ("nothing", "load", "spaces", "statistics and align", "fuse the stem, k = 4", "fit the tails, k = 4")


def measure(stage: str, folder: Path) -> None:
    """Run everything up to `stage` (untimed where it is stored), time `stage`, print seconds and peak MB."""
    wanted = STAGES.index(stage)
    begun = time.perf_counter()
    if wanted >= 1:
        networks = load_networks(MODELS)
    if wanted >= 2:
        begun = time.perf_counter()
        for network in networks:
            find_spaces(network.model)
    if wanted >= 3:
        tasks = with_data(networks, {n.name: cifar(labels=False) for n in networks}, seed=0)
        sharable = find_sharable(tasks)
        fitting = Fitting(2000, 0, None, folder, Silent())
        begun = time.perf_counter()
        stored = folder / "aligned.pickle"
        if wanted == 3 or not stored.exists():
            aligned = {tasks[1].name: align(sharable, tasks[1], tasks, samples=2000, seed=0, threads=None)}
            stored.write_bytes(pickle.dumps(aligned))
        else:
            aligned = pickle.loads(stored.read_bytes())
    if wanted == 4:
        begun = time.perf_counter()
        Stems(sharable, aligned, tasks, fitting).up_to(sharable.cuts[3], Start.SUBSPACE, Widths())
    if wanted == 5:
        stem = Stems(sharable, aligned, tasks, fitting).up_to(sharable.cuts[3], Start.AVERAGE, Widths())
        begun = time.perf_counter()
        fit_tails(sharable, tasks, stem, sharable.cuts[3], fitting)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"{time.perf_counter() - begun:.3f} {peak:.0f}")


def main() -> None:
    if len(sys.argv) == 3:
        measure(sys.argv[1], Path(sys.argv[2]))
        return
    cifar(labels=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            ran = subprocess.run([sys.executable, __file__, stage, folder], capture_output=True, text=True, check=True)
            seconds, peak = ran.stdout.split()
            rows.append([stage, f"{float(seconds):.2f}", peak])
    print(markdown.table(["stage", "seconds", "peak MB (process)"], rows))


if __name__ == "__main__":
    main()
