"""How far a merged model's outputs may be from the originals', and how far they are, output by output."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tolerance:
    """A value may differ from the original's by `atol + rtol |original|`; None: no such part."""

    atol: float | None = None
    rtol: float | None = None

    def allowed(self, original: np.ndarray) -> np.ndarray:
        """The largest difference that passes, value by value."""
        return (self.atol or 0.0) + (self.rtol or 0.0) * np.abs(original)


@dataclass
class Gap:
    """How far one output is from the original's, over batches.

    A value that is no number, or another infinity than the original's, differs by infinity.
    """

    tolerance: Tolerance
    compared: int = 0
    violations: int = 0
    """Values that differ by more than the tolerance."""
    largest: float = 0.0
    """The largest |merged - original|."""
    largest_share: float = 0.0
    """The largest |merged - original| / |original|."""
    largest_excess: float = 0.0
    """The largest |merged - original| / allowed."""

    def update(self, merged: np.ndarray, original: np.ndarray) -> None:
        """Add a batch: two arrays of one shape."""
        theirs = original.astype(np.float64)
        with np.errstate(invalid="ignore"):
            gap = np.where(merged == original, 0.0, np.abs(merged.astype(np.float64) - theirs))
            allowed = self.tolerance.allowed(theirs)
        gap = np.where(np.isfinite(gap), gap, np.inf)
        # Of an infinite original nothing is close but the same.
        allowed = np.where(np.isfinite(theirs), allowed, 0.0)
        self.compared += gap.size
        self.violations += int((gap > allowed).sum())
        self.largest = max(self.largest, float(gap.max(initial=0.0)))
        self.largest_share = max(self.largest_share, _largest_ratio(gap, np.abs(theirs)))
        self.largest_excess = max(self.largest_excess, _largest_ratio(gap, allowed))


def _largest_ratio(gap: np.ndarray, size: np.ndarray) -> float:
    """The largest gap / size; no gap is 0 of anything, and any gap is infinite where `size` is 0 or not finite."""
    differing = gap > 0
    sizes = size[differing]
    ratios = np.divide(gap[differing], sizes, out=np.full(sizes.shape, np.inf), where=(sizes > 0) & np.isfinite(sizes))
    return float(ratios.max(initial=0.0))
