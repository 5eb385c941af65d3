"""What every fit of one run shares."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxmerge.ir.layers import Layer
from onnxmerge.methods.progress import Progress
from onnxmerge.passes.least_squares import RIDGE, solve_least_squares
from onnxmerge.passes.refit import Solve
from onnxmerge.runtime.statistics import Regression


@dataclass(frozen=True)
class Fitting:
    """How closed forms are fitted."""

    samples: int
    """Unlabelled samples of each task."""
    seed: int
    threads: int | None
    folder: Path
    """Temporary files go here."""
    progress: Progress
    weights: tuple[float, ...] | None = None
    """How much each task counts; None: all alike."""

    def weight(self, number: int) -> float:
        """That of the task `number`."""
        return 1.0 if self.weights is None else self.weights[number]


def least_squares(tasks: int, ridge: float = RIDGE) -> Solve:
    """Least squares towards all tasks alike, pulled to the current weights."""

    def solve(layer: Layer, statistics: Sequence[Regression], current: np.ndarray) -> np.ndarray:
        return solve_least_squares(statistics, current, [1.0] * tasks, ridge)

    return solve
