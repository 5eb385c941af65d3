"""The plot of a gate run: what gates said of every channel."""

import numpy as np

from onnxmerge.report.figures import shortened
from onnxmerge.report.schema import GatedSpace, Result
from onnxmerge.report.summary import task_names
from onnxmerge.report.svg import INK, MUTED, SERIES, Plot, drawing, panels, to_svg

_LONGEST_NAME = 32
"""Characters of a name, so that it fits above a panel."""
_MOST = 12
"""Spaces that are drawn: more would be a wall of panels."""


def gates(result: Result) -> Plot | None:
    """P[g > 0] of every channel, the surest first, a panel for each space; None when there were no gates."""
    spaces = next((candidate.gates for candidate in result.candidates if candidate.gates), [])
    if not spaces:
        return None
    shown, tasks = _spread(spaces), task_names(result)
    with drawing():
        figure, axes = panels(len(shown), 1.9)
        for axis, space in zip(axes, shown, strict=True):
            probability = np.array(space.probability)
            order = np.argsort(-probability, kind="stable")
            owner = order // (len(order) // len(tasks))
            for number, task in enumerate(tasks):
                places = np.flatnonzero(owner == number)
                axis.plot(
                    places + 1,
                    probability[order][places],
                    "o",
                    color=SERIES[number % len(SERIES)],
                    markersize=3.0,
                    label=shortened(task, _LONGEST_NAME) if axis is axes[0] else None,
                )
            axis.axvline(len(space.kept) + 0.5, color=MUTED, linestyle="--", linewidth=1.0)
            axis.set_ylim(-0.05, 1.05)
            axis.set_title(f"{shortened(space.name, _LONGEST_NAME)}: {len(space.kept)} of {len(order)}", color=INK)
            axis.set_ylabel("P[open]")
        figure.legend(loc="outside lower center", ncols=len(tasks))
        svg = to_svg(figure)
    some = "" if len(shown) == len(spaces) else f" {len(shown)} of {len(spaces)} channel spaces are shown."
    caption = (
        "Each dot is a channel, by the probability that its gate is open, the surest first; left of the dashed line "
        f"they were kept. The colour is the network that it came from.{some}"
    )
    return Plot("Gates", caption, svg)


def _spread(spaces: list[GatedSpace]) -> list[GatedSpace]:
    """At most `_MOST` of them, from the first to the last."""
    if len(spaces) <= _MOST:
        return spaces
    return [spaces[round(place)] for place in np.linspace(0, len(spaces) - 1, _MOST)]
