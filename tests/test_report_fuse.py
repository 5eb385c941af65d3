"""The report of a fuse: originals, their ensemble and candidates beside each other, and none of zip's words."""

import json
import re
from xml.etree import ElementTree

import pytest
from reports import SCRIPT, Page, make_result, printed

from onnxmerge.report.columns import columns
from onnxmerge.report.page import render_page
from onnxmerge.report.plots import plots
from onnxmerge.report.schema import Candidate, InputRecord, LatencyRecord, LayerLink, LayerLinks, Result, TaskScore
from onnxmerge.report.summary import headline

ENSEMBLE = 0.98
ORIGINALS = {"deep": 0.965, "shallow": 0.97}
CANDIDATES = {"least-squares-mean": 0.972, "heads": 0.961, "calibrated": 0.974}
AGREEMENT = {"deep": 0.9712, "shallow": 0.9813, "least-squares-mean": 0.9914, "heads": 0.9612, "calibrated": 0.9916}


def fused(*, labels: bool = True, classes: bool = True, steps: int = 50) -> Result:
    """Two originals of one task, three candidates, the last one calibrated; without `steps` only two."""

    def score(name: str, accuracy: float) -> TaskScore:
        return TaskScore(
            accuracy=accuracy if labels else None,
            original_accuracy=ENSEMBLE if labels else None,
            agreement=AGREEMENT[name] if classes else None,
            relative_error=None if classes else 1 - AGREEMENT[name],
        )

    candidates = [
        Candidate(
            name=name,
            share=6,
            path=f"{name}.onnx",
            parameters=421_000,
            bytes=1_690_000,
            tasks={
                task: score(name, accuracy).model_copy(update={"original_accuracy": own if labels else None})
                for task, own in ORIGINALS.items()
            },
            ensemble=score(name, accuracy),
            latency_ms=LatencyRecord(merged=0.03, separate=0.06, speedup=2.0),
            steps=steps if name == "calibrated" else 0,
            seconds=1.5,
            start="least-squares-mean" if name == "calibrated" else None,
            total_layers=6,
            losses=[(0, 0.3), (50, 0.2)] if name == "calibrated" else [],
        )
        for name, accuracy in CANDIDATES.items()
        if steps or name != "calibrated"
    ]
    links = [LayerLink(fused="w1", original="v1", cka=0.963), LayerLink(fused="w3", original="v2")]
    return Result(
        method="fuse",
        versions={},
        inputs=[
            InputRecord(task=task, path=f"{task}.onnx", sha256="0" * 64, parameters=400_000, bytes=1_600_000)
            for task in ORIGINALS
        ],
        candidates=candidates,
        chosen=candidates[-1 if steps else 0].name,
        originals={name: score(name, accuracy) for name, accuracy in ORIGINALS.items()},
        layer_maps={
            "shallow": LayerLinks(fused={"w1": 400, "w2": 200, "w3": 100}, original={"v1": 400, "v2": 100}, links=links)
        },
    )


def row(lines: list[str], name: str) -> list[str]:
    body = lines[: next(number for number, line in enumerate(lines) if "top-1" in line or "relative error" in line)]
    (found,) = [line.split() for line in body if line.split()[:1] == [name]]
    return found[1:]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_table_sets_accuracy_against_the_best_original_and_the_ensemble() -> None:
    lines = printed(fused(), 80)
    header = lines[2].split()
    assert header[:4] == ["name", "acc%", "+/-", "agr%"]
    assert "k" not in header
    assert header.count("acc%") == 1
    assert row(lines, "deep")[:3] == ["96.5", "-0.5", "97.1"]
    assert row(lines, "shallow")[:3] == ["97.0", "0.0", "98.1"]
    assert row(lines, "ensemble")[:3] == ["98.0", "+1.0", "-"]
    assert row(lines, "heads")[:3] == ["96.1", "-0.9", "96.1"]
    assert row(lines, "calibrated")[:4] == ["*", "97.4", "+0.4", "99.2"]
    assert row(lines, "originals")[:3] == ["-", "-", "-"]


def test_without_labels_there_is_agreement_only_and_without_classes_the_error() -> None:
    lines = printed(fused(labels=False), 80)
    assert "acc%" not in "".join(lines)
    assert not [line for line in lines if line.startswith("ensemble  ")]
    assert row(lines, "shallow")[0] == "98.1"
    lines = printed(fused(labels=False, classes=False), 80)
    assert "agr%" not in "".join(lines)
    assert row(lines, "heads")[0] == "0.039"


