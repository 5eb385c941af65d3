"""The plan of a fuse: whose architecture, and which layer stands for which. It can be printed, edited and replayed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.labels import dims
from onnxmerge.ir.layers import Layer, find_layers
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.ir.stages import Step, find_steps
from onnxmerge.methods.align import LayerAlignment, Pair, align_layers
from onnxmerge.methods.fuse.balance import balance
from onnxmerge.methods.fuse.choices import Balance, Matching
from onnxmerge.methods.fuse.counterparts import surplus_steps
from onnxmerge.methods.fuse.settings import FuseSettings
from onnxmerge.methods.progress import Progress
from onnxmerge.methods.task import Network, Task


class FusePlan(BaseModel):
    """Whose architecture the result has, and the layer maps."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    schema_version: int = Field(default=1, alias="schema")
    method: str = "fuse"
    into: str
    layers: list[str]
    """The hidden layers and blocks of the result."""
    maps: dict[str, dict[str, str]]
    """For each other network: the name of its layer or block -> that of the one in `layers` that it stands for."""

    def to_json(self) -> str:
        """The text of plan.json."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


@dataclass(frozen=True)
class Planned:
    """What will be fused: the reference, the others, and each other's layer map (first: the reference's)."""

    plan: FusePlan
    reference: Task
    others: list[Task]
    maps: list[list[Pair]]
    notes: list[str]

    @property
    def tasks(self) -> list[Task]:
        """All networks, the reference first."""
        return [self.reference, *self.others]


def make_fuse_plan(tasks: Sequence[Task], settings: FuseSettings, progress: Progress) -> Planned:
    """Choose the reference and map every other network's layers to it.

    Raises:
        UsageError: `settings.into` or `settings.map` do not fit the networks.
        ModelError: the networks do not have one task, no layers correspond, or channels cannot be compared.
    """
    _check_task(tasks)
    reference = tasks[_reference(tasks, settings)]
    if settings.match != Matching.NONE:
        for task in tasks:
            _check_channels(task)
    others = [task for task in tasks if task is not reference]
    if settings.balance == Balance.ADD:
        reference = _deepened(reference, others, settings, progress)
    notes = [f"The fused network has the architecture of {reference.name}."]
    maps = []
    replayed = None if settings.map is None else _read(Path(settings.map))
    for task in others:
        if replayed is None:
            found = _align(reference, task, settings, progress)
            notes += found.notes
            maps.append(found.pairs)
        else:
            maps.append(_replayed(Path(settings.map or ""), replayed, reference, task))
        row = ", ".join(f"{pair.second.name} -> {pair.first.name}" for pair in maps[-1])
        notes.append(f"Layer map of {task.name}: {row}.")
    notes += [note for task in tasks for note in _few_samples(task, settings)]
    notes += [
        f"The data of {task.name} are made up: agreement and error on them say little about real inputs."
        for task in tasks
        if task.data.stand_in
    ]
    plan = FusePlan(
        into=reference.name,
        layers=[step.name for step in find_steps(reference.model)],
        maps={
            task.name: {pair.second.name: pair.first.name for pair in pairs}
            for task, pairs in zip(others, maps, strict=True)
        },
    )
    return Planned(plan, reference, others, maps, notes)


def _align(reference: Task, task: Task, settings: FuseSettings, progress: Progress) -> LayerAlignment:
    return align_layers(
        reference, task, cost=settings.cost, seed=settings.seed, threads=settings.threads, progress=progress
    )


# --- the reference ----------------------------------------------------------------------------------------------------


def _check_task(networks: Sequence[Network]) -> None:
    """The outputs of all networks agree in number and size."""
    first = networks[0]
    wanted = _heads(first)
    for other in networks[1:]:
        if _heads(other) != wanted:
            raise ModelError(
                f"{other.path}: its outputs are {_heads(other)}, those of {first.path} {wanted}: networks of one task "
                "have the same outputs; for different tasks use zip"
            )


def _heads(network: Network) -> list[list[int | None]]:
    return [list(dims(value))[1:] for value in network.model.graph.outputs]


def _reference(networks: Sequence[Network], settings: FuseSettings) -> int:
    """Number of the network whose architecture the result has."""
    if settings.into is None:
        depths = [len(find_steps(network.model)) for network in networks]
        return depths.index(min(depths) if settings.balance == Balance.COLLAPSE else max(depths))
    for number, network in enumerate(networks):
        if settings.into in (network.name, str(network.path)):
            return number
    names = ", ".join(network.name for network in networks)
    raise UsageError(f"--into {settings.into}: is none of the networks {names}")


def _check_channels(network: Network) -> None:
    """An operator without a rule between layers keeps channels in an order that means nothing to another network."""
    spaces = find_spaces(network.model)
    if not spaces.frozen:
        return
    free = {slots.name for space in spaces.spaces for slots in space.values}
    hidden = {name for step in find_steps(network.model) for name in step.layers}
    for layer in find_layers(network.model):
        if layer.name in hidden and layer.linear.name not in free:
            stop = spaces.frozen[0]
            raise ModelError(
                f"{network.path}: {stop.op} {stop.node!r}: {stop.reason}, those of the layer {layer.name!r} among "
                "them, so they cannot be matched with another network's (--match none takes them in their order)"
            )


def _deepened(reference: Task, others: Sequence[Task], settings: FuseSettings, progress: Progress) -> Task:
    """The reference with identities for the layers that deeper networks have and it lacks; the same function."""
    for task in sorted(others, key=lambda task: -len(find_steps(task.model))):
        pairs = _align(reference, task, settings, progress).pairs
        if surplus_steps(task, pairs):
            flipped = [(pair.second, pair.first) for pair in pairs]
            reference = replace(reference, model=balance(task.model, reference.model, flipped, "add").shallow)
    return reference


# --- samples ----------------------------------------------------------------------------------------------------------


def _few_samples(task: Task, settings: FuseSettings) -> list[str]:
    """A warning where a layer has more inputs than there are samples to fit them from."""
    count = len(task.data.calibration.take(settings.samples, settings.seed))
    short = [layer for layer in find_layers(task.model) if _fan_in(layer) >= count * _positions(layer)]
    if not short:
        return []
    worst = max(short, key=_fan_in)
    return [
        f"{task.name}: {count} samples are few for {len(short)} of its layers ({worst.name} reads {_fan_in(worst)} "
        "numbers): what they leave open stays near the weights that were put together. Give more samples."
    ]


def _fan_in(layer: Layer) -> int:
    return math.prod(layer.weight_shape) // max(layer.out_channels, 1)


def _positions(layer: Layer) -> int:
    """Positions of a layer's output for each sample; many, where their number is unknown."""
    if layer.op not in ("Conv", "ConvTranspose"):
        return 1
    count = 1
    for size in dims(layer.linear)[2:]:
        count *= size or 1000
    return count


