import hashlib
import json
import math
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from onnxmerge.errors import UsageError
from onnxmerge.report import write
from onnxmerge.report.columns import columns
from onnxmerge.report.figures import count, megabytes, one_line, points, significant
from onnxmerge.report.page import render_page
from onnxmerge.report.plots import calibration, plots, quality_by_share, similarity, trade_off
from onnxmerge.report.provenance import hardware, library_versions, sha256
from onnxmerge.report.schema import (
    Candidate,
    InputRecord,
    LatencyRecord,
    LayerSimilarity,
    MemoryRecord,
    Result,
    TaskScore,
)
from onnxmerge.report.summary import headline
from onnxmerge.report.tables import print_result, result_table
from onnxmerge.report.write import write_report

ZERO = re.compile(r"[-+]?0(\.0*)?\s*(x|%|MB|ms)?")


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


def printed(result: Result, width: int) -> list[str]:
    console = Console(width=width, file=StringIO())
    console.print(result_table(result, width))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


class Page(HTMLParser):
    """What a browser would make of the page: tags, attributes, tables as rows of cell texts, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._in_cell = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.extend((name, value or "") for name, value in attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data

    def cells_of(self, candidate: str) -> list[str]:
        """The candidate's cells in the quality and the cost table, without its name."""
        named = (candidate, f"{candidate} (chosen)")
        return [cell for row in self.rows if row[0] in named and "onnx" not in row[-1] for cell in row[1:]]


# --- numbers -----------------------------------------------------------------------------------------------------


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


# --- the terminal table ------------------------------------------------------------------------------------------


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


# --- the sentence ------------------------------------------------------------------------------------------------


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


# --- what was not measured ---------------------------------------------------------------------------------------

maybe = st.none() | st.floats(0.3, 0.9)


@st.composite
def patchy_results(draw: st.DrawFn) -> Result:
    """Results in which any figure may be missing, and none is near zero."""
    result = make_result(["left", "right"], number=draw(st.integers(1, 3)))
    result.similarity = []
    for candidate in result.candidates:
        candidate.losses = []
        candidate.latency_ms = LatencyRecord(
            merged=draw(maybe), separate=draw(maybe), separate_default=draw(maybe), speedup=draw(maybe)
        )
        candidate.memory_mb = MemoryRecord(merged=draw(maybe), separate=draw(maybe))
        candidate.shared_layers = draw(st.none() | st.integers(10, 20))
        candidate.start = draw(st.none() | st.just("average"))
        for task in candidate.tasks:
            accuracy, original = draw(maybe), draw(maybe)
            if accuracy is not None and original is not None and abs(accuracy - original) < 0.01:
                accuracy += 0.05
            score = TaskScore(
                accuracy=accuracy, original_accuracy=original, agreement=draw(maybe), relative_error=draw(maybe)
            )
            candidate.tasks[task] = score
    return result


