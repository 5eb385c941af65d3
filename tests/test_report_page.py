"""The page, and that what was not measured is never a number."""

import base64
import hashlib
import re
import warnings
from collections import Counter
from xml.etree import ElementTree

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from reports import SCRIPT, Page, make_result, printed

from onnxmerge.report.columns import columns
from onnxmerge.report.figures import one_line
from onnxmerge.report.page import render_page
from onnxmerge.report.plots import plots
from onnxmerge.report.schema import (
    Candidate,
    LatencyRecord,
    MemoryRecord,
    Result,
    TaskScore,
)
from onnxmerge.report.summary import headline

ZERO = re.compile(r"[-+]?0(\.0*)?\s*(x|%|MB|ms)?")

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
    for candidate, name in zip(result.candidates, tasks, strict=False):
        candidate.name = name
    result.chosen = tasks[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = render_page(result)
    page = Page(text)
    plain = Page(render_page(make_result(["plain"], number=2)))
    assert page.scripts == plain.scripts == [SCRIPT]
    assert page.tags == plain.tags
    assert {name for name, _ in page.attributes} == {name for name, _ in plain.attributes}
    for task in tasks:
        assert one_line(task) in page.text
    drawn = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawn) == 5
    for svg in drawn:
        ElementTree.fromstring(svg)  # well-formed, whatever the names
    printed(result, 100)


def test_the_page_fetches_nothing_and_runs_one_script() -> None:
    text = render_page(make_result(["a", "b"]))
    page = Page(text)
    assert not page.tags & {"link", "iframe", "img", "object"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    references = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert references
    assert all(value.startswith("#") for value in references)
    assert all(reference.startswith("#") for reference in re.findall(r"url\(['\"]?(.)", text))
    assert "@import" not in text
    assert page.scripts == [SCRIPT]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    (policy,) = [value for name, value in page.attributes if name == "content" and "default-src" in value]
    assert policy.split("; ") == [
        *("default-src 'none'", "style-src 'unsafe-inline'", "img-src data:", f"script-src 'sha256-{digest}'"),
        *("base-uri 'none'", "form-action 'none'"),
    ]


def test_where_there_is_nothing_to_select_there_is_no_script() -> None:
    text = render_page(make_result(["a", "b"], number=1))
    assert Page(text).scripts == [] and "script-src" not in text
    nothing_chosen = make_result(["a", "b"], number=1)
    nothing_chosen.chosen = None
    assert Page(render_page(nothing_chosen)).scripts == [SCRIPT]


def test_without_its_script_the_page_shows_the_chosen_candidate() -> None:
    text = render_page(make_result(["a", "b"]))
    shown = re.findall(r'<div class="figures" data-candidate="(\d)" data-name="(\w+)"( hidden)?>', text)
    assert shown == [("0", "k1", " hidden"), ("1", "k2", " hidden"), ("2", "k3", ""), ("3", "k4", " hidden")]
    assert all(" hidden" in tag for tag in re.findall(r'<\w+ class="(?:muted hint|selection|tip)"[^>]*>', text))


def test_every_candidate_has_its_marks() -> None:
    text = render_page(make_result(["a", "b"], 60, 60))
    assert len(text.encode()) < 1_000_000
    marks = Counter(re.findall(r'<g class="mark" data-candidate="(\d+)">', text))
    assert marks == {str(number): 2 + 4 + 1 for number in range(60)}  # by sharing, by speed and size, calibration


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
    assert headline(result) == "fused was chosen, the only candidate."
    assert plots(result) == []
    assert "Plots" not in Page(render_page(result)).text
    empty = Result(method="fuse", versions={}, inputs=[], candidates=[], chosen=None)
    assert "No candidate was made." in render_page(empty)
    printed(empty, 80)
