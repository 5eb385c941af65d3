"""The result in the terminal: one row for each candidate, cut to the console's width."""

from string import ascii_uppercase

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxmerge.report.batches import EXPLAINED as BATCHES_EXPLAINED
from onnxmerge.report.batches import batch_rows, compares
from onnxmerge.report.columns import Column, columns, other_rows
from onnxmerge.report.figures import one_line, significant
from onnxmerge.report.schema import Candidate, Result
from onnxmerge.report.summary import headline, task_names

ORIGINALS = "originals"
BATCH_HEADERS = ("p50\nms", "p90\nms", "p99\nms", "samples\nper s", "speed\nup", "of\nideal")
UNMEASURED = "-"
GAP = 2
"""Spaces between columns."""
LONGEST_NAME = 24
EXPLAINED = {
    "acc%": "accuracy",
    "+/-": "change in points",
    "ens.\nagr%": "top-1 agreement with the ensemble of the originals",
    "agr%": "top-1 agreement",
    "err": "relative error",
    "speed\nup": "vs spin-stopped sessions",
}
"""What the shortest headers mean, by the column's `short`."""


def result_table(result: Result, width: int = 100) -> Table:
    """A table with one row for each candidate, the originals' row first and the chosen row marked.

    Columns nobody measured are left out. Where the rest is wider than `width` characters, the least telling columns go
    first (a classifier's relative error, shared layers, memory, ...); the HTML report has them all.

    Args:
        result: what a method returned.
        width: characters available.
    """
    tasks = task_names(result)
    letters = _letters(tasks)
    names = [one_line(c.name) + (" *" if c.name == result.chosen else "") for c in result.candidates]
    found = columns(result)
    others = [one_line(name) for name, _ in other_rows(result, found)]
    originals = ORIGINALS if len(result.inputs) != 1 else ORIGINALS.removesuffix("s")
    first = min(LONGEST_NAME, max(map(cell_len, [*names, *others, originals])))
    shown = _fit(found, width - first, letters)
    # The box puts one space between columns, the padding the rest of the gap.
    table = Table(box=box.SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    table.title, table.title_justify, table.title_style = _legend(letters, shown), "left", "none"
    table.caption, table.caption_justify, table.caption_style = _key(shown), "left", "dim"
    table.add_column(Text("\nname"), no_wrap=True, max_width=LONGEST_NAME)
    for column in shown:
        header = Text(_header(column, letters))
        table.add_column(header, justify="right", no_wrap=True, min_width=_width(column, letters))
    if any(column.separate is not None for column in shown):
        separate = [Text(column.separate or UNMEASURED) for column in shown]
        table.add_row(Text(originals), *separate, style="dim")
    for other, cells in other_rows(result, shown):
        table.add_row(Text(one_line(other)), *(Text(cell or UNMEASURED) for cell in cells), style="dim")
    for row, (candidate, name) in enumerate(zip(result.candidates, names, strict=True)):
        own = [Text(column.cells[row] or UNMEASURED) for column in shown]
        table.add_row(Text(name), *own, style="bold green" if candidate.name == result.chosen else None)
    return table


def print_result(result: Result, console: Console) -> None:
    """Print the table, one sentence that sums it up, and the notes."""
    console.print(result_table(result, console.width) if result.layer_map is None else layer_map_table(result))
    for candidate in result.candidates:
        if candidate.batches:
            console.print()
            console.print(batch_table(candidate, alone=len(result.candidates) == 1))
    console.print()
    console.print(Text(headline(result), style="bold"))
    for note in result.notes:
        console.print(Text(f"note: {note}"))


def batch_table(candidate: Candidate, *, alone: bool) -> Table:
    """Latency at each batch size; `alone`: no other candidate has a table, so that it needs no name."""
    rows = batch_rows(candidate)
    compared = compares(rows)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    table.title, table.title_justify, table.title_style = None if alone else one_line(candidate.name), "left", "none"
    table.add_column("\nbatch", justify="right", no_wrap=True)
    if compared:
        table.add_column("\nrun as", no_wrap=True)
        table.caption, table.caption_justify, table.caption_style = BATCHES_EXPLAINED, "left", "dim"
    for header in BATCH_HEADERS if compared else BATCH_HEADERS[:4]:
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        way = [row.way] if compared else []
        table.add_row(str(row.batch or ""), *way, *row.cells, style="dim" if row.batch is None else None)
    return table


def layer_map_table(result: Result) -> Table:
    """The pairs of a layer map, in the order of the networks."""
    found = result.layer_map
    assert found is not None
    first, second = (one_line(task) for task in task_names(result))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    for header in (first, second, "group"):
        table.add_column(Text(header), overflow="fold")
    for header in ("CKA", "cost", "channels"):
        table.add_column(header, justify="right", no_wrap=True)
    for pair in found.pairs:
        figures = [significant(pair.cka), significant(pair.cost)]
        figures.append(UNMEASURED if pair.correlation is None else significant(pair.correlation))
        names = [one_line(pair.first), one_line(pair.second), found.first[pair.place[0]].group]
        table.add_row(*(Text(cell) for cell in [*names, *figures]))
    table.caption = f"cost: {found.cost}; channels: mean correlation under their best assignment"
    table.caption_justify, table.caption_style = "left", "dim"
    return table


def _letters(tasks: list[str]) -> dict[str, str]:
    """A short name for each task, used in column headers; empty for a single task, which needs none."""
    if len(tasks) == 1:
        return {tasks[0]: ""}
    return {task: ascii_uppercase[i] if i < 26 else str(i + 1) for i, task in enumerate(tasks)}


def _legend(letters: dict[str, str], shown: list[Column]) -> Text | None:
    if any(column.others for column in shown) and not any(column.task for column in shown):
        return Text("* = chosen")  # the originals have rows of their own, and no column needs a letter
    named = [f"{letter} = {one_line(task)}" if letter else one_line(task) for task, letter in letters.items()]
    entries = [entry.replace(" ", "\N{NO-BREAK SPACE}") for entry in [*named, "* = chosen"]]
    return Text("   ".join(entries)) if named else None


def _key(shown: list[Column]) -> Text | None:
    present = {column.short for column in shown}
    meanings = [f"{short.replace(chr(10), ' ')}: {text}" for short, text in EXPLAINED.items() if short in present]
    return Text("; ".join(meanings)) if meanings else None


def _header(column: Column, letters: dict[str, str]) -> str:
    """Two lines, so that all headers end on the same one."""
    first, _, second = column.short.rpartition("\n")
    return f"{letters[column.group] if column.task else first}\n{second}"


def _fit(found: list[Column], width: int, letters: dict[str, str]) -> list[Column]:
    """Leave out the highest ranks until the columns fit into `width` characters."""
    shown = found
    while sum(_width(column, letters) + GAP for column in shown) > width:
        least = max(column.rank for column in shown)
        if least == 0:
            break
        shown = [column for column in shown if column.rank < least]
    return shown


def _width(column: Column, letters: dict[str, str]) -> int:
    texts = [*_header(column, letters).split("\n"), column.separate or UNMEASURED]
    return max(map(cell_len, [*texts, *(cell or UNMEASURED for cell in column.cells)]))
