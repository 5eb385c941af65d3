"""The bounds that a merged model must keep, and which candidate is chosen within them."""

from collections.abc import Sequence
from dataclasses import dataclass

from onnxmerge.methods.zip.plan import PlannedCandidate
from onnxmerge.report.schema import Candidate

_DOUBT = 0.7
"""A candidate is not made when its predicted speed-up is below this share of what is asked: latency follows MACs only
roughly."""


@dataclass(frozen=True)
class Bounds:
    """What is asked of the chosen model; None asks nothing.

    Attributes:
        max_drop: the largest loss of the worst task (see `TaskScore.drop`).
        max_bytes: the largest file.
        min_speedup: the least speed-up against the originals, measured, or by MACs where latency was not measured.
        original_macs: of all originals together.
    """

    max_drop: float | None
    max_bytes: int | None
    min_speedup: float | None
    original_macs: int | None

    def why_not(self, planned: PlannedCandidate) -> str:
        """Why a candidate need not even be made; empty when it may keep the bounds."""
        assert planned.predicted is not None
        size, macs = planned.predicted.bytes, planned.predicted.macs
        if self.max_bytes is not None and size > self.max_bytes:
            return f"its arrays alone take {size:,} bytes, and {self.max_bytes:,} are allowed"
        speedup = self._ratio(macs)
        if self.min_speedup is not None and speedup is not None and speedup < _DOUBT * self.min_speedup:
            return f"by its multiply-accumulates it is {speedup:.2f} times as fast, and {self.min_speedup:g} is asked"
        return ""

    def choose(self, candidates: Sequence[Candidate]) -> Candidate | None:
        """The one that saves most of those that keep all bounds; without `max_drop` but with another bound, the one
        whose worst task loses least."""
        within = [c for c in candidates if not self.missed(c)]
        budget = self.max_bytes is not None or self.min_speedup is not None
        if self.max_drop is None and budget:
            return min(within, key=lambda c: (c.worst_drop or 0.0, -c.share), default=None)
        if all(c.macs is not None for c in within):
            return min(within, key=lambda c: (c.macs or 0, -c.share), default=None)
        return max(within, key=lambda c: c.share, default=None)

    def missed(self, candidate: Candidate) -> list[str]:
        """One clause for each bound that the candidate does not keep."""
        found, drop, speedup = [], candidate.worst_drop or 0.0, self.speedup(candidate)
        if self.max_drop is not None and drop > self.max_drop:
            found.append(f"its worst task loses {drop:.4f} (--max-drop {self.max_drop:g})")
        if self.max_bytes is not None and candidate.bytes > self.max_bytes:
            found.append(f"it takes {candidate.bytes:,} bytes (--max-bytes {self.max_bytes:,})")
        if self.min_speedup is not None and (speedup is None or speedup < self.min_speedup):
            shown = "of unknown speed" if speedup is None else f"{speedup:.2f} times as fast"
            found.append(f"it is {shown} (--min-speedup {self.min_speedup:g})")
        return found

    def closest(self, candidates: Sequence[Candidate]) -> str:
        """A sentence that says which candidate missed the bounds by least."""
        if not candidates:
            return "No candidate can keep the bounds, so none was made."
        best = min(candidates, key=lambda c: (len(self.missed(c)), self._excess(c)))
        return f"No candidate keeps the bounds; {best.name} came closest: {', '.join(self.missed(best))}."

    def speedup(self, candidate: Candidate) -> float | None:
        """Measured where it was, else by multiply-accumulates."""
        measured = candidate.latency_ms.speedup
        return self._ratio(candidate.macs) if measured is None else measured

    def _ratio(self, macs: int | None) -> float | None:
        return self.original_macs / macs if macs and self.original_macs else None

    def _excess(self, candidate: Candidate) -> float:
        """The largest relative distance to a bound."""
        ratios = [0.0]
        if self.max_drop is not None:
            ratios.append((candidate.worst_drop or 0.0) - self.max_drop)
        if self.max_bytes is not None:
            ratios.append(candidate.bytes / self.max_bytes - 1)
        if self.min_speedup is not None:
            ratios.append(self.min_speedup / (self.speedup(candidate) or 1e-9) - 1)
        return max(ratios)
