"""Draw the pictures of how-it-works.md: the channel spaces of a residual block, and a stem with its tails.

python docs/pictures.py
"""

from collections.abc import Callable, Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
STREAM, INNER, THIRD, INK, PALE = "#2f6fb2", "#c2571a", "#3b8a4e", "#20262e", "#e9edf2"
CELL = 17


class Drawing:
    """SVG elements on a white sheet, so that the picture reads alike on a white page and on a dark one."""

    def __init__(self, width: int, height: int, told: str):
        self.size = width, height
        self.told = told
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, fill: str, line: str = "none", r: float = 0) -> None:
        """A rectangle."""
        at = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{r:g}"'
        self.parts.append(f'<rect {at} fill="{fill}" stroke="{line}"/>')

    def text(self, x: float, y: float, words: str, fill: str = INK, size: int = 13, anchor: str = "middle") -> None:
        """Words on one line."""
        how = f'fill="{fill}" font-size="{size}" text-anchor="{anchor}"'
        self.parts.append(f'<text x="{x:g}" y="{y:g}" {how}>{words}</text>')

    def arrow(self, *points: tuple[float, float], colour: str = INK) -> None:
        """A line through points, with a head at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        how = f'fill="none" stroke="{colour}" stroke-width="1.6" marker-end="url(#head-{colour[1:]})"'
        self.parts.append(f'<polyline points="{path}" {how}/>')

    def svg(self) -> str:
        """The file's text."""
        width, height = self.size
        heads = "".join(
            f'<marker id="head-{colour[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0,0.5 L7.5,4 L0,7.5 z" fill="{colour}"/></marker>'
            for colour in (INK, STREAM, INNER, THIRD)
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                f'height="{height}" font-family="Helvetica, Arial, sans-serif" role="img">',
                f"<title>{self.told}</title>",
                f"<defs>{heads}</defs>",
                f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" fill="#ffffff" '
                'stroke="#c9d1da"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


Channels = tuple[str, Sequence[str]]
"""A space: its colour, and what its channels are called."""


def weight(on: Drawing, x: float, middle: float, name: str, makes: Channels | None, reads: Channels | None) -> float:
    """A weight matrix around `middle`, a row for each channel that it makes, a column for each that it reads."""
    rows, columns = makes[1] if makes else "···", reads[1] if reads else "···"
    wide, high = CELL * len(columns), CELL * len(rows)
    top = middle - high / 2
    x -= 0 if makes else CELL
    for row, channel in enumerate(rows):
        if makes:
            on.box(x, top + CELL * row, CELL, CELL - 1, makes[0], r=3)
            on.text(x + CELL / 2, top + CELL * row + 12.5, channel, "#ffffff", 12)
        for column in range(len(columns)):
            on.box(x + CELL * (column + 1) + 2, top + CELL * row, CELL - 1, CELL - 1, PALE)
    for column, channel in enumerate(columns):
        if reads:
            on.box(x + CELL * (column + 1) + 2, top - CELL - 1, CELL - 1, CELL, reads[0], r=3)
            on.text(x + CELL * (column + 1.5) + 1.5, top - 4.5, channel, "#ffffff", 12)
    on.text(x + CELL + 2 + wide / 2, top + high + 17, name)
    return x + CELL + wide + 4


def vector(on: Drawing, x: float, middle: float, name: str, channels: Channels) -> float:
    """What holds one entry for each channel."""
    colour, names = channels
    top = middle - CELL * len(names) / 2
    for row, channel in enumerate(names):
        on.box(x, top + CELL * row, CELL, CELL - 1, colour, r=3)
        on.text(x + CELL / 2, top + CELL * row + 12.5, channel, "#ffffff", 12)
    on.text(x + CELL / 2, top + CELL * len(names) + 17, name)
    return x + CELL + 2


def step(on: Drawing, x: float, middle: float, name: str) -> float:
    """An operator without weights."""
    width = 9 * len(name) + 14
    on.box(x, middle - 13, width, 26, "#ffffff", INK, r=13)
    on.text(x + width / 2, middle + 4.5, name)
    return x + width


def channel_spaces() -> str:
    """The residual block: two spaces, one of them the stream."""
    on = Drawing(800, 292, "Channel spaces of a residual block")
    stream, inner = (STREAM, "abcd"), (INNER, "123")
    middle, x, gap = 150.0, 26.0, 20.0
    ends: list[float] = []
    draw: list[Callable[[float], float]] = [
        lambda at: weight(on, at, middle, "stem", stream, None),
        lambda at: weight(on, at, middle, "conv 1", inner, stream),
        lambda at: vector(on, at, middle, "norm", inner),
        lambda at: step(on, at, middle, "Relu"),
        lambda at: weight(on, at, middle, "conv 2", stream, inner),
        lambda at: vector(on, at, middle, "norm", stream),
        lambda at: step(on, at, middle, "+"),
        lambda at: step(on, at, middle, "Relu"),
        lambda at: weight(on, at, middle, "next", None, stream),
    ]
    begins: list[float] = []
    for number, own in enumerate(draw):
        begins.append(x)
        ends.append(own(x))
        x = ends[-1] + gap + 12
        if number + 1 < len(draw):
            colour = INNER if number in (1, 2, 3) else STREAM
            on.arrow((ends[-1] + 3, middle), (x - 3, middle), colour=colour)
    fork, add = ends[0] + 13, (begins[6] + ends[6]) / 2
    on.arrow((fork, middle), (fork, 62), (add, 62), (add, middle - 16), colour=STREAM)
    on.text((fork + add) / 2, 54, "skip: adds channel a to channel a, b to b, ...", STREAM)
    on.box(26, 250, 12, 12, STREAM, r=3)
    on.text(44, 261, "the stream: four channels; a permutation moves every blue row and column", INK, 13, "start")
    on.box(506, 250, 12, 12, INNER, r=3)
    on.text(524, 261, "inside the branch: three channels of its own", INK, 13, "start")
    return on.svg()


def stem_and_tails() -> str:
    """The merged network of zip: a stem that all tasks read, adapters, tails."""
    on = Drawing(590, 292, "One stem, two adapters, two tails")
    shared, first, second = (STREAM, "1234"), (INNER, "abc"), (THIRD, "pqr")
    on.text(40, 151, "x")
    on.arrow((50, 146), (76, 146), colour=STREAM)
    end = weight(on, 80, 146, "stem", shared, None)
    on.arrow((end + 3, 146), (end + 27, 146), colour=STREAM)
    end = vector(on, end + 30, 146, "s", shared)
    for middle, task, own in ((78, "digits", first), (222, "fashion", second)):
        on.arrow((end + 4, 146), (end + 36, middle), colour=STREAM)
        x = weight(on, end + 40, middle, "adapter", own, shared)
        on.arrow((x + 3, middle), (x + 27, middle), colour=own[0])
        x = weight(on, x + 30, middle, "tail", None, own)
        on.arrow((x + 3, middle), (x + 27, middle), colour=own[0])
        on.text(x + 36, middle + 5, f"{task}/logits", own[0], 14, "start")
    on.text(80, 232, "computed once", STREAM, 13, "start")
    return on.svg()


PICTURES = {"channel-spaces.svg": channel_spaces, "stem-and-tails.svg": stem_and_tails}

if __name__ == "__main__":
    for name, made in PICTURES.items():
        (FOLDER / name).write_text(made(), encoding="utf-8")
