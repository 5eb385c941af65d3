"""The plan of a zip: what will be shared, before any weight is touched. It can be printed, edited and replayed."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.labels import dims
from onnxmerge.ir.layers import find_layers
from onnxmerge.methods.task import Network
from onnxmerge.methods.zip.alignment import Sharable, stem_spaces
from onnxmerge.methods.zip.choices import TREE, Mode
from onnxmerge.methods.zip.fictive import sized_for
from onnxmerge.methods.zip.stems.subspaces import Kind, kind_of
from onnxmerge.methods.zip.stems.tree import Branch, Forest
from onnxmerge.methods.zip.structure import Size, Structure, Widths, size_of
from onnxmerge.methods.zip.weights.plan import predicted_bytes
from onnxmerge.report.schema import Result

_LITTLE = 0.25
"""Up to which share of what they save adapters are kept where tasks could do without."""


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
    """How many units, from the inputs on, are shared by all tasks."""
    channels: dict[str, int] = Field(default_factory=dict)
    """By space, how many channels its shared part has, where not as many as the first network."""
    private: dict[str, int] = Field(default_factory=dict)
    """By space, how many more channels each task computes for itself, from the shared ones and its own."""
    adapters: bool = False
    """Whether tasks read stems through adapters even where their next layers can do without."""
    branches: list[Branch] = Field(default_factory=list)
    """Groups of tasks that share further."""
    predicted: Size | None = None

    @property
    def shares(self) -> bool:
        """Whether any tasks share anything."""
        return self.units > 0 or bool(self.branches)

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
        share: `auto`, `tree` (which plans the same; trees are found when these are measured), a number of units, a
            fraction of them, or the path of a plan.
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
    forest = Forest(tasks, sharable)
    matched = _matched(sharable) if mode is Mode.COMPUTE else frozenset()
    plan.candidates = _replayed(Path(share), plan, forest, matched) if Path(share).suffix == ".json" else []
    for k in [] if plan.candidates else _numbers(share, plan):
        for width, shared in itertools.product(widths, sharing) if k else [(1.0, 1.0)]:
            plan.candidates.append(_candidate(sharable, plan, k, width, shared, matched))
    for candidate in plan.candidates:
        if mode is Mode.WEIGHTS:
            candidate.private = {}  # what is not shared is a task's own
            candidate.predicted = _weights_size(tasks, sharable, candidate, plan.originals)
        else:
            candidate.predicted = predicted_size(tasks, sharable, forest, candidate)
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


def _matched(sharable: Sharable) -> frozenset[str]:
    """Spaces whose channels can only be matched one to one, so that all of them are shared."""
    stem = sharable.stem
    return frozenset(own.name for own in sharable.spaces if stem is not None and kind_of(stem, own) is Kind.MATCH)


def adapters_pay(sharable: Sharable, plan: Plan, k: int) -> bool:
    """Whether adapters behind the first k units cost little of what it saves to share the last of these."""
    if k == 0:
        return False
    cut, unit, count = sharable.cuts[k - 1], plan.units[k - 1], len(plan.tasks)
    sizes = dims(sharable.up_to(cut).graph.outputs[0])[1:]
    adapter, saved = cut.size**2, unit.parameters
    if unit.macs is not None and None not in sizes:
        adapter, saved = cut.size * math.prod(size or 0 for size in sizes), unit.macs
    return count * adapter <= _LITTLE * (count - 1) * saved


def _candidate(
    sharable: Sharable, plan: Plan, k: int, width: float, share: float, matched: frozenset[str]
) -> PlannedCandidate:
    adapters = adapters_pay(sharable, plan, k)
    name = f"k{k:02d}" + ("" if width == 1 else f"-w{width:g}") + ("" if share == 1 else f"-s{share:g}")
    if width == share == 1:
        return PlannedCandidate(name=name, units=k, adapters=adapters)
    channels, private = {}, {}
    for space in stem_spaces(sharable.up_to(sharable.cuts[k - 1])):
        if space.name in matched:
            continue
        total = max(1, round(width * space.size))
        channels[space.name] = max(1, round(share * total))
        private[space.name] = total - channels[space.name]
    private = {own: count for own, count in private.items() if count}
    return PlannedCandidate(name=name, units=k, channels=channels, private=private, adapters=adapters)


def predicted_size(tasks: Sequence[Network], sharable: Sharable, forest: Forest, candidate: PlannedCandidate) -> Size:
    """How large a candidate will be, in compute mode.

    Raises:
        ModelError: a stem cannot get the candidate's widths, or a group cannot be split behind another.
    """
    tree = forest.tree(candidate.units, candidate.branches, candidate.adapters)
    try:
        return size_of([Structure(tasks, sharable, candidate.widths).merged(tree)])
    except ModelError as error:
        raise ModelError(f"{candidate.name}: it cannot be made as planned: {error}") from error


def _numbers(share: str, plan: Plan) -> list[int]:
    deepest = len(plan.units)
    if share in ("auto", TREE):
        return list(range(deepest + 1))
    try:
        number = float(share)
    except ValueError:
        number = -1.0
    whole = share.isdigit()
    k = int(share) if whole else round(number * deepest)
    if not number >= 0 or (not whole and number > 1):
        raise UsageError(
            f"--share {share}: give auto, tree, a number of units, a fraction from 0.0 to 1.0, or a plan.json"
        )
    if k > deepest:
        raise UsageError(f"--share {share}: these networks can share at most {deepest} units: {plan.limit}")
    return [k]


def _replayed(path: Path, plan: Plan, forest: Forest, matched: frozenset[str]) -> list[PlannedCandidate]:
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
        _check(candidate, plan, matched, names, path)
        _check_branches(candidate, plan, forest, path)
        names.add(candidate.name)
    return edited.candidates


def _check(candidate: PlannedCandidate, plan: Plan, matched: frozenset[str], names: set[str], path: Path) -> None:
    name, deepest = candidate.name, len(plan.units)
    if not name.replace("-", "").replace(".", "").replace("_", "").isalnum() or name in names or name == "merged":
        raise UsageError(f"{path}: {name!r} cannot name a candidate's file, or names two")
    if not 0 <= candidate.units <= deepest:
        raise UsageError(f"{path}: {name} shares {candidate.units} units, but there are {deepest}: {plan.limit}")
    for counts, least, most in (
        (candidate.channels, 0 if plan.mode == Mode.WEIGHTS else 1, len(plan.tasks)),
        (candidate.private, 1, 1),
    ):
        for space, channels in counts.items():
            if space not in plan.spaces:
                raise UsageError(f"{path}: {name} names the channel space {space!r}, which these networks have not")
            if space in matched:
                raise UsageError(f"{path}: {name}: all channels of {space!r} are shared, since they are read together")
            size, what = plan.spaces[space] * most, "shared" if counts is candidate.channels else "private"
            if not least <= channels <= size:
                raise UsageError(
                    f"{path}: {name} has {channels} {what} channels of {space!r}, but from {least} to {size} fit"
                )


def _check_branches(candidate: PlannedCandidate, plan: Plan, forest: Forest, path: Path) -> None:
    if candidate.branches and plan.mode != Mode.COMPUTE:
        raise UsageError(f"{path}: {candidate.name} has branches, but with --mode {plan.mode} there are none")
    if candidate.branches and candidate.private:
        raise UsageError(
            f"{path}: {candidate.name} has branches and private channels: behind these no tasks share anything"
        )
    try:
        forest.tree(candidate.units, candidate.branches)
    except UsageError as error:
        raise UsageError(f"{path}: {candidate.name}: {error}") from error
