"""How to train, and what calibration trains towards."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from onnxmerge.errors import UsageError


@dataclass(frozen=True)
class Training:
    """How the engine trains, whatever the problem.

    The defaults hold for small CNNs and residual networks alike, from good and from bad starts. A faster rate repairs a
    bad start sooner but shakes networks with batch norms.

    Attributes:
        steps: optimiser steps; 0 leaves the model as it is.
        batch: samples of each task in a step.
        optimiser: "adamw" with a one-cycle schedule; "sgd" as CLAFusion fine-tunes with (table 8): momentum 0.9, weight
            decay 5e-4, the rate halved after every sixth of the steps.
        rate: the highest learning rate; for "adamw" as a share of each array's root mean square.
        seed: order of the samples and choice of those held out.
        evaluations: how often the held-out loss is measured, the start not counted.
        threads: CPU threads; None leaves torch's choice, which is slow where other processes use the same cores.
        bfloat16: compute with 8-bit mantissas while training (weights and judging stay float32); None: where the CPU
            has instructions for it, which halves the time of a step.
    """

    steps: int
    batch: int = 64
    optimiser: Literal["adamw", "sgd"] = "adamw"
    rate: float = 1e-2
    seed: int = 0
    evaluations: int = 10
    threads: int | None = None
    bfloat16: bool | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            UsageError: a number is out of its range, or a choice is none.
        """
        for name, least in {"steps": 0, "batch": 1, "evaluations": 1}.items():
            self._check(name, least <= getattr(self, name) < math.inf, f"at least {least}")
        self._check("rate", 0 < self.rate < math.inf, "above 0")
        self._check_choice("optimiser", "adamw", "sgd")
        if self.threads is not None:
            self._check("threads", self.threads >= 1, "at least 1")

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise UsageError(f"calibration: {name} must be {wanted}, not {getattr(self, name)!r}")

    def _check_choice(self, name: str, *choices: Any) -> None:
        self._check(name, getattr(self, name) in choices, " or ".join(str(choice) for choice in choices))


@dataclass(frozen=True)
class Settings(Training):
    """How to calibrate.

    The loss of a task is `kl_weight` T^2 KL + `logit_weight` logit error + `label_weight` cross-entropy +
    `feature_weight` feature loss (`onnxmerge.calibration.losses`). What has no weight costs nothing: without
    cross-entropy no labels are needed, without the others no teacher runs. Distillation after Hinton et al. 2015 is
    `kl_weight` = gamma, `label_weight` = 1 - gamma and no other (OTFusion and CLAFusion compare with it); training on
    labels alone is `label_weight` = 1 and no other.

    Feature losses help much where a tap can be matched (a task's own tail, an aligned stem) and harm where tasks pull
    one shared value towards different originals.

    Attributes:
        kl_weight: weight of the KL divergence to the teacher's softened outputs; it applies to classifiers only.
        temperature: softens the logits under the KL loss.
        logit_weight: weight of the normalised squared error of the outputs.
        label_weight: weight of the cross-entropy with the data's labels.
        feature_weight: weight of the mean feature loss over a task's taps; 0 ignores taps.
        feature_norm: "l2" squares the errors of feature maps, "l1" (Zippering MobileNets) does not.
    """

    kl_weight: float = 1.0
    temperature: float = 2.0
    logit_weight: float = 1.0
    label_weight: float = 0.0
    feature_weight: float = 3.0
    feature_norm: Literal["l1", "l2"] = "l1"

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            UsageError: a number is out of its range, a choice is none, or no loss of the outputs has a weight.
        """
        super().__post_init__()
        for name in ("kl_weight", "logit_weight", "label_weight", "feature_weight"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "at least 0")
        self._check("temperature", 0 < self.temperature < math.inf, "above 0")
        self._check_choice("feature_norm", "l1", "l2")
        if not (self.kl_weight or self.logit_weight or self.label_weight):
            raise UsageError("calibration: at least one of kl_weight, logit_weight and label_weight must be above 0")