@pytest.mark.slow
@settings(max_examples=15, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(patchy_results())
def test_what_was_not_measured_is_never_a_number(result: Result) -> None:
    found = columns(result)
    for column in found:
        assert any(cell is not None for cell in column.cells)  # columns nobody measured are left out
    text = render_page(result)
    page = Page(text)
    tiles = re.findall(r'class="value">([^<]*)<', text)
    assert not [tile for tile in tiles if ZERO.fullmatch(tile)]
    lines = printed(result, 400)
    for row, candidate in enumerate(result.candidates):
        missing = sum(column.cells[row] is None for column in found)
        cells = page.cells_of(candidate.name)
        k_twice = any(column.task for column in found)  # k heads both HTML tables
        assert len(cells) == len(found) + k_twice
        assert cells.count("") == missing
        assert not [cell for cell in cells if ZERO.fullmatch(cell)]
        (line,) = [line for line in lines if line.split()[:1] == [candidate.name]]
        assert line.split().count("-") == missing
        assert not [cell for cell in line.split() if ZERO.fullmatch(cell)]
    for name, value in {
        "accuracy, %": "accuracy",
        "agreement, %": "agreement",
        "relative error": "relative_error",
    }.items():
        for task in ("left", "right"):
            known = [getattr(candidate.tasks[task], value) is not None for candidate in result.candidates]
            cells = [c.cells for c in found if c.task and c.group == task and c.title == name]
            assert [[cell is not None for cell in column] for column in cells] == ([known] if any(known) else [])


def test_a_measured_zero_is_shown() -> None:
    result = make_result(["a"], number=1)
    result.candidates[0].tasks["a"].relative_error = 0.0
    result.candidates[0].steps = 0
    assert {"0.000", "0"} <= set(Page(render_page(result)).cells_of("k1"))


# --- report.json -------------------------------------------------------------------------------------------------


def test_json_has_the_documented_keys_at_every_level() -> None:
    result = make_result(["a", "b"])
    result.candidates[0].latency_ms = LatencyRecord()
    stored = json.loads(result.to_json())
    contract = {"schema", "method", "versions", "inputs", "candidates", "chosen"}
    extras = {"recipe", "hardware", "similarity", "units", "notes"}
    assert set(stored) == contract | extras
    assert stored["schema"] == 1
    for record in stored["inputs"]:
        assert set(record) == {"task", "path", "sha256", "parameters", "bytes"}
    for candidate in stored["candidates"]:
        contract = {
            "name",
            "share",
            "path",
            "parameters",
            "bytes",
            "tasks",
            "latency_ms",
            "memory_mb",
            "steps",
            "seconds",
        }
        assert set(candidate) == contract | {"start", "shared_layers", "total_layers", "losses"}
        assert set(candidate["latency_ms"]) == {"merged", "separate", "separate_default", "speedup"}
        assert set(candidate["memory_mb"]) == {"merged", "separate"}
        for score in candidate["tasks"].values():
            assert set(score) == {"accuracy", "original_accuracy", "agreement", "relative_error"}
    assert list(stored["candidates"][0]["latency_ms"].values()) == [None] * 4
    assert Result.model_validate(stored) == result


# --- the page ----------------------------------------------------------------------------------------------------

NASTY_NAMES = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "</title></style><b>",
    "url(http://x.invalid)",
    "$\\frac{$",
    "_hidden",
    "{{ 7*7 }} [red]",
    "]]>&amp;",
    "任务\N{SKULL}\N{ZERO WIDTH JOINER}",
]


