"""Print tables that go into RESULTS.md as they are."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def percent(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}"


def mean_spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and range of percentages over seeds."""
    mean = sum(values) / len(values)
    return f"{100 * mean:.{digits}f} ({100 * min(values):.{digits}f} to {100 * max(values):.{digits}f})"
