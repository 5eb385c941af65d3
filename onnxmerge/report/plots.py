"""The report's plots, as SVG text."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from onnxmerge.report.cost_bars import cost
from onnxmerge.report.figures import shortened, significant
from onnxmerge.report.fuse_plots import layer_links, quality_of_all
from onnxmerge.report.gate_plots import gates
from onnxmerge.report.heat_map import heat_map
from onnxmerge.report.labels import label_points, room_at_the_right
from onnxmerge.report.schema import Candidate, Result, TaskScore
from onnxmerge.report.summary import has_stem, is_fused, original_bytes, task_names
from onnxmerge.report.svg import BAND, INK, MUTED, SERIES, Plot, drawing, mark, narrow_panel, panels, to_svg

_LONGEST_TITLE = 28
"""Characters of a name above a panel, beside the original's figure."""
_LONGEST_LABEL = 22
"""Characters of a name beside a dot."""


@dataclass(frozen=True)
class _Quality:
    """How well candidates do one task, by the best figure there is: accuracy, else agreement, else relative error."""

    task: str
    label: str
    values: dict[str, float]
    """Candidate's name to its figure; in percent but for the relative error."""
    original: float | None


def plots(result: Result) -> list[Plot]:
    """All plots the result has figures for."""
    if is_fused(result):
        drawn = [quality_of_all(result), cost(result), *layer_links(result), calibration(result), gates(result)]
        return [plot for plot in drawn if plot is not None]
    drawn = [quality_by_share(result), trade_off(result), cost(result), similarity(result), calibration(result)]
    drawn += [heat_map(result), gates(result)]
    return [plot for plot in drawn if plot is not None]


def quality_by_share(result: Result) -> Plot | None:
    """Each task's quality against k; None unless there are candidates of different k."""
    qualities = _qualities(result)
    if not qualities or len({candidate.share for candidate in result.candidates}) < 2:
        return None
    with drawing():
        figure, axes = panels(len(qualities), 2.7)
        for number, (axis, quality) in enumerate(zip(axes, qualities, strict=True)):
            _draw_quality(axis, result, quality, number, lambda candidate: float(candidate.share), line=True)
            axis.set_xlabel("k, shared stem units")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
        svg = to_svg(figure)
    caption = "Each dot is a candidate on held-out data; the ring is the chosen one, the dashed line the original."
    return Plot("Quality against sharing", caption, svg)


def trade_off(result: Result) -> Plot | None:
    """Each task's quality against measured speed-up and against size; None when there are fewer than two candidates."""
    qualities = _qualities(result)
    if not qualities or len(result.candidates) < 2:
        return None
    abscissas: list[tuple[str, Callable[[Candidate], float | None]]] = [
        ("speed-up over separate sessions, times", lambda candidate: candidate.latency_ms.speedup),
        ("file size, MB", lambda candidate: candidate.bytes / 1e6),
    ]
    measured = [(label, of) for label, of in abscissas if any(of(c) is not None for c in result.candidates)]
    with drawing():
        figure, axes = panels(len(qualities) * len(measured), 2.7)
        views = [(number, quality, view) for number, quality in enumerate(qualities) for view in measured]
        for axis, (number, quality, (label, of)) in zip(axes, views, strict=True):
            _draw_quality(axis, result, quality, number, of, line=False)
            axis.set_xlabel(label)
        figure.draw_without_rendering()  # labels are placed in pixels, which the layout decides
        for axis, (_, quality, (_, of)) in zip(axes, views, strict=True):
            shown = [(c, of(c)) for c in _chosen_first(result) if c.name in quality.values]
            label_points(axis, [(x, quality.values[c.name], _mark(c, result)) for c, x in shown if x is not None])
        svg = to_svg(figure)
    total = original_bytes(result)
    labels = "k" if _shares(result) else "names"
    together = "" if total is None else f" The originals together have {significant(total / 1e6)} MB."
    caption = f"Faster is to the right, smaller is to the left; the points' labels are {labels}.{together}"
    return Plot("Quality against speed and size", caption, svg)


