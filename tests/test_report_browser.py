"""The page in a real browser, light and dark, wide and as narrow as a phone: what is seen, and what a pointer does."""

import base64
import hashlib
from pathlib import Path

import pytest
from browser import Seen, find_browser, look
from reports import SCRIPT, bench_result, make_result
from test_report_fuse import fused

from onnxmerge.report.page import render_page

BROWSER = find_browser()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on PATH")]

WIDTHS = (1280, 390)
SELECTED = 1
HEADINGS = {
    "zip": [
        *(
            "k3, the chosen candidate",
            "Notes",
            "Plots",
            "Quality against sharing",
            "Quality against speed and size",
            "What it costs to run",
        ),
        *("How alike the originals are", "Calibration", "All candidates", "Stem", "Files", "Recipe", "Versions"),
        *("Hardware", "How to read the terms"),
    ],
    "fuse": [
        *(
            "calibrated, the chosen candidate",
            "Plots",
            "Accuracy",
            "What it costs to run",
            "Layer map of shallow",
            "Calibration",
        ),
        *("All candidates", "Files", "How to read the terms"),
    ],
    "bench": [
        "Notes",
        "Plots",
        "What it costs to run",
        "All candidates",
        "Bounds",
        "Latency by batch size",
        "Files",
        "How to read the terms",
    ],
}
NAMES = {"zip": ("k3", "k2"), "fuse": ("calibrated", "heads"), "bench": (None, "small")}
"""The chosen candidate, and the one that is selected."""


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    results = {
        "zip": make_result(["digits", "a task of a_rather_long_name_that_no_line_of_a_phone_could_hold"], 9),
        "fuse": fused(),
        "bench": bench_result(),
    }
    return {name: render_page(result) for name, result in results.items()}


