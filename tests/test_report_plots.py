"""The plots: deterministic, complete, of the best figure there is."""

import math
import subprocess
import sys
import warnings
from xml.etree import ElementTree

import pytest
from reports import make_result

from onnxmerge.report.cost_bars import cost
from onnxmerge.report.heat_map import legible_on
from onnxmerge.report.page import render_page
from onnxmerge.report.plots import calibration, plots, quality_by_share, similarity, trade_off
from onnxmerge.report.schema import LatencyRecord, MemoryRecord, TaskScore


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
        "What it costs to run",
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


def test_figures_on_the_heat_map_are_legible() -> None:
    # Black and white have the same contrast to the grey of luminance sqrt(0.05 * 1.05) - 0.05, which is 0.4605 in sRGB.
    assert [legible_on((grey, grey, grey)) for grey in (0.0, 0.45, 0.459)] == ["#ffffff"] * 3
    assert [legible_on((grey, grey, grey)) for grey in (0.462, 0.5, 1.0)] == ["#000000"] * 3
    assert legible_on((0.0, 1.0, 0.0)) == "#000000"
    assert legible_on((0.0, 0.0, 1.0)) == "#ffffff"


def test_long_names_are_shortened_and_have_room() -> None:
    result = make_result(["a_task_with_a_name_as_long_as_this_one"], number=3)
    for candidate in result.candidates:
        candidate.name, candidate.share = f"a-name-that-is-much-too-long-{candidate.name}", 1
    result.chosen = result.candidates[0].name
    trade, curves = trade_off(result), calibration(result)
    assert trade is not None and curves is not None
    assert ">a_task_with_..._as_this_one<" in trade.svg
    for number in (1, 2, 3):
        assert f">a-name-th...o-long-k{number}<" in curves.svg  # what has no room is left out


def test_costs_are_those_of_the_originals_and_of_the_chosen_one_among_others() -> None:
    result = make_result(["a", "b"], 60, units=60)
    result.chosen = "k2"
    plot = cost(result)
    assert plot is not None and plot.caption.startswith("Less is better. Grey are the originals")
    texts = [element.text for element in ElementTree.fromstring(plot.svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"latency, ms", "memory, MB", "file size, MB", "9.40", "6.20", "17.9", "k1", "k2", "k60"} <= set(texts)
    assert len({text for text in texts if text and text[0] == "k"}) == 16
    for candidate in result.candidates:
        candidate.latency_ms, candidate.memory_mb = LatencyRecord(merged=1.5), MemoryRecord()
    plot = cost(result)
    assert plot is not None
    assert "memory, MB" not in plot.svg and "originals, defaults" not in plot.svg
    result.inputs = []
    plot = cost(result)
    assert plot is not None and plot.caption == "Less is better."


def test_a_plot_without_figures_is_left_out() -> None:
    result = make_result(["a"])
    result.similarity = []
    for candidate in result.candidates:
        candidate.losses = []
        candidate.tasks = {"a": TaskScore()}
        candidate.latency_ms, candidate.memory_mb = LatencyRecord(), MemoryRecord()
    drawn = [quality_by_share(result), trade_off(result), cost(result), similarity(result), calibration(result)]
    assert drawn == [None] * 5


def test_a_diverged_calibration_is_drawn() -> None:
    result = make_result(["a"], number=2)
    result.candidates[0].losses = [(0, 0.1), (50, math.inf), (100, math.nan)]
    result.similarity[0].correlation = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(plots(result)) == 5


def test_plots_leave_the_users_matplotlib_settings_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots(make_result(["a"], number=2))
    assert dict(matplotlib.rcParams) == before
