"""How to calibrate."""

from dataclasses import dataclass
from typing import Literal

from onnxmerge.errors import UsageError


@dataclass(frozen=True)
class Settings:
    """How to calibrate.

    The defaults hold for small CNNs and residual networks alike, from good and from bad starts. A faster rate repairs a
    bad start sooner but shakes networks with batch norms. Feature losses help much where a tap can be matched (a task's
    own tail, an aligned stem) and harm where tasks pull one shared value towards different originals.

    Attributes:
        steps: optimiser steps; 0 leaves the model as it is.
        batch: samples of each task in a step.
        rate: the highest learning rate of the one-cycle schedule, as a share of each array's root mean square.
        temperature: softens the logits under the KL loss.
        feature_weight: weight of the mean feature loss over a task's taps; 0 ignores taps.
        feature_norm: "l2" squares the errors of feature maps, "l1" (Zippering MobileNets) does not.
        use_labels: add cross-entropy with the data's labels.
        seed: order of the samples and choice of those held out.
        evaluations: how often the held-out loss is measured, the start not counted.
        threads: CPU threads; None leaves torch's choice, which is slow where other processes use the same cores.
        bfloat16: compute with 8-bit mantissas while training (weights and judging stay float32); None: where the CPU
            has instructions for it, which halves the time of a step.
    """

    steps: int
    batch: int = 64
    rate: float = 1e-2
    temperature: float = 2.0
    feature_weight: float = 3.0
    feature_norm: Literal["l1", "l2"] = "l1"
    use_labels: bool = False
    seed: int = 0
    evaluations: int = 10
    threads: int | None = None
    bfloat16: bool | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            UsageError: a number is out of its range.
        """
        for name, least in {"steps": 0, "batch": 1, "evaluations": 1, "feature_weight": 0}.items():
            if getattr(self, name) < least:
                raise UsageError(f"calibration: {name} must be at least {least}, not {getattr(self, name)}")
        for name in ("rate", "temperature"):
            if not getattr(self, name) > 0:
                raise UsageError(f"calibration: {name} must be above 0, not {getattr(self, name)}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"calibration: threads must be at least 1, not {self.threads}")
