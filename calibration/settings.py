"""How to train, and what calibration trains towards."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from onnxmerge.errors import UsageError

Device = Literal["cpu", "cuda"]
"""Where to train."""
Precision = Literal["float32", "bfloat16", "float16"]
"""How precisely to compute while training."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a run under way is kept.

    Attributes:
        path: the file.
        recipe: tells apart what the loop itself cannot see: teachers and data.
        resume: go on from what is there; a file of another run, or a damaged one, is replaced.
    """

    path: Path
    recipe: str = ""
    resume: bool = False


@dataclass(frozen=True)
class Training:
    """How the engine trains, whatever the problem.

    The defaults hold for small CNNs and residual networks alike, from good and from bad starts. A faster rate repairs a
    bad start sooner but shakes networks with batch norms.

    Attributes:
        steps: optimiser steps; 0 leaves the model as it is.
        batch: samples of each task in a step.
        optimiser: "adamw" with a one-cycle schedule; "sgd" as CLAFusion fine-tunes with (table 8): momentum 0.9, weight
            decay 5e-4, the rate halved after every sixth of the steps. The next five change one or the other.
        schedule: "one-cycle" rises to the highest rate and falls to nothing; "milestones" starts from it and multiplies
            it by `gamma` at each share of the run in `milestones` (none: the rate is constant).
        momentum: of "sgd".
        weight_decay: None: 5e-4 for "sgd", 0.01 for "adamw".
        relative_rate: whether the rate is a share of each array's root mean square; None: it is for "adamw".
        rate: the highest learning rate.
        clip: gradients are scaled down to this norm, all arrays together; None: they are not.
        accumulate: batches of each task in a step; their gradients are averaged.
        patience: training ends after so many measurements of the held-out loss without gain; None: after `steps`.
        norm_statistics: "frozen": batch norms use their running statistics, as when deployed; "updating": in training
            those of the batch, and the running ones, by which the held-out loss is measured, follow them by a tenth.
        seed: order of the samples and choice of those held out.
        evaluations: how often the held-out loss is measured, the start not counted.
        threads: CPU threads; None leaves torch's choice, which is slow where other processes use the same cores.
        precision: "bfloat16" and "float16" compute with 8 and 11 bits while training; weights and judging stay float32.
            The range of "float16" is small, so the loss is scaled up: by as much as gradients bear, for where they
            overflow the step is left out and the scale halved. None: "bfloat16" where the device has instructions for
            it, which halves the time of a step on a CPU, else "float32".
        device: None: "cuda" where torch finds a GPU, else "cpu". Of several processes on one machine each has a GPU.
        cache_bytes: where a run sees samples more than once, what teachers give for them is computed before it starts
            and kept in a temporary file of at most this size; 0: it is computed in every step. Results are the same but
            for rounding.
    """

    steps: int
    batch: int = 64
    optimiser: Literal["adamw", "sgd"] = "adamw"
    rate: float = 1e-2
    schedule: Literal["one-cycle", "milestones"] | None = None
    milestones: tuple[float, ...] = (1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6)
    gamma: float = 0.5
    momentum: float = 0.9
    weight_decay: float | None = None
    relative_rate: bool | None = None
    clip: float | None = None
    accumulate: int = 1
    patience: int | None = None
    norm_statistics: Literal["frozen", "updating"] = "frozen"
    seed: int = 0
    evaluations: int = 10
    threads: int | None = None
    precision: Precision | None = None
    device: Device | None = None
    cache_bytes: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            UsageError: a number is out of its range, or a choice is none.
        """
        counts = {"steps": 0, "batch": 1, "evaluations": 1, "accumulate": 1, "patience": 1, "threads": 1}
        for name, bound in (counts | {"weight_decay": 0, "cache_bytes": 0}).items():
            value = getattr(self, name)
            self._check(name, value is None or bound <= value < math.inf, f"at least {bound}")
        for name in ("rate", "gamma", "clip"):
            value = getattr(self, name)
            self._check(name, value is None or 0 < value < math.inf, "above 0")
        self._check("momentum", 0 <= self.momentum < 1, "at least 0 and less than 1")
        self._check("milestones", all(0 < share < 1 for share in self.milestones), "shares of the run, between 0 and 1")
        self._check_choice("optimiser", "adamw", "sgd")
        self._check_choice("schedule", "one-cycle", "milestones", None)
        self._check_choice("norm_statistics", "frozen", "updating")
        self._check_choice("precision", *get_args(Precision), None)
        self._check_choice("device", *get_args(Device), None)

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise UsageError(f"calibration: {name} must be {wanted}, not {getattr(self, name)!r}")

    def _check_choice(self, name: str, *choices: Any) -> None:
        self._check(name, getattr(self, name) in choices, " or ".join(str(choice) for choice in choices if choice))


@dataclass(frozen=True)
class Settings(Training):
    """How to calibrate.

    The loss of a task is `kl_weight` T^2 KL + `logit_weight` logit error + `label_weight` label loss +
    `feature_weight` feature loss (`onnxmerge.calibration.losses`). What has no weight costs nothing: without
    a label loss no labels are needed, without the others no teacher runs. Distillation after Hinton et al. 2015 is
    `kl_weight` = gamma, `label_weight` = 1 - gamma and no other (OTFusion and CLAFusion compare with it); training on
    labels alone is `label_weight` = 1 and no other.

    Feature losses help much where a tap can be matched (a task's own tail, an aligned stem) and harm where tasks pull
    one shared value towards different originals.

    Attributes:
        kl_weight: weight of the KL divergence to the teacher's softened outputs; it applies to classifiers only.
        temperature: softens the logits under the KL loss.
        logit_weight: weight of the normalised squared error of the outputs.
        label_weight: weight of the cross-entropy with the data's class numbers, or of the mean squared error where the
            labels are not integers but what the task's first output should be.
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