# --- plans from files -------------------------------------------------------------------------------------------------


def _read(path: Path) -> FusePlan:
    try:
        return FusePlan.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot read the plan: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is not a plan of fuse: {str(error).splitlines()[0]}") from error


def _replayed(path: Path, plan: FusePlan, reference: Task, task: Task) -> list[Pair]:
    if plan.into != reference.name or task.name not in plan.maps:
        raise UsageError(f"{path}: the plan has no layer map of {task.name} into {reference.name}")
    ours, theirs = ({step.name: step for step in find_steps(own.model)} for own in (reference, task))
    places = {name: place for place, name in enumerate(ours)}, {name: place for place, name in enumerate(theirs)}
    pairs = []
    for second, first in plan.maps[task.name].items():
        for name, steps, network in ((first, ours, reference), (second, theirs, task)):
            if name not in steps:
                raise UsageError(f"{path}: {network.name} has no layer {name!r}")
        place = places[0][first], places[1][second]
        pairs.append(Pair(ours[first], theirs[second], place, float("nan"), float("nan"), None))
    pairs.sort(key=lambda pair: pair.place[1])
    crossed = next((b for a, b in pairwise(pairs) if a.place[0] >= b.place[0]), None)
    if crossed is not None:
        raise UsageError(f"{path}: the map of {task.name} must increase: {crossed.second.name!r} breaks the order")
    unlike = next((pair for pair in pairs if not _alike(pair.first, pair.second)), None)
    if unlike is not None:
        raise UsageError(f"{path}: {unlike.second.name!r} and {unlike.first.name!r} are of different kinds")
    return pairs


def _alike(first: Step, second: Step) -> bool:
    return (first.kind, first.block) == (second.kind, second.block)
