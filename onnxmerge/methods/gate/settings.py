"""Everything that can be set for gate."""

from dataclasses import dataclass

from onnxmerge.calibration.settings import Settings
from onnxmerge.errors import UsageError


@dataclass(frozen=True)
class GateSettings:
    """What can be set; everything here goes into the recipe.

    Attributes:
        width: share of the channels of all networks together that stay in each channel space; None: 1 / networks, so
            that the result is as large as one.
        gate_steps: steps in which gates, and the weights with them, are learned.
        steps: steps of fine-tuning after pruning; 0: none.
        labels: learn from the data's labels; None: where all data have some. Without them the networks' mean teaches.
        batch: samples of each data set in a step.
        rate: highest learning rate, relative to each array's root mean square.
        max_drop: largest loss of the result against the worst original; None: no bound.
        seed: of everything drawn at random.
        threads: for onnxruntime and torch.
        providers: where latency is measured.
        measure: measure latency and memory.
    """

    width: float | None = None
    gate_steps: int = 1000
    steps: int = 1000
    labels: bool | None = None
    batch: int = 64
    rate: float = 1e-2
    max_drop: float | None = None
    seed: int = 0
    threads: int | None = None
    providers: tuple[str, ...] = ("cpu",)
    measure: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            UsageError: a number is out of its range.
        """
        if self.width is not None and not 0 < self.width <= 1:
            raise UsageError(f"--width {self.width:g}: must be above 0 and at most 1")
        if self.gate_steps < 1:
            raise UsageError(f"--gate-steps {self.gate_steps}: at least 1 is needed to choose channels")

    def training(self, steps: int, *, labels: bool) -> Settings:
        """What the trainer is told for `steps` steps."""
        return Settings(
            steps=steps,
            batch=self.batch,
            rate=self.rate,
            kl_weight=float(not labels),
            logit_weight=float(not labels),
            label_weight=float(labels),
            feature_weight=0.0,
            seed=self.seed,
            threads=self.threads,
        )
