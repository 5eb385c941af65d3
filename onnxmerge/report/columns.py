"""The candidates' figures as columns of text, one source for the terminal table and the HTML table."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from onnxmerge.report.figures import count, megabytes, percent, points, significant, times
from onnxmerge.report.schema import Candidate, Result, TaskScore
from onnxmerge.report.summary import best_original, ensemble_accuracy, has_stem, is_fused, original_bytes, task_names

Figure = TypeVar("Figure", int, float, str)
QUALITY = ("held-out samples", "ensemble")
"""Groups of columns that tell quality for all originals together."""


@dataclass(frozen=True)
class Column:
    """One figure of every candidate.

    Attributes:
        group: what it belongs to ("size", "latency", ...); for a task's figure, the task's name.
        title: its name in full, with the unit.
        short: its name in at most two lines of a few characters.
        cells: one text for each candidate; None where it was not measured.
        separate: the same figure of the originals used separately; None where there is no such thing.
        others: the same figure of each of `Result.originals` and of their ensemble; empty where none has it.
        rank: how soon a narrow table does without it; 0 stays always.
        task: whether `group` is a task's name.
    """

    group: str
    title: str
    short: str
    cells: list[str | None]
    separate: str | None = None
    rank: int = 0
    task: bool = False
    others: tuple[str | None, ...] = ()


def other_rows(result: Result, shown: list[Column]) -> list[tuple[str, list[str | None]]]:
    """Name and cells of what has a row beside the candidates: of networks of one task each original, their ensemble.

    Rows without a figure in `shown` are left out.
    """
    names = [*result.originals, "ensemble"] if result.originals else []
    rows = [(name, [c.others[n] if c.others else None for c in shown]) for n, name in enumerate(names)]
    return [(name, cells) for name, cells in rows if any(cell is not None for cell in cells)]


def columns(result: Result) -> list[Column]:
    """All columns with at least one figure, in reading order."""
    if is_fused(result):
        found = [*_against_ensemble(result), *_size(result)]
        if _one_sample_set(result):
            found.extend(_agreement(result, task) for task in task_names(result))
        else:
            found.extend(column for task in task_names(result) for column in _task(result, task))
    else:
        found = [*(_stem(result) if has_stem(result) else []), *_size(result)]
        for task in task_names(result):
            found.extend(_task(result, task))
    found.extend([*_latency(result), *_memory(result), *_calibration(result)])
    return [column for column in found if any(cell is not None for cell in column.cells)]


def _cells(
    result: Result, figure: Callable[[Candidate], Figure | None], text: Callable[[Figure], str]
) -> list[str | None]:
    values = [figure(candidate) for candidate in result.candidates]
    return [None if value is None else text(value) for value in values]


def _stem(result: Result) -> list[Column]:
    found = []
    shared = [f"{c.share}/{len(result.units)}" if result.units else str(c.share) for c in result.candidates]
    if result.units or any(c.share for c in result.candidates):
        found.append(Column("stem", "k", "k", list(shared)))
    groups = [", ".join(f"{group} {units}" for group, units in c.branches.items()) or None for c in result.candidates]
    found.append(Column("stem", "groups", "groups", groups, rank=5))
    layers: list[str | None] = [
        None if c.shared_layers is None else str(c.shared_layers) + (f"/{c.total_layers}" if c.total_layers else "")
        for c in result.candidates
    ]
    if layers != shared:  # where every unit is one layer, k says it already
        found.append(Column("stem", "layers", "layers", layers, rank=5))
    return found


def _against_ensemble(result: Result) -> list[Column]:
    """Quality on all held-out samples, where one task has several originals."""
    scores = [candidate.ensemble or TaskScore() for candidate in result.candidates]
    originals = list(result.originals.values())
    best, ensemble = best_original(result), ensemble_accuracy(result)
    classifier = any(score.agreement is not None for score in scores)

    def column(
        group: str, title: str, short: str, of: Callable[[TaskScore], float | None], own: float | None, rank: int
    ) -> Column:
        text = {"+/-": points, "err": significant}.get(short, percent)

        def write(figures: list[float | None]) -> list[str | None]:
            return [None if figure is None else text(figure) for figure in figures]

        others = tuple(write([*map(of, originals), own])) if originals else ()
        return Column(group, title, short, write([of(score) for score in scores]), rank=rank, others=others)

    def change(score: TaskScore) -> float | None:
        return None if score.accuracy is None or best is None else score.accuracy - best[1]

    gap = None if ensemble is None or best is None else ensemble - best[1]
    return [
        column(QUALITY[0], "accuracy, %", "acc%", lambda s: s.accuracy, ensemble, 1),
        column(QUALITY[0], "change, points", "+/-", change, gap, 0),
        column(QUALITY[1], "agreement, %", "ens.\nagr%", lambda s: s.agreement, None, 0),
        column(QUALITY[1], "relative error", "err", lambda s: s.relative_error, None, 6 if classifier else 0),
    ]


def _one_sample_set(result: Result) -> bool:
    """Whether every candidate has one accuracy for all originals: they are scored on the same samples."""
    return all(len({score.accuracy for score in c.tasks.values()}) <= 1 for c in result.candidates)


def _agreement(result: Result, task: str) -> Column:
    cells = _cells(result, lambda c: c.tasks.get(task, TaskScore()).agreement, percent)
    return Column(task, "agreement, %", "agr%", cells, rank=5, task=True)


def _size(result: Result) -> list[Column]:
    total = original_bytes(result)
    parameters = sum(record.parameters for record in result.inputs)
    size = None if total is None else megabytes(total)
    ratios = _cells(result, lambda c: None if total is None else c.bytes / total, times)
    inputs = {record.task: record for record in result.inputs}
    own = [inputs.get(task) for task in result.originals]
    counts = (*(None if record is None else count(record.parameters) for record in own), None) if own else ()
    sizes = (*(None if record is None else megabytes(record.bytes) for record in own), None) if own else ()
    return [
        Column(
            "size",
            "parameters",
            "params",
            _cells(result, lambda c: c.parameters, count),
            count(parameters),
            3,
            others=counts,
        ),
        Column("size", "MB", "size\nMB", _cells(result, lambda c: c.bytes, megabytes), size, 2, others=sizes),
        Column("size", "of the originals", "size\nratio", ratios, times(1)),
    ]


def _task(result: Result, task: str) -> list[Column]:
    scores = [candidate.tasks.get(task, TaskScore()) for candidate in result.candidates]
    original = next((score.original_accuracy for score in scores if score.original_accuracy is not None), None)
    labelled = any(score.accuracy is not None for score in scores)
    classifier = any(score.agreement is not None for score in scores)

    def column(
        title: str, short: str, figures: list[float | None], text: Callable[[float], str], rank: int, of: str | None
    ) -> Column:
        cells = [None if figure is None else text(figure) for figure in figures]
        return Column(task, title, short, cells, of, rank, task=True)

    changes = [
        None if s.accuracy is None or s.original_accuracy is None else s.accuracy - s.original_accuracy for s in scores
    ]
    known = None if original is None else percent(original)
    changed = any(change is not None for change in changes)
    return [
        column("accuracy, %", "acc%", [s.accuracy for s in scores], percent, 1 if changed else 0, known),
        column("change, points", "+/-", changes, points, 0, None),
        column("agreement, %", "agr%", [s.agreement for s in scores], percent, 2 if labelled else 0, None),
        column("relative error", "err", [s.relative_error for s in scores], significant, 6 if classifier else 0, None),
    ]


def _latency(result: Result) -> list[Column]:
    records = [candidate.latency_ms for candidate in result.candidates]
    separate = [record.separate for record in records if record.separate is not None]
    default = [record.separate_default for record in records if record.separate_default is not None]
    # Each candidate is timed beside the originals anew, so the originals' row takes the median of these.
    originals = significant(statistics.median(separate)) if separate else None
    unit = times(1) if separate else None
    found = [
        Column("latency", "ms", "time\nms", _cells(result, lambda c: c.latency_ms.merged, significant), originals, 3),
        Column("latency", "speed-up", "speed\nup", _cells(result, lambda c: c.latency_ms.speedup, times), unit),
    ]
    if default:
        cells = _cells(result, lambda c: c.latency_ms.separate_default, significant)
        median = significant(statistics.median(default))
        found.append(Column("latency", "separate default, ms", "dflt\nms", cells, median, 7))
    return found


def _memory(result: Result) -> list[Column]:
    records = [candidate.memory_mb for candidate in result.candidates]

    def column(title: str, short: str, merged: list[float | None], separate: list[float | None]) -> Column:
        known = [value for value in separate if value is not None]
        cells = [None if value is None else significant(value) for value in merged]
        return Column("memory", title, short, cells, significant(statistics.median(known)) if known else None, 4)

    found = [column("MB", "mem.\nMB", [own.merged for own in records], [own.separate for own in records])]
    if any(own.device_merged is not None for own in records):
        merged, separate = [own.device_merged for own in records], [own.device_separate for own in records]
        found.append(column("on the GPU, MB", "GPU\nMB", merged, separate))
    return found


def _calibration(result: Result) -> list[Column]:
    return [
        Column("calibration", "start", "start", _cells(result, lambda c: c.start, str), rank=8),
        Column("calibration", "steps", "steps", _cells(result, lambda c: c.steps, str), rank=4),
        Column("calibration", "seconds", "secs", _cells(result, lambda c: c.seconds, significant), rank=7),
    ]
