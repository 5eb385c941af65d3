"""The plan of a zip: what will be shared, before any weight is touched. It can be printed, edited and replayed."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.layers import find_layers
from onnxmerge.methods.alignment import Sharable, stem_spaces
from onnxmerge.methods.fictive import sized_for
from onnxmerge.methods.structure import Size, Widths, merged_structure, size_of
from onnxmerge.methods.task import Network
from onnxmerge.methods.weights_plan import predicted_bytes
from onnxmerge.methods.zip_choices import Mode
from onnxmerge.report.schema import Result


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class PlannedUnit(_Part):
    """One unit that can be shared. MACs are for one sample and None where a size is unknown."""

    name: str
    kind: str
    layers: list[str]
    parameters: int
    macs: int | None


class PlannedCandidate(_Part):
    """One merged model to make. To edit a plan, change, add or remove candidates; `predicted` may be left out."""

    name: str
    units: int
    """How many units, from the inputs on, are shared."""
    channels: dict[str, int] = Field(default_factory=dict)
    """By space, how many channels its shared part has, where not as many as the first network."""
    private: dict[str, int] = Field(default_factory=dict)
    """By space, how many more channels each task computes for itself, from the shared ones and its own."""
    predicted: Size | None = None

    @property
    def widths(self) -> Widths:
        """What `channels` and `private` say."""
        return Widths(self.channels, self.private)


class Plan(_Part):
    """Which merged models will be made."""

    schema_version: int = Field(default=2, alias="schema")
    method: str = "zip"
    mode: str = "compute"
    tasks: list[str]
    units: list[PlannedUnit]
    limit: str
    """Why no deeper stem is possible."""
    spaces: dict[str, int]
    """The channel spaces of the deepest stem, and how many channels the first network has in each."""
    candidates: list[PlannedCandidate]
    originals: Size
    """All networks together."""

    def to_json(self) -> str:
        """The text of plan.json."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


def make_plan(
    tasks: Sequence[Network],
    sharable: Sharable,
    share: str,
    widths: Sequence[float] = (1.0,),
    sharing: Sequence[float] = (1.0,),
    mode: Mode = Mode.COMPUTE,
) -> Plan:
    """Plan the candidates.

    Args:
        tasks: the networks, the reference first.
        sharable: what they have in common.
        share: `auto`, a number of units, a fraction of them, or the path of a plan.
        widths: how many channels a task reads of a stem, relative to the first network; each makes candidates.
        sharing: which share of these is computed once for all tasks, the rest for each; each makes candidates.
        mode: what sharing means.

    Raises:
        UsageError: `share` is none of these, asks for more than can be shared, or the plan is of other networks.
        ModelError: a stem cannot get another width.
    """
    layers = {layer.name: layer for layer in find_layers(sharable.reference.model)}
    units = []
    for cut in sharable.cuts:
        macs = [layers[name].macs for name in cut.unit.layers]
        units.append(
            PlannedUnit(
                name=cut.unit.name,
                kind=cut.unit.kind,
                layers=list(cut.unit.layers),
                parameters=sum(layers[name].parameters for name in cut.unit.layers),
                macs=None if any(own is None for own in macs) else sum(own or 0 for own in macs),
            )
        )
    plan = Plan(
        mode=mode.value,
        tasks=[task.name for task in tasks],
        units=units,
        limit=sharable.limit,
        spaces={space.name: space.size for space in sharable.spaces},
        candidates=[],
        originals=size_of([task.model for task in tasks]),
    )
    plan.candidates = _replayed(Path(share), plan) if Path(share).suffix == ".json" else []
    for k in [] if plan.candidates else _numbers(share, plan):
        for width, shared in itertools.product(widths, sharing) if k else [(1.0, 1.0)]:
            plan.candidates.append(_candidate(sharable, k, width, shared))
    for candidate in plan.candidates:
        if mode is Mode.WEIGHTS:
            candidate.private = {}  # what is not shared is a task's own
            candidate.predicted = _weights_size(tasks, sharable, candidate, plan.originals)
        else:
            candidate.predicted = _structure_size(tasks, sharable, candidate)
    return plan


