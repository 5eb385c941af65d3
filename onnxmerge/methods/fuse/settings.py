"""Everything that can be set for a fuse."""

from dataclasses import dataclass, replace

from onnxmerge.calibration.settings import Device, Settings
from onnxmerge.errors import UsageError
from onnxmerge.methods.fuse.choices import Balance, LayerCost, Matching, Rule, Start, Targets
from onnxmerge.methods.fuse.counterparts import RIDGE, FuseOptions


@dataclass(frozen=True)
class FuseSettings:
    """What can be set; everything here goes into the recipe.

    Attributes:
        into: the network whose architecture the result has, by its name or path; None: the deepest, or the shallowest
            where layers are collapsed.
        rule: how aligned weights become one (see `Rule`).
        balance: what becomes of layers without a counterpart (see `FuseOptions`). With `add`, layers of others that the
            reference lacks are added to it, and the result is as deep as the deepest. None: `add`, but the result keeps
            the reference's depth.
        match: compare channels by activations or by weights, or leave them in their order.
        entropy: regularisation of optimal transport, relative to the median cost; 0 is exact.
        cost: what layer maps minimise.
        map: a plan.json whose layer maps are taken; None: they are found.
        targets: what least squares fits channels to (see `FuseOptions`); None: both are tried.
        start: what the result is before calibration: what the rule makes, the reference as it is, or the reference's
            architecture with random weights. None: what the rule makes; least squares also tries to keep the hidden
            layers of one network and to fit its output layers towards all. What agrees best with the ensemble is kept.
        weights: of each network, in order; None: all alike.
        max_drop: largest loss of the fused network against the worst original; None: no bound.
        steps: calibration steps afterwards, towards all originals; 0: closed form only.
        rate: highest learning rate, relative to each array's root mean square.
        temperature: softens the logits of student and teachers in calibration.
        distil_weight: gamma in the loss gamma KL + (1 - gamma) cross-entropy with labels, as CLAFusion distils; 0 is
            plain fine-tuning. None: KL and the error of the logits, and cross-entropy where `labels`.
        samples: unlabelled samples of each network's data.
        ridge: lambda of least squares.
        labels: calibrate with the data's labels as well.
        seed: of everything drawn at random.
        threads: for onnxruntime and torch.
        device: where calibration trains; None: on a GPU where torch finds one.
        providers: where latency is measured.
        measure: measure latency and memory.
    """

    into: str | None = None
    rule: Rule = Rule.LEAST_SQUARES
    balance: Balance | None = None
    match: Matching = Matching.ACTIVATIONS
    entropy: float = 0.0
    cost: LayerCost = LayerCost.CKA
    map: str | None = None
    targets: Targets | None = None
    start: Start | None = None
    weights: tuple[float, ...] | None = None
    max_drop: float | None = None
    steps: int = 0
    rate: float = 1e-2
    temperature: float = 2.0
    distil_weight: float | None = None
    samples: int = 10_000
    ridge: float = RIDGE
    labels: bool = False
    seed: int = 0
    threads: int | None = None
    device: Device | None = None
    providers: tuple[str, ...] = ("cpu",)
    measure: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            UsageError: a number is out of its range, or labels are weighed but not allowed.
        """
        if not 0 <= self.entropy < float("inf"):
            raise UsageError(f"--entropy {self.entropy:g}: must be 0 or more")
        if self.weights is not None and (any(not w >= 0 for w in self.weights) or not any(self.weights)):
            raise UsageError("--weights: give a weight that is not negative for each network, and one above 0")
        if self.distil_weight is None:
            return
        if not 0 <= self.distil_weight <= 1:
            raise UsageError(f"--distil-weight {self.distil_weight:g}: must be from 0 to 1")
        if self.distil_weight < 1 and not self.labels:
            raise UsageError(
                f"--distil-weight {self.distil_weight:g}: what is not distilled is learned from labels: add --labels"
            )

    def weights_of(self, networks: int) -> list[float]:
        """One weight for each network.

        Raises:
            UsageError: there are not as many as networks.
        """
        weights = [1.0] * networks if self.weights is None else list(self.weights)
        if len(weights) != networks:
            raise UsageError(f"--weights: {len(weights)} weights were given for {networks} networks")
        return weights

    @property
    def options(self) -> FuseOptions:
        """What the fusing itself is told."""
        return FuseOptions(
            rule=self.rule,
            balance=self.balance or Balance.ADD,
            match=self.match,
            entropy=self.entropy,
            targets=self.targets or Targets.SELECTED,
            ridge=self.ridge,
            samples=self.samples,
            seed=self.seed,
            threads=self.threads,
        )

    @property
    def calibration(self) -> Settings:
        """What the trainer is told."""
        common = Settings(
            steps=self.steps,
            rate=self.rate,
            temperature=self.temperature,
            label_weight=float(self.labels),
            seed=self.seed,
            threads=self.threads,
            device=self.device,
        )
        if self.distil_weight is None:
            return common
        share = self.distil_weight
        return replace(common, kl_weight=share, label_weight=1 - share, logit_weight=0.0, feature_weight=0.0)
