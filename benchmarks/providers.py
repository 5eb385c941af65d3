"""Merged models on every provider that this machine has: the examples of zip and of pack beside their originals.

    python benchmarks/providers.py [--batch 1 8 32] [--threads N]

The examples: the two networks that ship with the package, zipped in closed form with all five units shared;
resnet20_cifar10 and resnet20_cifar100, zipped in closed form up to their heads; two ResNet-50s with one backbone,
packed (batches of up to 8: more take long on a CPU). Their originals run in sessions of their own whose threads stop
spinning, with onnxruntime's defaults, and side by side in one graph that shares nothing. *Of ideal* is the speed-up
over spin-stopped sessions divided by the number of originals. A provider that cannot open a session is named with its
reason.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import markdown
from pack import resnet50
from zip_resnet import MODELS, cifar

import onnxmerge
import onnxmerge.demo
from onnxmerge.errors import OnnxMergeError
from onnxmerge.methods.zip.choices import Start
from onnxmerge.report.schema import BatchLatency, Timing
from onnxmerge.runtime.session import PROVIDERS, open_session

DEMO = Path(onnxmerge.demo.__path__[0])
HEADER = ("example", "provider", "batch", "merged, ms (p50, p99)", "originals, ms", "with defaults, ms")
HEADER += ("one graph, nothing shared, ms", "samples a second", "speed-up", "over defaults", "of ideal")


def examples(folder: Path) -> Iterator[tuple[str, Path, list[Path], int]]:
    """What each is called, its file, the originals, and the largest batch."""
    models = [DEMO / f"{name}.onnx" for name in ("digits", "fashion")]
    data = {path.stem: path.with_suffix(".yaml") for path in models}
    yield "zip: demo, 5 of 5 units", zipped(models, data, "5", folder / "demo"), models, 32
    images = {path.stem: cifar(labels=False) for path in MODELS}
    yield "zip: ResNet-20 pair, 10 of 10 units", zipped(MODELS, images, "10", folder / "resnets"), MODELS, 32
    heads = [folder / f"head{number}.onnx" for number in range(2)]
    for number, (path, classes) in enumerate(zip(heads, (200, 100), strict=True)):
        resnet50(path, classes, number, keep_norms=False)
    onnxmerge.pack_models(heads, folder / "packed.onnx")
    yield "pack: two ResNet-50s", folder / "packed.onnx", heads, 8


def zipped(models: Sequence[Path], data: dict[str, Path], share: str, folder: Path) -> Path:
    settings = onnxmerge.ZipSettings(share=share, steps=0, start=(Start.SUBSPACE,), max_drop=None, measure=False)
    onnxmerge.zip_models(models, data, folder, settings=settings)
    return folder / "merged.onnx"


def row(batch: BatchLatency) -> list[object]:
    separate, default, unshared = (median(own) for own in (batch.separate, batch.separate_default, batch.unshared))
    return [
        batch.batch,
        f"{batch.merged.p50:.2f}, {batch.merged.p99:.2f}",
        separate,
        default,
        unshared,
        f"{batch.merged.throughput:,.0f}",
        f"{batch.speedup or 0:.2f}",
        "" if batch.separate_default is None else f"{batch.separate_default.p50 / batch.merged.p50:.2f}",
        f"{batch.of_ideal or 0:.2f}",
    ]


def median(timing: Timing | None) -> str:
    return "" if timing is None else f"{timing.p50:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    rows, absent = [], []
    with tempfile.TemporaryDirectory() as temporary:
        made = list(examples(Path(temporary)))
        for provider in PROVIDERS:
            try:
                open_session(made[0][1], providers=[provider])
            except OnnxMergeError as error:
                absent.append(f"{provider}: {error}")
                continue
            for name, merged, originals, largest in made:
                batches = [size for size in options.batch if size <= largest]
                result = onnxmerge.bench_models(
                    [merged], originals, batches=batches, providers=[provider], threads=options.threads
                )
                rows += [[name, provider, *row(batch)] for batch in result.candidates[0].batches]
                print(*rows[-len(batches) :], *result.notes, sep="\n", file=sys.stderr, flush=True)
    print(markdown.table(HEADER, rows))
    print(*absent, sep="\n")


if __name__ == "__main__":
    main()
