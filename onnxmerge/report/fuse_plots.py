"""The plots of a fuse: how originals, ensemble and candidates fare, and which layer stands for which."""

import math
from collections.abc import Callable

from matplotlib.axes import Axes

from onnxmerge.report.figures import one_line, percent, shortened, significant
from onnxmerge.report.schema import LayerLinks, Result, TaskScore
from onnxmerge.report.summary import ensemble_accuracy
from onnxmerge.report.svg import GRID, INK, MUTED, SERIES, Plot, drawing, mark, narrow_panel, to_svg

_LONGEST_NAME = 22
_ROW = 0.27
"""Height of a row in inches."""
_MOST_ROWS = 60


def quality_of_all(result: Result) -> Plot | None:
    """A dot for each original, the ensemble and each candidate; None when nothing was scored.

    Accuracy where there are labels, else agreement with the ensemble, else the relative error to it.
    """
    scores = [
        *((task, score, SERIES[1]) for task, score in result.originals.items()),
        *((c.name, c.ensemble, SERIES[0]) for c in result.candidates if c.ensemble is not None),
    ]
    readings: list[tuple[str, str, float, Callable[[TaskScore], float | None], Callable[[float], str]]] = [
        ("Accuracy", "accuracy on held-out samples, %", 100.0, lambda s: s.accuracy, percent),
        ("Agreement with the ensemble", "same class as the ensemble, %", 100.0, lambda s: s.agreement, percent),
        (
            "Distance from the ensemble",
            "relative error (less is better)",
            1.0,
            lambda s: s.relative_error,
            significant,
        ),
    ]
    title, label, scale, of, text = next(
        (reading for reading in readings if any(reading[3](score) is not None for _, score, _ in scores)), readings[0]
    )
    figures = [(name, of(score), color) for name, score, color in scores]
    known = [(name, value, color) for name, value, color in figures if value is not None and math.isfinite(value)]
    if not known:
        return None
    ensemble = ensemble_accuracy(result)
    if title == "Accuracy" and ensemble is not None:
        known.insert(sum(color == SERIES[1] for _, _, color in known), ("ensemble", ensemble, SERIES[2]))
    numbers = {candidate.name: number for number, candidate in enumerate(result.candidates)}
    with drawing():
        figure, axis = narrow_panel(0.75 + _ROW * len(known))
        values = [scale * value for _, value, _ in known]
        for row, (name, value, color) in enumerate(known):
            chosen = name == result.chosen and color == SERIES[0]
            gid = mark(numbers[name]) if color == SERIES[0] else None
            axis.plot([scale * value], [row], "o", color=color, markersize=6.5, gid=gid)
            if chosen:
                axis.plot([scale * value], [row], "o", color=INK, fillstyle="none", markersize=11)
            note = text(value)
            weight = "bold" if chosen else "normal"
            axis.annotate(
                note, (1, row), (6, 0), ("axes fraction", "data"), "offset points", va="center", weight=weight
            )
        axis.set_yticks(range(len(known)), [_short(name) for name, _, _ in known])
        for tick, (name, _, color) in zip(axis.get_yticklabels(), known, strict=True):
            tick.set_color(INK)
            tick.set_fontweight("bold" if name == result.chosen and color == SERIES[0] else "normal")
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(len(known) - 0.4, -0.6)
        # Differences below a point are within the noise of most test sets: do not blow them up to the panel's width.
        least = 2.0 if scale == 100.0 else 0.2 * max(map(abs, values)) or 1.0
        span, middle = max(least, max(values) - min(values)), (max(values) + min(values)) / 2
        axis.set_xlim(middle - 0.6 * span, middle + 0.6 * span)
        axis.set_xlabel(label)
        svg = to_svg(figure)
    colours = "Originals are orange, their ensemble green, candidates blue; the chosen candidate is ringed."
    if title != "Accuracy":
        colours = "Originals are orange, candidates blue; the chosen candidate is ringed."
    return Plot(title, colours, svg, narrow=True)


def layer_links(result: Result) -> list[Plot]:
    """For each original with a layer map: its layers, the fused network's, and a line for each pair."""
    return [_links(task, links) for task, links in result.layer_maps.items()]


def _links(task: str, found: LayerLinks) -> Plot:
    columns = (list(found.original.items()), list(found.fused.items()))
    rows = min(_MOST_ROWS, max(map(len, columns)))
    with drawing():
        figure, axis = narrow_panel(0.5 + _ROW * rows)
        places = [{name: row for row, (name, _) in enumerate(column)} for column in columns]
        for link in found.links:
            left, right = places[0][link.original], places[1][link.fused]
            axis.plot([0, 1], [left, right], color=SERIES[0], linewidth=1.6)
            if link.cka is not None:
                axis.text(
                    0.5,
                    (left + right) / 2,
                    significant(link.cka),
                    ha="center",
                    va="center",
                    size=8.0,
                    color=INK,
                    bbox={"boxstyle": "round,pad=0.2", "facecolor": GRID, "edgecolor": "none"},
                )
        linked = {link.original for link in found.links}, {link.fused for link in found.links}
        for x, (column, of_side) in enumerate(zip(columns, linked, strict=True)):
            for row, (name, width) in enumerate(column):
                _draw_layer(axis, x, row, f"{_short(name)} ({width})", name in of_side)
        axis.set_axis_off()
        axis.set_xlim(-1.05, 2.05)
        axis.set_ylim(max(map(len, columns)) - 0.4, -1.5)
        for x, side, heading in ((0, "right", _short(task)), (1, "left", "fused network")):
            axis.text(x, -1, heading, ha=side, va="center", weight="bold")
        svg = to_svg(figure)
    figures = (
        " Figures on the lines are the two layers' linear CKA."
        if any(link.cka is not None for link in found.links)
        else ""
    )
    caption = (
        f"Hidden layers or blocks with their channels, and which stands for which; rings have no partner.{figures}"
    )
    return Plot(f"Layer map of {one_line(task)}", caption, svg, narrow=True)


def _draw_layer(axis: Axes, x: int, row: int, text: str, linked: bool) -> None:
    fill = "full" if linked else "none"
    axis.plot([x], [row], "o", color=SERIES[0] if linked else MUTED, fillstyle=fill, markersize=6.0)
    axis.annotate(
        text,
        (x, row),
        (-9 if x == 0 else 9, 0),
        textcoords="offset points",
        ha="right" if x == 0 else "left",
        va="center",
        color=INK if linked else MUTED,
    )


def _short(name: str) -> str:
    return shortened(name, _LONGEST_NAME)
