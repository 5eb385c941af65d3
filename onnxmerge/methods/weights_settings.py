"""What can be set in weights mode."""

from dataclasses import dataclass
from enum import StrEnum

from onnxmerge.passes.least_squares import RIDGE


class Rule(StrEnum):
    """How shared weights are made; see `onnxmerge.passes.shared_weights`."""

    LEAST_SQUARES = "least-squares"
    MTZ = "mtz"


class Pairing(StrEnum):
    """How neurons are paired."""

    CORRELATION = "correlation"
    """As `align` did, by the correlation of activations."""
    GREEDY = "greedy"
    """By MTZ's functional difference, the cheapest pair first, as published."""
    ASSIGNMENT = "assignment"
    """By MTZ's functional difference, the least sum."""


@dataclass(frozen=True)
class WeightSharing:
    """How weights are shared.

    Attributes:
        rule: how shared weights are made.
        pairing: how neurons are paired.
        samples: unlabelled samples of each task.
        seed: of the choice of samples and positions.
        threads: for onnxruntime.
        ridge: of least squares.
        biases: share biases too, those of shared neurons.
        depthwise: share depthwise convolutions too, where all their channels are shared.
    """

    rule: Rule = Rule.LEAST_SQUARES
    pairing: Pairing = Pairing.ASSIGNMENT
    samples: int = 2000
    seed: int = 0
    threads: int | None = None
    ridge: float = RIDGE
    biases: bool = False
    depthwise: bool = False