def as_made(plan: Plan, result: Result, tasks: Sequence[Network], sharable: Sharable) -> Plan:
    """The plan with the numbers of shared neurons that were decided while its candidates were made; it replays them."""
    made = {candidate.name: candidate.channels for candidate in result.candidates}
    candidates = []
    for planned in plan.candidates:
        if made.get(planned.name):
            planned = planned.model_copy(update={"channels": made[planned.name]})
            planned.predicted = _weights_size(tasks, sharable, planned, plan.originals)
        candidates.append(planned)
    return plan.model_copy(update={"candidates": candidates})


def _weights_size(tasks: Sequence[Network], sharable: Sharable, candidate: PlannedCandidate, originals: Size) -> Size:
    size = predicted_bytes(*sized_for(tasks, sharable, candidate.units), candidate.channels or candidate.units)
    saved = originals.bytes - size
    return originals.model_copy(update={"bytes": size, "parameters": originals.parameters - saved // 4})


def _candidate(sharable: Sharable, k: int, width: float, share: float) -> PlannedCandidate:
    name = f"k{k:02d}" + ("" if width == 1 else f"-w{width:g}") + ("" if share == 1 else f"-s{share:g}")
    if width == share == 1:
        return PlannedCandidate(name=name, units=k)
    channels, private = {}, {}
    for space in stem_spaces(sharable.up_to(sharable.cuts[k - 1])):
        total = max(1, round(width * space.size))
        channels[space.name] = max(1, round(share * total))
        private[space.name] = total - channels[space.name]
    return PlannedCandidate(name=name, units=k, channels=channels, private={s: n for s, n in private.items() if n})


def _structure_size(tasks: Sequence[Network], sharable: Sharable, candidate: PlannedCandidate) -> Size:
    cut = sharable.cuts[candidate.units - 1] if candidate.units else None
    try:
        return size_of([merged_structure(sharable, tasks, cut, candidate.widths)])
    except ModelError as error:
        raise ModelError(f"{candidate.name}: its stem cannot have these widths: {error}") from error


def _numbers(share: str, plan: Plan) -> list[int]:
    deepest = len(plan.units)
    if share == "auto":
        return list(range(deepest + 1))
    try:
        number = float(share)
    except ValueError:
        number = -1.0
    whole = share.isdigit()
    k = int(share) if whole else round(number * deepest)
    if not number >= 0 or (not whole and number > 1):
        raise UsageError(f"--share {share}: give auto, a number of units, a fraction from 0.0 to 1.0, or a plan.json")
    if k > deepest:
        raise UsageError(f"--share {share}: these networks can share at most {deepest} units: {plan.limit}")
    return [k]


def _replayed(path: Path, plan: Plan) -> list[PlannedCandidate]:
    try:
        edited = Plan.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot read the plan: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is not a plan: {' '.join(str(error).split())[:300]}") from error
    if [unit.layers for unit in edited.units] != [unit.layers for unit in plan.units]:
        raise UsageError(f"{path}: the plan was made for other networks: its units are not those of {plan.tasks}")
    if edited.mode != plan.mode:
        raise UsageError(f"{path}: the plan is for --mode {edited.mode}, not {plan.mode}")
    if not edited.candidates:
        raise UsageError(f"{path}: the plan has no candidates")
    names: set[str] = set()
    for candidate in edited.candidates:
        _check(candidate, plan, names, path)
        names.add(candidate.name)
    return edited.candidates


def _check(candidate: PlannedCandidate, plan: Plan, names: set[str], path: Path) -> None:
    name, deepest = candidate.name, len(plan.units)
    if not name.replace("-", "").replace(".", "").replace("_", "").isalnum() or name in names or name == "merged":
        raise UsageError(f"{path}: {name!r} cannot name a candidate's file, or names two")
    if not 0 <= candidate.units <= deepest:
        raise UsageError(f"{path}: {name} shares {candidate.units} units, but there are {deepest}: {plan.limit}")
    for space, channels in (*candidate.channels.items(), *candidate.private.items()):
        if space not in plan.spaces:
            raise UsageError(f"{path}: {name} names the channel space {space!r}, which these networks have not")
        most = plan.spaces[space] * len(plan.tasks)
        least = 0 if plan.mode == Mode.WEIGHTS.value else 1
        if not least <= channels <= most:
            raise UsageError(
                f"{path}: {name} shares {channels} channels of {space!r}, which has from {least} to {most}"
            )
