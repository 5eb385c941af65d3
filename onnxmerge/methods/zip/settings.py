"""What can be set of a zip."""

from dataclasses import dataclass
from math import inf

from onnxmerge.calibration.settings import Device
from onnxmerge.errors import UsageError
from onnxmerge.methods.zip.choices import TREE, Mode, Pairing, Rule, Start


@dataclass(frozen=True)
class ZipSettings:
    """What can be set; everything here goes into the recipe.

    Attributes:
        share: "auto" (all k), "tree" (these, then groups of tasks that share further within `max_drop`), a number k, a
            fraction of the units, or the path of an edited plan.
        width: how many channels a task reads of a stem, relative to the first network; each makes candidates.
        sharing: which share of these is computed once for all tasks, the rest for each; each makes candidates.
        max_drop, max_bytes, min_speedup: the bounds (see `Bounds`).
        steps: calibration steps of each candidate; 0 leaves the closed form.
        rate: peak learning rate of calibration, as a share of each array's root mean square.
        samples: unlabelled samples of each task for the closed form.
        mode: compute shared channels once, or hold shared weights once.
        rule, pairing: how weights are shared in that mode (see `WeightSharing`).
        max_difference: share neurons only as far as they differ by this at most, in that mode (see `WeightSharing`).
        retrain: calibration steps after each shared layer in that mode, as in MTZ; tails are then left to it.
        start: stems to try for each candidate; the one with the better worst task on held-out samples is calibrated.
            Stems of another width start from the subspace.
        labels: use the labels of the calibration samples.
        weights: how much each task counts in what is shared; None: all alike.
        seed: of everything drawn at random.
        threads: for onnxruntime and torch; None leaves the choice to them.
        device: where calibration trains; None: on a GPU where torch finds one.
        providers: where latency is measured.
        measure: whether latency and memory are measured.
    """

    share: str = "auto"
    width: tuple[float, ...] = (1.0,)
    sharing: tuple[float, ...] = (1.0,)
    max_drop: float | None = 0.01
    max_bytes: int | None = None
    min_speedup: float | None = None
    mode: Mode = Mode.COMPUTE
    rule: Rule = Rule.LEAST_SQUARES
    pairing: Pairing = Pairing.ASSIGNMENT
    max_difference: float | None = None
    retrain: int = 0
    steps: int = 300
    rate: float = 1e-2
    samples: int = 2000
    start: tuple[Start, ...] = (Start.SUBSPACE, Start.LEAST_SQUARES, Start.KEEP)
    labels: bool = False
    weights: tuple[float, ...] | None = None
    seed: int = 0
    threads: int | None = None
    device: Device | None = None
    providers: tuple[str, ...] = ("cpu",)
    measure: bool = True

    def check(self, tasks: int) -> None:
        """Whether the settings fit each other and so many tasks.

        Raises:
            UsageError: the weights are not one for each task, a number is out of its range, or is for the other mode.
        """
        weights = self.weights or (1.0,) * tasks
        if len(weights) != tasks or any(not 0 < weight < inf for weight in weights):
            raise UsageError(f"--weights: give a number above 0 for each of the {tasks} tasks")
        if any(not 0 < width <= tasks for width in self.width):
            raise UsageError(f"--width: give a number above 0 and at most {tasks}, the number of tasks")
        if any(not 0 < share <= 1 for share in self.sharing):
            raise UsageError("--sharing: give a number above 0 and at most 1")
        if self.mode is Mode.WEIGHTS and set(self.width) != {1.0}:
            raise UsageError("--width: in weights mode every task keeps its own width")
        if self.share == TREE and (self.mode is Mode.WEIGHTS or {*self.width, *self.sharing} != {1.0}):
            raise UsageError(f"--share {TREE}: trees are for --mode compute, without --width and --sharing")
        if self.max_difference is not None and (self.mode is not Mode.WEIGHTS or not 0 <= self.max_difference < inf):
            raise UsageError("--max-difference: give a number of at least 0, and --mode weights")
