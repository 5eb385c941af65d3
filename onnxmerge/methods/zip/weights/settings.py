"""What can be set in weights mode."""

from dataclasses import dataclass

from onnxmerge.methods.zip.choices import Pairing, Rule
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
        max_difference: share a pair of neurons only where its functional difference (MTZ, eq. 12), relative to the mean
            energy of the layer's neurons, is at most this (MTZ's threshold, section 3.4); None: as many as planned.
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
    max_difference: float | None = None
    biases: bool = False
    depthwise: bool = False