def test_networks_with_data_of_their_own_have_columns_of_their_own() -> None:
    result = fused()
    result.candidates[0].tasks["deep"].accuracy = 0.5
    accuracies = [column.group for column in columns(result) if column.title == "accuracy, %"]
    assert accuracies == ["held-out samples", "deep", "shallow"]


@pytest.mark.parametrize("width", [72, 80, 100, 240])
def test_the_table_fits(width: int) -> None:
    assert max(map(len, printed(fused(), width))) <= width


def test_the_headline_says_why() -> None:
    assert headline(fused()) == (
        "calibrated was chosen, the candidate least-squares-mean calibrated for 50 steps with the originals as "
        "teachers: accuracy 97.4 %, +0.4 points from the best original (shallow), -0.6 from the ensemble; "
        "47 % smaller than the originals together (1.69 MB for 3.20 MB); "
        "2.00 times as fast as the originals run separately."
    )
    result = fused(labels=False, steps=0)
    assert headline(result).startswith(
        "least-squares-mean was chosen, the candidate that agrees best with the ensemble of the originals: "
        "it agrees with the ensemble on 99.1 % of the held-out samples; "
    )
    result.chosen = "heads"
    assert "that, of those within the allowed drop, agrees best" in headline(result)
    for candidate in result.candidates:
        candidate.ensemble = None
    assert headline(result)


def test_the_page_has_none_of_zips_words() -> None:
    for result in (fused(), fused(labels=False, steps=0)):
        page = Page(render_page(result))
        assert not re.search(r"\bstems?\b|\bk\b|\bunits?\b", re.sub(r"\d k\b|'[^']*'", "", page.text), re.IGNORECASE)
        assert not page.tags & {"link", "iframe", "img"} and page.scripts == [SCRIPT]
    assert "Stem, k" in Page(render_page(make_result(["a", "b"]))).text


def test_the_page_shows_each_original_in_the_tables() -> None:
    page = Page(render_page(fused()))
    rows = {cells[0]: cells[1:] for cells in reversed(page.rows) if cells}
    assert rows["shallow"][:3] == ["97.0", "0.0", "98.1"]
    assert rows["ensemble"][:3] == ["98.0", "+1.0", ""]
    assert sum(cells[:1] == ["ensemble"] for cells in page.rows) == 1  # it has no size: no row in the other table
    assert sum(cells[:1] == ["deep"] for cells in page.rows) == 3  # quality, cost, files


def test_the_plots_are_drawn_for_what_there_is() -> None:
    drawn = plots(fused())
    assert [plot.title for plot in drawn] == ["Accuracy", "What it costs to run", "Layer map of shallow", "Calibration"]
    for name, figure in {**ORIGINALS, "ensemble": ENSEMBLE, **CANDIDATES}.items():
        assert name in texts(drawn[0].svg)
        assert f"{100 * figure:.1f}" in texts(drawn[0].svg)
    without = plots(fused(labels=False, steps=0))
    assert [plot.title for plot in without] == [
        "Agreement with the ensemble",
        "What it costs to run",
        "Layer map of shallow",
    ]
    assert "ensemble" not in texts(without[0].svg)
    without = plots(fused(labels=False, classes=False, steps=0))
    assert without[0].title == "Distance from the ensemble"


def test_the_layer_map_draws_every_layer_and_only_known_figures() -> None:
    (plot,) = [plot for plot in plots(fused()) if plot.title.startswith("Layer map")]
    assert {"w1 (400)", "w2 (200)", "w3 (100)", "v1 (400)", "v2 (100)", "shallow", "0.963"} <= set(texts(plot.svg))
    assert len([text for text in texts(plot.svg) if text.startswith("0.")]) == 1  # the other pair was given, not found


def test_report_json_round_trips_and_other_methods_keep_their_keys() -> None:
    result = fused()
    assert Result.model_validate_json(result.to_json()) == result
    assert {"originals", "layer_maps"} <= set(json.loads(result.to_json()))
    assert not {"originals", "layer_maps", "layer_map"} & set(json.loads(make_result(["a"]).to_json()))


def test_nasty_names_stay_text() -> None:
    result = fused()
    text = result.model_dump_json(by_alias=True).replace("shallow", "<script>$\\\\frac{$")
    page = Page(render_page(Result.model_validate_json(text)))
    assert page.scripts == [SCRIPT]
