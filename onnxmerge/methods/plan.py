"""The plan of a zip: what will be shared, before any weight is touched. It can be printed, edited and replayed."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxmerge.errors import UsageError
from onnxmerge.ir.compose import cut_out
from onnxmerge.ir.layers import Layer, find_layers
from onnxmerge.methods.alignment import Sharable
from onnxmerge.methods.task import Network


class PlannedUnit(BaseModel):
    """One unit that can be shared. MACs are for one sample and None where a size is unknown."""

    model_config = ConfigDict(extra="forbid")

    name: str
    kind: str
    layers: list[str]
    parameters: int
    macs: int | None


class Plan(BaseModel):
    """Which stems will be tried."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    schema_version: int = Field(default=1, alias="schema")
    method: str = "zip"
    mode: str = "compute"
    tasks: list[str]
    units: list[PlannedUnit]
    limit: str
    """Why no deeper stem is possible."""
    share: list[int]
    """The numbers k of units to try; edit this list and pass the file as `--share`."""
    predicted_macs: dict[int, int | None]
    """For each k in `share`, multiply-accumulates of all tasks together for one sample, adapters included."""
    original_macs: int | None

    def to_json(self) -> str:
        """The text of plan.json."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


def make_plan(tasks: Sequence[Network], sharable: Sharable, share: str) -> Plan:
    """The plan that `share` asks for: "auto", a number k, a fraction of the units, or the path of a plan.

    Raises:
        UsageError: `share` is none of these, asks for more than can be shared, or the plan is of other networks.
    """
    layers = {layer.name: layer for layer in find_layers(sharable.reference.model)}
    units = [
        PlannedUnit(
            name=cut.unit.name,
            kind=cut.unit.kind,
            layers=list(cut.unit.layers),
            parameters=sum(layers[name].parameters for name in cut.unit.layers),
            macs=_total([layers[name] for name in cut.unit.layers]),
        )
        for cut in sharable.cuts
    ]
    plan = Plan(
        tasks=[task.name for task in tasks],
        units=units,
        limit=sharable.limit,
        share=[],
        predicted_macs={},
        original_macs=_sum([_total(find_layers(task.model)) for task in tasks]),
    )
    plan.share = _chosen(share, plan)
    plan.predicted_macs = {k: _predict(plan, sharable, k) for k in plan.share}
    return plan


def _chosen(share: str, plan: Plan) -> list[int]:
    deepest = len(plan.units)
    if share == "auto":
        return list(range(deepest + 1))
    if Path(share).suffix == ".json":
        return _replayed(Path(share), plan)
    try:
        number = float(share)
    except ValueError:
        number = -1.0
    whole = share.isdigit()
    k = int(share) if whole else round(number * deepest)
    if number < 0 or (not whole and number > 1):
        raise UsageError(f"--share {share}: give auto, a number of units, a fraction from 0.0 to 1.0, or a plan.json")
    if k > deepest:
        raise UsageError(f"--share {share}: these networks can share at most {deepest} units: {plan.limit}")
    return [k]


def _replayed(path: Path, plan: Plan) -> list[int]:
    try:
        edited = Plan.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot read the plan: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is not a plan: {str(error).splitlines()[0]}") from error
    if [unit.layers for unit in edited.units] != [unit.layers for unit in plan.units]:
        raise UsageError(f"{path}: the plan was made for other networks: its units are not those of {plan.tasks}")
    wrong = [k for k in edited.share if not 0 <= k <= len(plan.units)]
    if wrong or not edited.share:
        raise UsageError(f"{path}: share must list numbers from 0 to {len(plan.units)}, not {edited.share}")
    return sorted(set(edited.share))


def _predict(plan: Plan, sharable: Sharable, k: int) -> int | None:
    """The shared units are computed once instead of once for each task; each task adds an adapter at the cut."""
    if plan.original_macs is None or any(unit.macs is None for unit in plan.units[:k]):
        return None
    tasks = len(plan.tasks)
    saved = (tasks - 1) * sum(unit.macs or 0 for unit in plan.units[:k])
    if k == 0:
        return plan.original_macs
    cut = sharable.cuts[k - 1]
    stem = cut_out(sharable.reference.model, sharable.reference.inputs, [cut.unit.cut])
    shape = stem.graph.outputs[0].shape
    if shape is None or any(not isinstance(size, int) for size in list(shape)[1:]):
        return None
    positions = 1
    for axis, size in enumerate(shape):
        if axis not in (0, cut.axis) and isinstance(size, int):
            positions *= size
    return plan.original_macs - saved + tasks * positions * cut.size**2


def _total(layers: Sequence[Layer]) -> int | None:
    return _sum([layer.macs for layer in layers])


def _sum(numbers: Sequence[int | None]) -> int | None:
    return None if any(n is None for n in numbers) else sum(n or 0 for n in numbers)
