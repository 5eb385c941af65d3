"""The result as one HTML file that opens offline: styles, plots and one script inside, nothing fetched.

The page is complete without its script, which shows candidates other than the chosen one. The policy in its head lets
a browser run that script alone, known by its hash, and load nothing: a name that slipped through could do no harm.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from onnxmerge.report.batches import ALONE, COMPARED, EXPLAINED, batch_rows, compares
from onnxmerge.report.columns import QUALITY, Column, columns, other_rows
from onnxmerge.report.figures import count, megabytes, one_line, percent, points, significant, times
from onnxmerge.report.panels import base64_text, data_uri
from onnxmerge.report.plots import plots
from onnxmerge.report.recipe import as_yaml
from onnxmerge.report.schema import Candidate, Result, TaskScore
from onnxmerge.report.summary import (
    best_original,
    chosen_candidate,
    has_stem,
    headline,
    is_fused,
    original_bytes,
    task_names,
)

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Tile:
    """A key figure: what it is, its value, and what to compare it with."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class CandidateTable:
    """Some of the candidates' columns under one title."""

    title: str
    columns: list[Column]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Each group of columns with the number of its columns, in order."""
        runs = groupby(self.columns, key=lambda column: (column.task, column.group))
        return [(one_line(group), len(list(run))) for (_, group), run in runs]

    @property
    def has_separate(self) -> bool:
        """Whether the originals have figures here."""
        return any(column.separate is not None for column in self.columns)


def render_page(result: Result) -> str:
    """The text of `report.html`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    chosen = chosen_candidate(result)
    script = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
    return environment.get_template("page.html.jinja").render(
        result=result,
        title=" + ".join(one_line(task) for task in task_names(result)) or result.method,
        headline=headline(result),
        chosen=chosen,
        figures=[(candidate, _tile_rows(candidate, result)) for candidate in result.candidates],
        selectable=any(candidate.name != result.chosen for candidate in result.candidates),
        script=Markup(script),
        script_hash=base64_text(hashlib.sha256(script.encode()).digest()),
        plots=[(plot.title, plot.caption, Markup(plot.svg), plot.narrow) for plot in plots(result)],
        data_uri=data_uri,
        fused=is_fused(result),
        has_stem=has_stem(result),
        other_rows=other_rows,
        tables=_candidate_tables(columns(result)),
        batch_rows=batch_rows,
        compares=compares,
        batch_titles=(ALONE, COMPARED),
        batches_explained=EXPLAINED,
        recipe=as_yaml(result.recipe).rstrip() if result.recipe else "",
        hardware={
            key.replace("_gb", ", GB").replace("_", " "): _plain(value) for key, value in result.hardware.items()
        },
        count=count,
        megabytes=megabytes,
        name=one_line,
        percent=percent,
        significant=significant,
    )


def _tile_rows(candidate: Candidate, result: Result) -> list[tuple[str, list[Tile]]]:
    if is_fused(result):
        return [
            ("How it fares", _fused_tiles(candidate, result)),
            ("What it saves", _saving_tiles(candidate, result)),
        ]
    return [
        ("What it saves", _saving_tiles(candidate, result)),
        ("How it fares in each task", _task_tiles(candidate, result)),
    ]


def _saving_tiles(candidate: Candidate, result: Result) -> list[Tile]:
    """What the candidate costs beside the originals."""
    tiles = []
    if result.units:
        layers = f"{candidate.shared_layers} of {candidate.total_layers} layers"
        layers += "".join(f"; {group} {units} units" for group, units in candidate.branches.items())
        known = candidate.shared_layers is not None and candidate.total_layers is not None
        tiles.append(Tile("Shared units", f"{candidate.share} of {len(result.units)}", layers if known else ""))
    tiles.append(
        Tile("Size", f"{megabytes(candidate.bytes)} MB", _of(candidate.bytes, original_bytes(result), megabytes, " MB"))
    )
    originals = sum(record.parameters for record in result.inputs)
    tiles.append(Tile("Parameters", count(candidate.parameters), _of(candidate.parameters, originals, count)))
    latency, memory = candidate.latency_ms, candidate.memory_mb
    if latency.speedup is not None:
        both = latency.merged is not None and latency.separate is not None
        detail = f"{significant(latency.merged or 0)} ms for {significant(latency.separate or 0)} ms" if both else ""
        tiles.append(Tile("Speed-up", times(latency.speedup), detail))
    elif latency.merged is not None:
        tiles.append(Tile("Latency", f"{significant(latency.merged)} ms"))
    if memory.merged is not None:
        detail = _of(memory.merged, memory.separate, significant, " MB")
        tiles.append(Tile("Memory", f"{significant(memory.merged)} MB", detail))
    return tiles


def _task_tiles(candidate: Candidate, result: Result) -> list[Tile]:
    """How the candidate fares in each task, by the best figure there is."""
    tiles = []
    for task in task_names(result):
        score = candidate.tasks.get(task, TaskScore())
        agreement = None if score.agreement is None else f"agreement {percent(score.agreement)} %"
        error = None if score.relative_error is None else f"relative error {significant(score.relative_error)}"
        if score.accuracy is not None:
            change = None
            if score.original_accuracy is not None:
                difference = points(score.accuracy - score.original_accuracy)
                change = f"{difference} points from {percent(score.original_accuracy)} %"
            value, details = f"{percent(score.accuracy)} %", [change, agreement or error]
        elif score.agreement is not None:
            value, details = f"{percent(score.agreement)} %", ["top-1 agreement", error]
        elif score.relative_error is not None:
            value, details = significant(score.relative_error), ["relative error"]
        else:
            continue
        tiles.append(Tile(one_line(task), value, ", ".join(detail for detail in details if detail)))
    return tiles


def _fused_tiles(candidate: Candidate, result: Result) -> list[Tile]:
    """How the candidate fares beside the best original and the ensemble."""
    score, best, tiles = candidate.ensemble or TaskScore(), best_original(result), []
    if score.accuracy is not None:
        tiles.append(Tile("Accuracy", f"{percent(score.accuracy)} %"))
        if best is not None:
            change = points(score.accuracy - best[1])
            tiles.append(Tile("Best original", f"{percent(best[1])} %", f"{one_line(best[0])}; change {change} points"))
        if score.original_accuracy is not None:
            change = points(score.accuracy - score.original_accuracy)
            tiles.append(
                Tile("Ensemble of the originals", f"{percent(score.original_accuracy)} %", f"change {change} points")
            )
    if score.agreement is not None:
        tiles.append(Tile("Agreement with the ensemble", f"{percent(score.agreement)} %", "top-1"))
    elif score.relative_error is not None:
        tiles.append(Tile("Relative error", significant(score.relative_error), "to the ensemble"))
    return tiles


def _of(merged: Number, originals: Number | None, text: Callable[[Number], str], unit: str = "") -> str:
    """The merged model's figure as a ratio to the originals'; empty where there is nothing to compare."""
    return f"{times(merged / originals)} of {text(originals)}{unit}" if originals else ""


def _candidate_tables(found: list[Column]) -> list[CandidateTable]:
    """The columns as two tables that fit on a page: how well the tasks are done, and what that costs."""
    k = [column for column in found if column.group == "stem" and column.rank == 0]
    quality = [column for column in found if column.task or column.group in QUALITY]
    cost = [column for column in found if column not in quality]
    tables = [CandidateTable("Quality on held-out data", [*k, *quality] if quality else [])]
    tables.append(CandidateTable("Size, speed and memory", cost))
    return [table for table in tables if table.columns]


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
