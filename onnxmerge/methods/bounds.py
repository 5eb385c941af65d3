"""The bounds that `validate` and `bench` are given, and how measured figures are held against them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onnxmerge.errors import UsageError
from onnxmerge.methods.tolerance import Gap, Tolerance
from onnxmerge.report.schema import BoundCheck, TaskScore


@dataclass(frozen=True)
class Bounds:
    """What a merged model must keep; None: not asked.

    Attributes:
        atol: every output may differ from the original's by this much,
        rtol: plus this share of the original's magnitude.
        max_drop: largest loss of the worst task (see `TaskScore.drop`).
        min_speedup: least speed-up over the originals in spin-stopped sessions.
        min_agreement: least share of samples on which the worst classifier names its original's class.
        max_bytes: largest file, external data included.
        output_atol: by an output's name, `TASK/output`, what goes before `atol`.
        output_rtol: the same for `rtol`.
    """

    atol: float | None = None
    rtol: float | None = None
    max_drop: float | None = None
    min_speedup: float | None = None
    min_agreement: float | None = None
    max_bytes: int | None = None
    output_atol: Mapping[str, float] = field(default_factory=dict)
    output_rtol: Mapping[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether anything is asked."""
        return self != Bounds()

    def options(self) -> dict[str, object]:
        """By the names of options what the command line takes."""
        tolerances = {"atol": (self.atol, self.output_atol), "rtol": (self.rtol, self.output_rtol)}
        numbers = ("max_drop", "min_agreement", "max_bytes", "min_speedup")
        return {
            name: [*([] if every is None else [every]), *(f"{output}={own}" for output, own in outputs.items())]
            for name, (every, outputs) in tolerances.items()
        } | {name: getattr(self, name) for name in numbers}

    def tolerances(self, outputs: Sequence[str]) -> dict[str, Tolerance]:
        """The tolerance of each of `outputs` that has one.

        Raises:
            UsageError: a tolerance names none of them.
        """
        for option, own in (("--atol", self.output_atol), ("--rtol", self.output_rtol)):
            for name in own:
                if name not in outputs:
                    raise UsageError(f"{option} {name}: there is no such output; there are {', '.join(outputs)}")
        found = {n: Tolerance(self.output_atol.get(n, self.atol), self.output_rtol.get(n, self.rtol)) for n in outputs}
        return {name: own for name, own in found.items() if own != Tolerance()}


def tolerance_check(model: str, output: str, gap: Gap) -> BoundCheck:
    """The tolerance of an output of the file `model`."""
    own = gap.tolerance
    if own.rtol is None:
        bound, limit, measured, allowed = "atol", own.atol or 0.0, gap.largest, f"{own.atol:g}"
    elif own.atol is None:
        bound, limit, measured, allowed = "rtol", own.rtol, gap.largest_share, f"{own.rtol:g} |original|"
    else:
        bound, limit, measured = "atol+rtol", 1.0, gap.largest_excess
        allowed = f"{own.atol:g} + {own.rtol:g} |original|"
    how_many = gap.violations or "none"
    text = f"{how_many} of {gap.compared} values differ by more than {allowed} (largest difference {gap.largest:.3g})"
    return BoundCheck(
        bound=bound,
        of=output,
        limit=limit,
        measured=measured,
        passed=gap.violations == 0,
        told=f"{model}: {output}: {text}",
        seconds=0.0,
    )


def score_checks(model: str, task: str, score: TaskScore, bounds: Bounds) -> list[BoundCheck]:
    """`max_drop` and `min_agreement` for a task of the file `model`."""
    found = []
    where = f"{model}: task {task}"
    if bounds.max_drop is not None:
        text = "its drop could not be measured" if score.drop is None else f"drops by {score.drop:.4f}"
        found.append(_at_most("max-drop", task, bounds.max_drop, score.drop, f"{where}: {text}"))
    if bounds.min_agreement is not None and score.agreement is not None:
        told = f"{where}: agrees with the original on {score.agreement:.4f} of the samples"
        found.append(_at_least("min-agreement", task, bounds.min_agreement, score.agreement, told))
    elif bounds.min_agreement is not None:
        told = f"{where}: names no classes, so there is no agreement"
        found.append(_held("min-agreement", task, bounds.min_agreement, None, None, told))
    return found


def size_checks(model: str, size: int, bounds: Bounds) -> list[BoundCheck]:
    """`max_bytes` for the file `model`, which takes `size` bytes."""
    if bounds.max_bytes is None:
        return []
    return [_at_most("max-bytes", model, bounds.max_bytes, size, f"{model}: takes {size:,} bytes")]


def speed_checks(model: str, speedup: float | None, bounds: Bounds, at: str = "") -> list[BoundCheck]:
    """`min_speedup` for the file `model`; `at` says at which batch size."""
    if bounds.min_speedup is None:
        return []
    text = "the speed-up could not be measured" if speedup is None else f"the speed-up is {speedup:.2f}"
    told = f"{model}{at and f', {at}'}: {text}"
    return [_at_least("min-speedup", f"{model}{at and f', {at}'}", bounds.min_speedup, speedup, told)]


def timed(checks: Sequence[BoundCheck], seconds: float) -> list[BoundCheck]:
    """The checks that one measurement of so many seconds answers."""
    return [check.model_copy(update={"seconds": seconds / len(checks)}) for check in checks]


def _at_most(bound: str, of: str, limit: float, measured: float | None, told: str) -> BoundCheck:
    """What is no number, or was not measured, keeps no bound."""
    passed = measured is not None and measured <= limit
    return _held(bound, of, limit, measured, passed, told if passed else f"{told}, at most {_number(limit)} is asked")


def _at_least(bound: str, of: str, limit: float, measured: float | None, told: str) -> BoundCheck:
    passed = measured is not None and measured >= limit
    return _held(bound, of, limit, measured, passed, told if passed else f"{told}, at least {_number(limit)} is asked")


def _number(limit: float) -> str:
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"


def _held(bound: str, of: str, limit: float, measured: float | None, passed: bool | None, told: str) -> BoundCheck:
    return BoundCheck(bound=bound, of=of, limit=limit, measured=measured, passed=passed, told=told, seconds=0.0)