@pytest.fixture(scope="module", params=[False, True], ids=["light", "dark"])
def seen(request: pytest.FixtureRequest, pages: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Seen:
    assert BROWSER is not None
    folder = tmp_path_factory.mktemp("browser")
    found = look(BROWSER, pages, folder, widths=WIDTHS, dark=request.param, select=SELECTED)
    for (_, width), page in found.pages.items():
        assert (page["width"], page["dark"]) == (width, request.param)
    return found


def problems(seen: Seen, name: str, width: int, kind: str) -> dict[str, list[str]]:
    """What is wrong with a page, by what it is that is wrong."""
    page = seen.pages[name, width]
    found = {
        "missing": [h for h in HEADINGS[kind] if h not in [part["heading"] for part in page["parts"]]],
        "empty": [part["heading"] for part in page["parts"] if seen.is_empty((name, width), part["box"])],
        "wide": page["wide"],
        "covered": page["texts"]["covered"],
        "pale": page["texts"]["pale"],
        "overlapping": page["labels"]["overlapping"],
        "cut": page["labels"]["cut"],
        "fetched": page["fetched"],
        "behaviour": misbehaviour(page["seen"], *NAMES[kind]),
    }
    return {what: where for what, where in found.items() if where}


def misbehaviour(seen: dict, chosen: str | None, selected: str) -> list[str]:
    """The steps after which a reader does not see what pointing, clicking and typing are for."""

    def at_rest(state: dict) -> bool:
        heading = [] if chosen is None else [f"{chosen}, the chosen candidate"]
        return state["figures"] == heading and not (state["rows"] or state["marks"] or state["bar"] or state["tip"])

    def selects(state: dict) -> bool:
        told = [heading.split(",")[0] for heading in state["figures"]] == [selected] and state["bar"].startswith(
            f"{selected} is selected."
        )
        rows = len(state["rows"]) >= 1 and set(state["rows"]) == {selected}
        return told and rows and bool(state["values"]) and state["values"] != seen["begin"]["values"]

    checks = {
        "at first": at_rest(seen["begin"]),
        "row": selects(seen["row"]) and not seen["rowTexts"],
        "row, by keyboard": seen["rowStops"] == 1 and seen["buttonFocused"] and selects(seen["button"]),
        "back": at_rest(seen["end"]),
    }
    if chosen is not None:
        tip = seen["pointed"]["tip"]
        told = tip.startswith(selected) and all(value in tip for value in seen["clicked"]["values"])
        checks |= {
            "in its place": max(seen["strayed"]) < 1,
            "pointed": told and at_rest(seen["pointed"] | {"tip": ""}),
            "tip": not seen["pointedWide"] and not seen["pointedTexts"],
            "left": at_rest(seen["left"]),
            "clicked": selects(seen["clicked"]) and seen["clicked"]["marks"] == [selected],
            "back from the plot": at_rest(seen["back"]),
            "focused": seen["stops"] == 1 and seen["focused"]["tip"].startswith(chosen),
            "entered": selects(seen["entered"]) and seen["entered"]["tip"].startswith(selected),
            "escaped": selects(seen["escaped"]) and not seen["escaped"]["tip"],
        }
    return [step for step, right in checks.items() if not right]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", HEADINGS)
def test_the_page_is_whole_legible_and_answers_to_pointer_and_keys(seen: Seen, name: str, width: int) -> None:
    assert problems(seen, name, width, name) == {}
    page = seen.pages[name, width]
    assert page["texts"]["number"] > 100 and page["labels"]["number"] > 10  # texts and labels were measured


STYLED = {
    "empty": "figure svg { visibility: hidden }",
    "wide": "main { min-width: 3000px }",
    "covered": ".tiles { position: relative; top: -40px }",
    "pale": ":root { --muted: #a0a8b0 !important }",
    "overlapping": "figure svg text { font-size: 30px !important }",
    "cut": "figure svg text { transform: translateX(60px) }",
}
"""Styles that spoil a page, by the problem that they make."""
SCRIPTED = {
    "in its place": ("dot.style.transformOrigin", "dot.dataset.origin"),
    "pointed": ('addEventListener("pointermove"', 'addEventListener("none"'),
    "left": ('addEventListener("pointerdown"', 'addEventListener("none"'),
    "clicked": ("if (dot !== null) {\n        select(", "if (dot !== null) {\n        Number("),
    "focused": ('addEventListener("focus"', 'addEventListener("none"'),
    "entered": ('event.key === "Enter"', 'event.key === "F1"'),
    "escaped": ('event.key === "Escape"', 'event.key === "F1"'),
    "row": ('row.addEventListener("click"', 'row.addEventListener("none"'),
    "back": ("() => select(chosen)", "() => select(0)"),
}
"""Faults of the script, by the step that shows them."""


def test_a_spoilt_page_is_found_out(tmp_path: Path) -> None:
    good = render_page(fused())

    def spoilt(old: str, new: str) -> str:
        assert old in good
        return good.replace(old, new)

    def scripted(script: str) -> str:
        return good.replace(SCRIPT, script).replace(digest(SCRIPT), digest(script))

    def digest(script: str) -> str:
        return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

    pages = {what: spoilt("</style>", f"{style}</style>") for what, style in STYLED.items()}
    pages["missing"] = spoilt("<h2>Files</h2>", "")
    pages["fetched"] = spoilt("img-src data:", "img-src *").replace("</main>", '<img src="http://a.invalid/b"></main>')
    for step, (old, new) in SCRIPTED.items():
        assert old in SCRIPT
        pages[step.replace(" ", "-")] = scripted(SCRIPT.replace(old, new))
    pages["at-all"] = spoilt("const REACH = 24;", "const REACH = 25;")  # not the script that the policy lets run
    assert BROWSER is not None
    seen = look(BROWSER, pages, tmp_path, widths=(390,), dark=False, select=SELECTED)
    found = {name: problems(seen, name, 390, "fuse") for name in pages}
    for what in (*STYLED, "missing", "fetched"):
        assert what in found[what]
    for step in SCRIPTED:
        assert step in found[step.replace(" ", "-")]["behaviour"]
    assert {"pointed", "clicked", "entered", "row", "row, by keyboard"} <= set(found["at-all"]["behaviour"])
