"""The plots' common ground: a style, and SVG text that is deterministic and follows the page's colours.

Plots are drawn with matplotlib's object API in fixed colours, each of which stands for a role. In the SVG every such
colour becomes a CSS variable with that colour as its default: the same plot is legible on a light and a dark page, and
on its own.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK = "#1f2730"
MUTED = "#66707b"
GRID = "#dfe3e7"
BAND = "#f0f2f5"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#b4619a", "#b98300", "#3a97c9")
"""Okabe and Ito's colour-blind-safe hues, the light ones darkened to be read on white."""

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "onnxmerge",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}

_ROLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    BAND: "band",
    **{color: f"series-{number}" for number, color in enumerate(SERIES)},
}
_COLOR = re.compile("|".join(_ROLES))
_MARK_ID = re.compile(r'(<g) id="candidate-(\d+)"')
_UNUSED_ID = re.compile(r'(<g) id="[^"]*"')
_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@dataclass(frozen=True)
class Plot:
    """A finished plot: its title, a sentence on how to read it, and the SVG element as text."""

    title: str
    caption: str
    svg: str
    narrow: bool = False
    """Whether it is drawn for half the page's width, legible on a phone without scrolling."""


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in the house style, whatever the user's own; nothing outside the block sees it."""
    # rc_context would not restore the backend.
    style: dict[Any, Any] = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")}
    style.update(STYLE)
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # Text stays text: the viewer's fonts draw the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from font")
        yield


def panels(number: int, height: float, most_across: int = 2) -> tuple[Figure, list[Axes]]:
    """A figure as wide as the page with `number` panels, each `height` inches high, at most so many in a row."""
    across = min(most_across, number)
    down = -(-number // across)
    figure = Figure(figsize=(10.4, height * down), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.08))
    axes = figure.subplots(down, across, squeeze=False).ravel().tolist()
    for empty in axes[number:]:
        empty.set_axis_off()
    return figure, axes[:number]


def narrow_panel(height: float) -> tuple[Figure, Axes]:
    """A figure for half the page's width, `height` inches high."""
    figure = Figure(figsize=(4.4, height), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08))
    return figure, figure.subplots()


def mark(number: int) -> str:
    """The gid of what stands for the candidate of that number, from 0: the page's script finds it by that."""
    return f"candidate-{number}"


def to_svg(figure: Figure) -> str:
    """The `<svg>` element of `figure`, without XML prolog, metadata or ids that only name groups.

    What has `mark(n)` as its gid becomes `<g class="mark" data-candidate="n">`.
    """
    stream = StringIO()
    figure.savefig(stream, format="svg", metadata=_METADATA)
    text = stream.getvalue()
    text = _MARK_ID.sub(r'\1 class="mark" data-candidate="\2"', text[text.index("<svg") :])
    text = _UNUSED_ID.sub(r"\1", text)
    return _COLOR.sub(lambda match: f"var(--{_ROLES[match[0]]}, {match[0]})", text)
