"""Labels beside points that do not run into each other."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from onnxmerge.report.svg import INK

CHARACTER = 6.0
LINE = 9.0
"""A label's extent in points, at the plots' font size."""
POINT = 5.0


def label_points(axis: Axes, points: Sequence[tuple[float, float, str]], right: bool = False) -> None:
    """Write each point's label beside it, leaving out those that have no free place.

    Call it when the layout is settled: places are judged in pixels.

    Args:
        axis: a drawn axis.
        points: x, y and label of each, the most important first.
        right: only to the right of the point (the end of a line), else at any corner of it.
    """
    scale = 72 / axis.figure.dpi
    centres = [scale * axis.transData.transform((x, y)) for x, y, _ in points]
    edge = scale * axis.figure.bbox.width
    taken = [] if right else [(cx - POINT, cy - POINT, cx + POINT, cy + POINT) for cx, cy in centres]
    for (x, y, text), (cx, cy) in zip(points, centres, strict=True):
        wide = CHARACTER * len(text)
        for dx, dy, anchor in _places(right):
            left = cx + dx - (wide if anchor == "right" else wide / 2 if anchor == "center" else 0)
            box = (left, cy + dy - LINE / 2, left + wide, cy + dy + LINE / 2)
            own = (cx - POINT, cy - POINT, cx + POINT, cy + POINT)
            if box[0] < 0 or box[2] > edge or any(_overlap(box, other) for other in taken if other != own):
                continue
            note = axis.annotate(
                text, (x, y), xytext=(dx, dy), textcoords="offset points", ha=anchor, va="center", color=INK
            )
            note.set_in_layout(False)
            taken.append(box)
            break


def room_at_the_right(axis: Axes, texts: Sequence[str]) -> None:
    """Widen the axis so that the longest of `texts` fits to the right of its last point."""
    wide = 2 * POINT + CHARACTER * max(map(len, texts), default=0)
    share = wide / (72 / axis.figure.dpi * axis.figure.bbox.width - 2 * wide)
    left, right = axis.get_xlim()
    axis.set_xlim(left, max(right, axis.dataLim.x1 + share * (axis.dataLim.x1 - axis.dataLim.x0)))


def _places(right: bool) -> list[tuple[float, float, str]]:
    """Offsets from the point in points, the preferred first."""
    if right:
        return [(6, 0, "left")]
    return [(0, 12, "center"), (0, -12, "center"), (9, 0, "left"), (-9, 0, "right")]


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
