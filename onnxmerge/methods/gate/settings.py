"""Everything that can be set for gate."""

from dataclasses import dataclass, replace
from typing import Literal

from onnxmerge.calibration.settings import Device, Settings
from onnxmerge.errors import UsageError


@dataclass(frozen=True)
class GateSettings:
    """What can be set; everything here goes into the recipe.

    Attributes:
        width: share of the channels of all networks together that stay in each channel space; None: 1 / networks, so
            that the result is as large as one.
        heads: "mean": the networks have one task, and the result makes their mean output; "apart": what follows their
            last common channels is kept for each, its outputs called `TASK/output`; None: "apart" where networks of
            one architecture have outputs that differ in shape or operators, else "mean".
        layerwise: gates are learned one channel space at a time, from what layers read in the networks themselves: less
            memory and time, for networks that are never put side by side.
        gate_steps: steps in which gates, and the weights with them, are learned; without `layerwise`.
        steps: steps of fine-tuning after pruning; 0: none.
        labels: learn from the data's labels; None: where all data have some, and with heads apart where each network
            has data of its own. Without them the networks' mean teaches, or of heads apart each network its own.
        mean_weight: where a classifier is fine-tuned on labels, the weight of the KL divergence to what teaches without
            them beside that of the labels, which is 1; 0: labels alone, as published.
        batch: samples of each data set in a step.
        optimiser: "adamw", its rate relative to each array's root mean square and in one cycle; or "sgd", at a constant
            rate while gates are learned.
        rate: highest learning rate. That of "adamw" is four times what other methods calibrate with: gates and the
            weights between the networks have far to go, and lower rates gave worse students on perceptrons, LeNet and
            a residual network alike.
        milestones: of "sgd": at these shares of fine-tuning the rate is divided by ten.
        max_drop: largest loss of the result against the worst original; None: no bound.
        seed: of everything drawn at random.
        threads: for onnxruntime and torch.
        device: where it trains; None: on a GPU where torch finds one.
        providers: where latency is measured.
        measure: measure latency and memory.
    """

    width: float | None = None
    heads: Literal["mean", "apart"] | None = None
    layerwise: bool = False
    gate_steps: int = 1000
    steps: int = 1000
    labels: bool | None = None
    mean_weight: float = 2.0
    batch: int = 64
    optimiser: Literal["adamw", "sgd"] = "adamw"
    rate: float = 4e-2
    milestones: tuple[float, ...] = ()
    max_drop: float | None = None
    seed: int = 0
    threads: int | None = None
    device: Device | None = None
    providers: tuple[str, ...] = ("cpu",)
    measure: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            UsageError: a number is out of its range.
        """
        if self.width is not None and not 0 < self.width <= 1:
            raise UsageError(f"--width {self.width:g}: must be above 0 and at most 1")
        if self.heads not in ("mean", "apart", None):
            raise UsageError(f"--heads {self.heads}: must be mean or apart")
        if self.layerwise and self.heads == "apart":
            raise UsageError("--layerwise: the networks must have one task; leave out --heads apart")
        if self.gate_steps < 1:
            raise UsageError(f"--gate-steps {self.gate_steps}: at least 1 is needed to choose channels")
        if not 0 <= self.mean_weight < float("inf"):
            raise UsageError(f"--mean-weight {self.mean_weight:g}: must be 0 or more")
        self.learning(labels=True)  # refuses a rate, a batch or an optimiser that cannot be, before anything is read
        self.tuning(labels=True)

    def learning(self, *, labels: bool) -> Settings:
        """What the trainer is told while gates are learned."""
        return self._training(self.gate_steps, labels)

    def tuning(self, *, labels: bool) -> Settings:
        """What the trainer is told afterwards."""
        training = replace(self._training(self.steps, labels), milestones=self.milestones)
        return replace(training, kl_weight=self.mean_weight) if labels else training

    def _training(self, steps: int, labels: bool) -> Settings:
        plain = self.optimiser == "sgd"
        return Settings(
            steps=steps,
            batch=self.batch,
            optimiser=self.optimiser,
            rate=self.rate,
            schedule="milestones" if plain else "one-cycle",
            milestones=(),
            gamma=0.1,
            weight_decay=0.0 if plain else None,
            norm_statistics="updating",
            kl_weight=float(not labels),
            logit_weight=float(not labels),
            label_weight=float(labels),
            feature_weight=0.0,
            seed=self.seed,
            threads=self.threads,
            device=self.device,
        )
