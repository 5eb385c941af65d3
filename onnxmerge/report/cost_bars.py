"""Bars of what the candidates and the originals cost to run: time, memory, size."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from onnxmerge.report.figures import shortened, significant
from onnxmerge.report.schema import Candidate, Result
from onnxmerge.report.summary import original_bytes
from onnxmerge.report.svg import MUTED, SERIES, Plot, drawing, panels, to_svg

_MOST = 16
"""Candidates that are drawn, the chosen one among them."""
_LONGEST = 22
"""Characters of a name beside its bars."""
_FAINT = 0.45
"""Opacity of the candidates that were not chosen."""


@dataclass(frozen=True)
class _Cost:
    """One panel: what is measured, of each candidate and of the originals together."""

    title: str
    of_candidates: Sequence[float | None]
    of_originals: float | None
    with_defaults: float | None = None
    """In sessions with onnxruntime's defaults."""


def cost(result: Result) -> Plot | None:
    """Latency, memory and file size as bars; None where neither latency nor memory was measured."""
    shown = _shown(result)
    costs = [own for own in _costs(shown, result) if any(value is not None for value in own.of_candidates)]
    if len(costs) < 2:
        return None
    names = [shortened(candidate.name, _LONGEST) for candidate in shown]
    with drawing():
        figure = _drawn(costs, names, [candidate.name == result.chosen for candidate in shown])
        svg = to_svg(figure)
    caption = "Less is better."
    if any(own.of_originals is not None for own in costs):
        caption += (
            " Grey are the originals in sessions of their own; with onnxruntime's defaults, threads keep spinning."
        )
    return Plot("What it costs to run", caption, svg)


def _shown(result: Result) -> list[Candidate]:
    """At most `_MOST` candidates, evenly spaced and with the chosen one, in order."""
    places = set(range(_MOST))
    if len(result.candidates) > _MOST:
        places = {round(step * (len(result.candidates) - 1) / (_MOST - 2)) for step in range(_MOST - 1)}
    return [own for n, own in enumerate(result.candidates) if n in places or own.name == result.chosen]


def _costs(shown: Sequence[Candidate], result: Result) -> list[_Cost]:
    times = [candidate.latency_ms for candidate in shown]
    total = original_bytes(result)
    return [
        _Cost(
            "latency, ms",
            [time.merged for time in times],
            next((time.separate for time in times if time.separate is not None), None),
            next((time.separate_default for time in times if time.separate_default is not None), None),
        ),
        _Cost(
            "memory, MB",
            [candidate.memory_mb.merged for candidate in shown],
            next((c.memory_mb.separate for c in shown if c.memory_mb.separate is not None), None),
        ),
        _Cost("file size, MB", [c.bytes / 1e6 for c in shown], None if total is None else total / 1e6),
    ]


def _drawn(costs: Sequence[_Cost], names: Sequence[str], chosen: Sequence[bool]) -> Figure:
    labels = ["originals, defaults", "originals", *names]
    known = [own.with_defaults is not None for own in costs]
    first = 0 if any(known) else 1
    figure, axes = panels(len(costs), 0.75 + 0.24 * (len(labels) - first), len(costs))
    for axis, own in zip(axes, costs, strict=True):
        values = [own.with_defaults, own.of_originals, *own.of_candidates]
        largest = max(value for value in values if value is not None)
        for place, value in enumerate(values):
            if value is None:
                continue
            number = place - 2
            opacity = 1.0 if number < 0 or chosen[number] or not any(chosen) else _FAINT
            axis.barh(place, value, height=0.66, color=MUTED if number < 0 else SERIES[0], alpha=opacity)
            axis.text(value + 0.015 * largest, place, significant(value), va="center", size=8.0)
        axis.set_xlim(0, 1.16 * largest)
        axis.set_ylim(len(values) - 0.4, first - 0.6)
        axis.grid(False, axis="y")
        axis.tick_params(axis="y", length=0)
        axis.set_title(own.title)
        axis.set_yticks(range(first, len(labels)), labels[first:])
        if axis is not axes[0]:
            axis.set_yticklabels([])
    for tick, is_chosen in zip(axes[0].get_yticklabels()[2 - first :], chosen, strict=True):
        tick.set_fontweight("bold" if is_chosen else "normal")
    return figure
