"""The page in a real browser, light and dark, wide and as narrow as a phone: what is seen, and what a pointer does."""

import pytest
from browser import Seen, find_browser, look
from reports import bench_result, make_result
from test_report_fuse import fused

from onnxmerge.report.page import render_page

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on PATH")

WIDTHS = (1280, 390)
SELECTED = 1
HEADINGS = {
    "zip": [
        *("k3, the chosen candidate", "Notes", "Plots", "Quality against sharing", "Quality against speed and size"),
        *("How alike the originals are", "Calibration", "All candidates", "Stem", "Files", "Recipe", "Versions"),
        *("Hardware", "How to read the terms"),
    ],
    "fuse": [
        *("calibrated, the chosen candidate", "Plots", "Accuracy", "Layer map of shallow", "Calibration"),
        *("All candidates", "Files", "How to read the terms"),
    ],
    "bench": ["Notes", "All candidates", "Bounds", "Latency by batch size", "Files", "How to read the terms"],
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


def problems(seen: Seen, name: str, width: int) -> dict[str, list[str]]:
    """What is wrong with a page, by what it is that is wrong."""
    page = seen.pages[name, width]
    found = {
        "missing": [h for h in HEADINGS[name] if h not in [part["heading"] for part in page["parts"]]],
        "empty": [part["heading"] for part in page["parts"] if seen.is_empty((name, width), part["box"])],
        "wide": page["wide"],
        "covered": page["texts"]["covered"],
        "pale": page["texts"]["pale"],
        "overlapping": page["labels"]["overlapping"],
        "cut": page["labels"]["cut"],
        "fetched": page["fetched"],
        "behaviour": misbehaviour(page["seen"], *NAMES[name]),
    }
    return {what: where for what, where in found.items() if where}


def misbehaviour(seen: dict, chosen: str | None, selected: str) -> list[str]:
    """The steps after which a reader does not see what pointing, clicking and typing are for."""

    def at_rest(state: dict) -> bool:
        heading = [] if chosen is None else [f"{chosen}, the chosen candidate"]
        return state["figures"] == heading and not (state["rows"] or state["marks"] or state["bar"] or state["tip"])

    def selects(state: dict) -> bool:
        (heading,) = state["figures"]
        told = heading.split(",")[0] == selected and state["bar"].startswith(f"{selected} is selected.")
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
    assert problems(seen, name, width) == {}
    page = seen.pages[name, width]
    assert page["texts"]["number"] > 100  # texts were measured, and labels, where there are plots
    assert (page["labels"]["number"] > 10) == (name != "bench")
