"""The figures, the terminal table and the sentence that sums a result up."""

from io import StringIO

import pytest
from reports import make_result, printed
from rich.console import Console

from onnxmerge.report.columns import columns
from onnxmerge.report.figures import count, megabytes, one_line, points, significant
from onnxmerge.report.page import render_page
from onnxmerge.report.schema import (
    LatencyRecord,
)
from onnxmerge.report.summary import headline
from onnxmerge.report.tables import print_result


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (significant(0.0), "0.000"),
        (significant(0.0834), "0.083"),
        (significant(6.1e-7), "6e-07"),
        (significant(9.996), "10.0"),
        (significant(1234.5), "1234"),
        (count(812), "812"),
        (count(272_474), "272 k"),
        (count(999_900), "1.00 M"),
        (megabytes(1_105_000), "1.10"),
        (points(-0.0071), "-0.7"),
        (points(0.002), "+0.2"),
        (points(-0.0001), "0.0"),
        (one_line("a\n\tb\x00\ufffe"), "a b\ufffd\ufffd"),
    ],
)
def test_figures_are_written_as_promised(text: str, expected: str) -> None:
    assert text == expected


@pytest.mark.parametrize("width", [72, 80, 100, 140, 240])
@pytest.mark.parametrize("tasks", [["digits"], ["resnet20_cifar10", "resnet20_cifar100"], ["a", "b", "c", "d"]])
def test_table_fits_and_cuts_no_figure(tasks: list[str], width: int) -> None:
    result = make_result(tasks, number=9)
    lines = printed(result, width)
    assert max(map(len, lines)) <= width
    assert not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines)
    for candidate in result.candidates:
        (row,) = [line for line in lines if line.split()[:1] == [candidate.name]]
        assert ("*" in row) == (candidate.name == result.chosen)
        for score in candidate.tasks.values():
            assert score.drop is not None
            assert points(-score.drop) in row.split()
        assert f"{candidate.latency_ms.speedup:.2f}x" in row


def test_two_tasks_at_100_columns_show_what_decides() -> None:
    text = "\n".join(printed(make_result(["cifar10", "cifar100"]), 100))
    assert "A\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}cifar10 " in text
    for header in ("params", "acc%", "+/-", "agr%", "ratio", "speed", "steps", "mem."):
        assert header in text
    assert text.count("acc%") == 2 + 1  # one for each task, one in the key


def test_a_wide_table_has_every_column() -> None:
    result = make_result(["a", "b"])
    header = printed(result, 400)[2].split()
    assert len(header) == 1 + len(columns(result))


def test_print_result_adds_sentence_and_notes_verbatim() -> None:
    result = make_result(["[red]a[/red]", "b"])
    result.notes = ["Unit [bold]3[/bold] was not shared."]
    console = Console(width=300, file=StringIO())
    print_result(result, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert headline(result) in text
    assert "note: Unit [bold]3[/bold] was not shared." in text
    assert "[red]a[/red]" in text


def test_headline_says_what_was_saved_and_what_it_cost() -> None:
    result = make_result(["cifar10", "cifar100"])
    chosen = result.candidate("k3")
    drop = chosen.worst_drop
    assert drop is not None
    assert headline(result) == (
        "k3 was chosen, which shares 3 of 9 stem units between 2 tasks: 11 % smaller than the originals together "
        "(1.97 MB for 2.21 MB); 1.24 times as fast as the originals run separately; "
        f"worst accuracy change of {points(-drop)} points (cifar100)."
    )


def test_headline_without_labels_latency_or_choice() -> None:
    result = make_result(["a", "b"], labels=False)
    for candidate in result.candidates:
        candidate.latency_ms = LatencyRecord()
    assert "lowest agreement with an original of" in headline(result)
    assert "fast" not in headline(result)
    result.chosen = None
    assert headline(result).startswith("None of the 4 candidates stayed within the allowed drop; the mildest is k1,")
    result.candidates = []
    assert headline(result) == "No candidate was made."


def test_memory_on_a_gpu_has_a_column_where_it_was_measured() -> None:
    result = make_result(["a", "b"])
    assert "GPU" not in render_page(result).partition("Hardware")[0]
    for number, candidate in enumerate(result.candidates):
        candidate.memory_mb.device_merged, candidate.memory_mb.device_separate = 301.0 + number, 655.0
    page = render_page(result)
    assert "on the GPU, MB" in page and "303" in page and "655" in page
