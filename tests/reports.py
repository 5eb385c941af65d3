"""Results to make pages and tables of, and what a reader sees of these."""

import math
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

from rich.console import Console

import onnxmerge.report
from onnxmerge.report.schema import (
    BatchLatency,
    BoundCheck,
    Candidate,
    InputRecord,
    LatencyRecord,
    LayerSimilarity,
    MemoryRecord,
    Result,
    TaskScore,
    Timing,
)
from onnxmerge.report.tables import result_table


def make_candidate(k: int, tasks: list[str], units: int, *, labels: bool = True) -> Candidate:
    """A candidate with the figures of a ResNet-20 pair: quality falls and speed rises with k."""
    drops = [0.0012 * k**1.8 * (1 + index) * 9 / units for index in range(len(tasks))]
    return Candidate(
        name=f"k{k}",
        share=k,
        path=f"k{k}.onnx",
        parameters=550_000 - 20_000 * k * 9 // units,
        bytes=2_210_000 - 80_000 * k * 9 // units,
        tasks={
            task: TaskScore(
                accuracy=0.813 - drop if labels else None,
                original_accuracy=0.813 if labels else None,
                agreement=0.97 - 2 * drop,
                relative_error=0.05 + 3 * drop,
            )
            for task, drop in zip(tasks, drops, strict=True)
        },
        latency_ms=LatencyRecord(merged=6.2 / (1 + 0.08 * k), separate=6.2, separate_default=9.4, speedup=1 + 0.08 * k),
        memory_mb=MemoryRecord(merged=12.3 - 0.2 * k, separate=17.9),
        steps=200,
        seconds=31.2,
        start="least-squares",
        shared_layers=2 * k + 1,
        total_layers=2 * units + 2,
        losses=[(step, 0.05 * k * (0.35 + 0.65 * math.exp(-step / 70))) for step in range(0, 201, 50)],
    )


def make_result(tasks: list[str], number: int = 4, units: int = 9, *, labels: bool = True) -> Result:
    return Result(
        method="zip",
        versions={"onnxmerge": "0.1.0", "python": "3.11.7"},
        inputs=[
            InputRecord(task=task, path=f"models/{i}.onnx", sha256=f"{i:064x}", parameters=275_000, bytes=1_105_000)
            for i, task in enumerate(tasks)
        ],
        candidates=[make_candidate(k, tasks, units, labels=labels) for k in range(1, number + 1)],
        chosen=f"k{min(3, number)}",
        recipe={"method": "zip", "share": "auto", "max_drop": 0.01, "seed": 7},
        hardware={"cpu": "a processor", "physical_cores": 2, "memory_gb": 25.3, "gpus": ["one", "two"]},
        similarity=[
            LayerSimilarity(
                unit=1 + layer // 2,
                layer=f"/layer{layer}/Conv",
                channels=16,
                correlation=0.6 - 0.02 * layer,
                correlation_unaligned=0.05,
                cka=0.8 - 0.02 * layer,
            )
            for layer in range(2 * units)
        ],
        units=[f"block {unit}" for unit in range(units)],
        notes=["Calibration of k4 stopped early."],
    )


def bench_result() -> Result:
    """Two merged models timed beside two originals at two batch sizes, with a bound kept and one broken."""

    def timing(p50: float, batch: int) -> Timing:
        return Timing(p50=p50, p90=1.1 * p50, p99=1.3 * p50, throughput=1000 * batch / p50, rounds=200)

    def candidate(name: str, p50: float, size: int) -> Candidate:
        batches = [
            BatchLatency(
                batch=batch,
                merged=timing(p50 * batch**0.8, batch),
                separate=timing(2.1 * batch**0.8, batch),
                separate_default=timing(3.4 * batch**0.8, batch),
                unshared=timing(2.2 * batch**0.8, batch),
                speedup=2.1 / p50,
                of_ideal=1.05 / p50,
            )
            for batch in (1, 8)
        ]
        latency = LatencyRecord(merged=p50, separate=2.1, separate_default=3.4, speedup=2.1 / p50)
        return Candidate(
            name=name,
            share=0,
            path=f"{name}.onnx",
            parameters=size // 4,
            bytes=size,
            tasks={},
            latency_ms=latency,
            memory_mb=MemoryRecord(merged=size / 1e5, separate=31.0),
            steps=0,
            seconds=3.0,
            batches=batches,
        )

    def check(of: str, speedup: float) -> BoundCheck:
        passed = speedup >= 1.6
        told = f"{of} is {speedup:.2f} times as fast, {'at least' if passed else 'less than'} 1.6."
        return BoundCheck(
            bound="min-speedup", of=of, limit=1.6, measured=speedup, passed=passed, told=told, seconds=0.1
        )

    checks = [check("large.onnx", 2.1 / 1.6), check("small.onnx", 2.1 / 1.2)]
    return Result(
        method="bench",
        versions={},
        inputs=make_result(["a", "b"]).inputs,
        candidates=[candidate("large", 1.6, 2_000_000), candidate("small", 1.2, 1_400_000)],
        chosen=None,
        notes=[checks[0].told],
        checks=checks,
    )


def printed(result: Result, width: int) -> list[str]:
    console = Console(width=width, file=StringIO())
    console.print(result_table(result, width))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


SCRIPT = (Path(onnxmerge.report.__file__).parent / "page.js").read_text(encoding="utf-8")
"""The only script a page may hold."""


class Page(HTMLParser):
    """What a browser would make of the page: tags, attributes, tables as rows of cell texts, scripts, other text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._in_cell = False
        self._in_script = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.extend((name, value or "") for name, value in attrs)
        if tag == "tr":
            self.rows.append([])
        if tag == "script":
            self.scripts.append("")
        self._in_script = tag == "script"
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data
            return
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data

    def cells_of(self, candidate: str) -> list[str]:
        """The candidate's cells in the quality and the cost table, without its name."""
        named = (candidate, f"{candidate} (chosen)")
        return [cell for row in self.rows if row[0] in named and "onnx" not in row[-1] for cell in row[1:]]