def similarity(result: Result) -> Plot | None:
    """How alike the originals are at each stem layer, grouped by stem unit; None when it was not measured."""
    layers = result.similarity
    if not layers:
        return None
    with drawing():
        figure, (axis,) = panels(1, 3.2)
        places = range(len(layers))
        units = sorted({layer.unit for layer in layers})
        for number, unit in enumerate(units):
            inside = [place for place in places if layers[place].unit == unit]
            if number % 2 == 0:
                axis.axvspan(inside[0] - 0.5, inside[-1] + 0.5, color=BAND, linewidth=0, zorder=0)
        unaligned = [layer.correlation_unaligned for layer in layers]
        aligned = [layer.correlation for layer in layers]
        axis.vlines(places, unaligned, aligned, color=MUTED, linewidth=1.0, zorder=1)
        axis.plot(places, [layer.cka for layer in layers], "D", color=SERIES[2], label="linear CKA")
        axis.plot(places, aligned, "o", color=SERIES[0], label="correlation, aligned")
        axis.plot(places, unaligned, "o", color=SERIES[1], fillstyle="none", label="correlation, unaligned")
        centres = {unit: [place for place in places if layers[place].unit == unit] for unit in units}
        axis.set_xticks([sum(inside) / len(inside) for inside in centres.values()], [str(unit) for unit in units])
        axis.tick_params(axis="x", length=0)
        axis.grid(False, axis="x")
        axis.set_xlim(-0.5, len(layers) - 0.5)
        lowest = min([0.0, *(value for value in unaligned + aligned if math.isfinite(value))])
        axis.set_ylim(lowest - 0.05, 1.05)
        axis.set_xlabel("stem unit (one mark for each layer inside it)")
        axis.set_ylabel("similarity")
        figure.legend(loc="outside upper left", ncols=3)  # in sight where the plot is wider than the window
        svg = to_svg(figure)
    caption = (
        "Correlation is the mean over matched channels' pre-activations; the stroke is what alignment gained. "
        "CKA needs no alignment."
    )
    return Plot("How alike the originals are", caption, svg)


def calibration(result: Result) -> Plot | None:
    """Held-out loss against step for each calibrated candidate; None when none was calibrated."""
    curves = [(n, candidate) for n, candidate in enumerate(result.candidates) if len(candidate.losses) > 1]
    if not curves:
        return None
    alone = is_fused(result) and len(curves) == 1
    with drawing():
        figure, axis = narrow_panel(2.6) if alone else _whole_panel(3.2)
        losses = [loss for _, candidate in curves for _, loss in candidate.losses if math.isfinite(loss)]
        if losses and min(losses) > 0 and max(losses) > 5 * min(losses):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        for place, (number, candidate) in enumerate(curves):
            chosen = candidate.name == result.chosen
            axis.plot(
                [step for step, _ in candidate.losses],
                [loss for _, loss in candidate.losses],
                marker="o",
                markersize=3.0,
                color=INK if chosen else _shade(place, len(curves)),
                linewidth=2.6 if chosen else 1.4,
                zorder=3 if chosen else 2,
                gid=mark(number),
            )
        axis.set_xlabel("calibration step (0 is the closed form)")
        axis.set_ylabel("held-out loss")
        ends = [(c, c.losses[-1]) for c in _chosen_first(result) if len(c.losses) > 1]
        marks = [(step, loss, _mark(c, result)) for c, (step, loss) in ends if math.isfinite(loss)]
        axis.margins(x=0.06)
        if not alone:
            room_at_the_right(axis, [text for *_, text in marks])
            figure.draw_without_rendering()
            label_points(axis, marks, right=True)
        svg = to_svg(figure)
    caption = (
        "The loss that is trained, on held-out samples: how far merged outputs are from the originals', or from labels "
        "where those teach. The thick line is the chosen candidate."
    )
    if alone:
        caption = "Distance of the network's outputs from the originals' on held-out samples; the lowest point is kept."
    return Plot("Calibration", caption, svg, narrow=alone)


def _whole_panel(height: float) -> tuple[Figure, Axes]:
    figure, (axis,) = panels(1, height)
    return figure, axis