@pytest.mark.slow
@settings(max_examples=4, deadline=None, phases=(Phase.explicit, Phase.generate))
@example(NASTY_NAMES[:4])
@example(NASTY_NAMES[4:])
@given(st.lists(st.text(min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=3, unique_by=one_line))
def test_any_task_name_stays_text(tasks: list[str]) -> None:
    result = make_result(tasks, number=2)
    result.similarity = result.similarity[:4]
    result.notes = [f"{tasks[0]} was not shared."]
    result.units[0] = tasks[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = render_page(result)
    page = Page(text)
    plain = Page(render_page(make_result(["plain"], number=2)))
    assert page.tags == plain.tags
    assert {name for name, _ in page.attributes} == {name for name, _ in plain.attributes}
    for task in tasks:
        assert one_line(task) in page.text
    drawn = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawn) == 4
    for svg in drawn:
        ElementTree.fromstring(svg)  # well-formed, whatever the names
    printed(result, 100)


def test_the_page_fetches_nothing_and_runs_nothing() -> None:
    text = render_page(make_result(["a", "b"]))
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe", "img", "object"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    references = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert references
    assert all(value.startswith("#") for value in references)
    assert all(reference.startswith("#") for reference in re.findall(r"url\(['\"]?(.)", text))
    assert "@import" not in text


def test_the_page_tells_where_it_all_came_from() -> None:
    result = make_result(["a", "b"])
    text = Page(render_page(result)).text
    for fact in (
        headline(result),
        result.inputs[1].sha256,
        result.inputs[1].path,
        "max_drop: 0.01",
        "one, two",
        "3.11.7",
        result.notes[0],
        "session.force_spinning_stop=1",
    ):
        assert fact in text


def test_a_result_without_stem_or_figures_renders() -> None:
    bare = Candidate(name="fused", share=0, path=None, parameters=10, bytes=100, tasks={}, steps=0, seconds=1.5)
    result = Result(method="fuse", versions={}, inputs=[], candidates=[bare], chosen="fused")
    assert headline(result) == "fused was chosen."
    assert plots(result) == []
    assert "Plots" not in Page(render_page(result)).text
    empty = Result(method="fuse", versions={}, inputs=[], candidates=[], chosen=None)
    assert "No candidate was made." in render_page(empty)
    printed(empty, 80)


# --- the plots ---------------------------------------------------------------------------------------------------


def test_plots_are_deterministic_to_the_byte() -> None:
    first = render_page(make_result(["a", "b"]))
    program = (
        "import sys; from onnxmerge.report.schema import Result; from onnxmerge.report.page import render_page; "
        "sys.stdout.reconfigure(encoding='utf-8', newline=''); "
        "sys.stdout.write(render_page(Result.model_validate_json(sys.stdin.read())))"
    )
    other = subprocess.run(
        [sys.executable, "-c", program],
        input=make_result(["a", "b"]).to_json().encode(),
        capture_output=True,
        check=True,
    )
    assert other.stdout == first.encode()


@pytest.mark.parametrize(("number", "tasks"), [(2, 2), (25, 4)])
def test_every_plot_is_drawn_for_few_and_many_candidates(number: int, tasks: int) -> None:
    result = make_result([f"task {index}" for index in range(tasks)], number, units=25)
    drawn = plots(result)
    assert [plot.title for plot in drawn] == [
        "Quality against sharing",
        "Quality against speed and size",
        "How alike the originals are",
        "Calibration",
    ]
    for plot in drawn[:2]:
        texts = [element.text for element in ElementTree.fromstring(plot.svg).iter("{http://www.w3.org/2000/svg}text")]
        assert {f"task {index}" for index in range(tasks)} <= set(texts)
        assert "- - original 81.3 %" in texts
        assert "accuracy, %" in texts


def test_the_plotted_quality_is_the_best_figure_there_is() -> None:
    result = make_result(["a"], labels=False)
    plot = quality_by_share(result)
    assert plot is not None
    assert "agreement, %" in plot.svg
    assert "original" not in plot.svg
    for candidate in result.candidates:
        candidate.tasks["a"].agreement = None
    plot = quality_by_share(result)
    assert plot is not None
    assert "relative error" in plot.svg


def test_a_plot_without_figures_is_left_out() -> None:
    result = make_result(["a"])
    result.similarity = []
    for candidate in result.candidates:
        candidate.losses = []
        candidate.tasks = {"a": TaskScore()}
    assert [quality_by_share(result), trade_off(result), similarity(result), calibration(result)] == [None] * 4


def test_a_diverged_calibration_is_drawn() -> None:
    result = make_result(["a"], number=2)
    result.candidates[0].losses = [(0, 0.1), (50, math.inf), (100, math.nan)]
    result.similarity[0].correlation = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(plots(result)) == 4


def test_plots_leave_the_users_matplotlib_settings_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots(make_result(["a"], number=2))
    assert dict(matplotlib.rcParams) == before


# --- provenance and files ----------------------------------------------------------------------------------------


def test_versions_are_read_without_importing_the_libraries() -> None:
    program = (
        "import sys, json; from onnxmerge.report.provenance import library_versions; versions = library_versions(); "
        "print(json.dumps([versions, sorted({'torch', 'onnxruntime', 'onnx', 'scipy'} & set(sys.modules))]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    versions, imported = json.loads(done.stdout)
    assert versions == library_versions()
    assert imported == []
    assert {"onnxmerge", "python", "onnx", "onnx-ir", "numpy", "scipy", "torch"} <= set(versions)
    assert {"onnxruntime", "onnxruntime-gpu"} & set(versions)


def test_hardware_holds_only_what_is_known() -> None:
    found = hardware()
    assert set(found) <= {"cpu", "physical_cores", "logical_cores", "memory_gb", "platform", "gpus"}
    assert found["logical_cores"] >= 1
    assert all(found.values())
    json.dumps(found)


def test_sha256_of_a_file_longer_than_a_chunk(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert sha256(path) == hashlib.sha256(content).hexdigest()


def test_write_report_writes_both_files(tmp_path: Path) -> None:
    result = make_result(["a", "b"])
    write_report(result, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert Result.model_validate_json((tmp_path / "report.json").read_text(encoding="utf-8")) == result
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_page(result)


def test_write_report_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(result: Result) -> str:
        raise RuntimeError("no page")

    monkeypatch.setattr(write, "render_page", fail)
    with pytest.raises(RuntimeError):
        write_report(make_result(["a"]), tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"report\.json"):
        write_report(make_result(["a"]), tmp_path / "absent")
