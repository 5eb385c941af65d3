"""The layer map drawn on the matrix of layer similarities."""

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from onnxmerge.report.figures import shortened
from onnxmerge.report.schema import LayerMap, Result, StepRecord
from onnxmerge.report.summary import task_names
from onnxmerge.report.svg import INK, SERIES, Plot, drawing, panels, to_svg

_COLORS = "viridis"
_FADED = 0.3
"""Opacity of pairs whose groups differ."""
_MOST_FIGURES = 16
"""Columns of a matrix whose cells hold figures."""
_MOST_NAMES = 48
_LONGEST_NAME = 28
_DARK, _LIGHT = "#000000", "#ffffff"
_BY_COST = {"cka": "1 - CKA", "width": "the squared difference of widths", "wasserstein": "the Wasserstein distance"}


def heat_map(result: Result) -> Plot | None:
    """Linear CKA of every layer of the first network (down) with every layer of the second (across)."""
    found = result.layer_map
    if found is None:
        return None
    rows, columns = len(found.first), len(found.second)
    with drawing():
        figure, (axis,) = panels(1, float(np.clip(1.2 + 0.3 * rows, 2.6, 10.0)))
        similarity = np.array(found.similarity)
        allowed = np.array([[a.group == b.group for b in found.second] for a in found.first])
        axis.pcolormesh(similarity, cmap=_COLORS, vmin=0.0, vmax=1.0, alpha=_FADED)
        mesh = axis.pcolormesh(np.ma.masked_where(~allowed, similarity), cmap=_COLORS, vmin=0.0, vmax=1.0)
        if columns <= _MOST_FIGURES:
            _write_figures(axis, similarity, allowed)
        _draw_map(axis, found)
        _name(axis, found.first, found.second)
        axis.set_ylim(rows, 0)
        axis.grid(False)
        first, second = task_names(result)
        axis.set_ylabel(_short(first))
        axis.set_xlabel(_short(second))
        figure.colorbar(mesh, ax=axis, label="linear CKA", pad=0.01, aspect=30).outline.set_visible(False)
        svg = to_svg(figure)
    caption = (
        "Linear CKA of the pre-activations on the same samples. Frames are the map, which minimises "
        f"{_BY_COST[found.cost]} within groups of layers; pale cells lie between groups."
    )
    return Plot("Layer similarity and layer map", caption, svg)


def _write_figures(axis: Axes, similarity: np.ndarray, allowed: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(similarity):
        axis.text(
            column + 0.5,
            row + 0.5,
            f"{value:.2f}",
            ha="center",
            va="center",
            size=8.0,
            color=legible_on(colormaps[_COLORS](value)[:3]) if allowed[row, column] else INK,
        )


def legible_on(color: tuple[float, float, float]) -> str:
    """Black or white, whichever has more contrast (WCAG 2) to an sRGB colour with parts in 0..1: at least 4.5:1."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color]
    luminance = float(np.dot((0.2126, 0.7152, 0.0722), linear))
    return _DARK if (luminance + 0.05) ** 2 > 0.05 * 1.05 else _LIGHT


def _draw_map(axis: Axes, found: LayerMap) -> None:
    for pair in found.pairs:
        row, column = pair.place
        axis.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=SERIES[1], linewidth=2.6, clip_on=False))


def _name(axis: Axes, down: list[StepRecord], across: list[StepRecord]) -> None:
    """Write the steps' names at the edges, unless there are too many."""
    names = [[_short(step.name) if len(steps) <= _MOST_NAMES else "" for step in steps] for steps in (down, across)]
    turned = sum(map(len, names[1])) > 90  # characters that fit below the columns side by side
    axis.set_yticks([row + 0.5 for row in range(len(down))], names[0])
    axis.set_xticks(
        [column + 0.5 for column in range(len(across))],
        names[1],
        rotation=35 if turned else 0,
        ha="right" if turned else "center",
        rotation_mode="anchor" if turned else "default",
    )
    axis.tick_params(length=0)


def _short(name: str) -> str:
    return shortened(name, _LONGEST_NAME)
