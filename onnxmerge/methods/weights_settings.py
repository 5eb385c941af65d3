"""What can be set in weights mode."""

from dataclasses import dataclass

from onnxmerge.methods.zip_choices import Pairing, Rule
from onnxmerge.passes.least_squares import RIDGE


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
        weights: how much each task counts in what is shared (MTZ's alpha, eq. 5); None: all alike.
        biases: share biases too, those of shared neurons.
        depthwise: share depthwise convolutions too, where all their channels are shared.
    """

    rule: Rule = Rule.LEAST_SQUARES
    pairing: Pairing = Pairing.ASSIGNMENT
    samples: int = 2000
    seed: int = 0
    threads: int | None = None
    ridge: float = RIDGE
    weights: tuple[float, ...] | None = None
    biases: bool = False
    depthwise: bool = False
