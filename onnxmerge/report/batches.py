"""Latency at each batch size as rows of text, one source for the terminal table and the HTML table."""

from dataclasses import dataclass

from onnxmerge.report.figures import percent, significant, times
from onnxmerge.report.schema import BatchLatency, Candidate, Timing

WAYS = {
    "merged": "merged",
    "separate": "originals",
    "separate_default": "originals, default",
    "unshared": "originals, one graph",
}
"""Fields of `BatchLatency`, and what readers are told."""
EXPLAINED = (
    "originals: one after the other in spin-stopped sessions; default: in sessions with onnxruntime's defaults; "
    "one graph: side by side, nothing shared; speed-up: of the merged model over these; "
    "of ideal: the speed-up over the number of originals"
)
ALONE, COMPARED = ("p50, ms", "p90, ms", "p99, ms", "samples per s"), ("speed-up", "of ideal")
"""Titles of a row's cells; those of `COMPARED` only where there are originals."""


@dataclass(frozen=True)
class BatchRow:
    """One way of running one batch size.

    Attributes:
        batch: its size; None where the row above says it.
        way: one of `WAYS`.
        cells: a text for each title of `ALONE`, and of `COMPARED` where there are originals.
        share: p50 as a share of the slowest way's.
    """

    batch: int | None
    way: str
    cells: list[str]
    share: float


def batch_rows(candidate: Candidate) -> list[BatchRow]:
    """The rows of a candidate, batch by batch: the merged model, then what it is compared with."""
    return [row for found in candidate.batches for row in _rows(found)]


def _rows(found: BatchLatency) -> list[BatchRow]:
    ways: dict[str, Timing] = {way: own for way in WAYS if (own := getattr(found, way)) is not None}
    slowest = max(timing.p50 for timing in ways.values())
    rows: list[BatchRow] = []
    for way, timing in ways.items():
        cells = [significant(figure) for figure in (timing.p50, timing.p90, timing.p99, timing.throughput)]
        if len(ways) > 1:
            speedup = "" if way == "merged" else times(timing.p50 / found.merged.p50)
            ideal = f"{percent(found.of_ideal)}%" if way == "separate" and found.of_ideal is not None else ""
            cells += [speedup, ideal]
        rows.append(BatchRow(None if rows else found.batch, WAYS[way], cells, timing.p50 / slowest))
    return rows


def compares(rows: list[BatchRow]) -> bool:
    """Whether there are originals to compare with."""
    return any(row.batch is None for row in rows)