def _qualities(result: Result) -> list[_Quality]:
    found = []
    for task in task_names(result):
        scores = {c.name: c.tasks.get(task, TaskScore()) for c in result.candidates}
        original = next((s.original_accuracy for s in scores.values() if s.original_accuracy is not None), None)
        readings: list[tuple[str, float, float | None, dict[str, float | None]]] = [
            ("accuracy, %", 100.0, original, {name: score.accuracy for name, score in scores.items()}),
            ("agreement, %", 100.0, None, {name: score.agreement for name, score in scores.items()}),
            (
                "relative error (less is better)",
                1.0,
                None,
                {name: score.relative_error for name, score in scores.items()},
            ),
        ]
        for label, scale, of, figures in readings:
            values = {name: scale * v for name, v in figures.items() if v is not None and math.isfinite(v)}
            if values:
                found.append(_Quality(task, label, values, None if of is None else scale * of))
                break
    return found


def _draw_quality(
    axis: Axes,
    result: Result,
    quality: _Quality,
    number: int,
    place: Callable[[Candidate], float | None],
    line: bool,
) -> None:
    """Dots for all candidates at `place`, the original's dashed line, a ring around the chosen one."""
    color = SERIES[number % len(SERIES)]
    scored = [(n, c) for n, c in enumerate(result.candidates) if c.name in quality.values]
    dots = [(place(c), quality.values[c.name], n, c) for n, c in scored]
    known = [(x, y, n, candidate) for x, y, n, candidate in dots if x is not None]
    if line:
        best = _best_of_each_share(candidate for *_, candidate in known if not candidate.branches)
        joined = sorted((x, y) for x, y, _, candidate in known if candidate in best)
        axis.plot([x for x, _ in joined], [y for _, y in joined], color=color)
    for x, y, n, _ in known:
        axis.plot([x], [y], "o", color=color, gid=mark(n))
    ring = [(x, y) for x, y, _, candidate in known if candidate.name == result.chosen]
    axis.plot([x for x, _ in ring], [y for _, y in ring], "o", color=INK, fillstyle="none", markersize=11)
    levels = list(quality.values.values())
    if quality.original is not None:
        levels.append(quality.original)
        axis.axhline(quality.original, color=MUTED, linestyle="--", linewidth=1.2)
        unit = " %" if "%" in quality.label else ""
        note = f"- - original {significant(quality.original)}{unit}"
        axis.set_title(note, loc="right", color=MUTED, size=9.0, weight="normal")
    # Differences below a point are within the noise of most test sets: do not blow them up to the panel's height.
    least = 2.0 if "%" in quality.label else 0.2 * max(map(abs, levels)) or 1.0
    span = max(least, 1.25 * (max(levels) - min(levels)))
    middle = (max(levels) + min(levels)) / 2
    axis.set_ylim(middle - 0.55 * span, middle + 0.6 * span)
    axis.margins(x=0.08)
    axis.set_title(shortened(quality.task, _LONGEST_TITLE))
    axis.set_ylabel(quality.label)


def _best_of_each_share(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Of candidates with one k, which differ in start or calibration, the one with the smallest worst drop."""
    best: dict[int, Candidate] = {}
    for candidate in candidates:
        known = best.get(candidate.share)
        if known is None or (candidate.worst_drop or 0.0) < (known.worst_drop or 0.0):
            best[candidate.share] = candidate
    return list(best.values())


def _chosen_first(result: Result) -> list[Candidate]:
    return sorted(result.candidates, key=lambda candidate: candidate.name != result.chosen)


def _shares(result: Result) -> bool:
    """Whether k tells the candidates apart."""
    return has_stem(result) and len({candidate.share for candidate in result.candidates}) == len(result.candidates)


def _mark(candidate: Candidate, result: Result) -> str:
    return str(candidate.share) if _shares(result) else shortened(candidate.name, _LONGEST_LABEL)


def _shade(number: int, total: int) -> str:
    """A colour from viridis' middle, which is legible on light and dark, in order of the candidates."""
    return to_hex(colormaps["viridis"](0.25 + 0.5 * number / max(1, total - 1)))
