"""The plan of a gate run: which channel spaces are gated, and how many of their channels stay."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as oir
from pydantic import BaseModel, ConfigDict, Field

from onnxmerge.errors import ModelError
from onnxmerge.methods.gate.settings import GateSettings
from onnxmerge.methods.task import Network
from onnxmerge.passes.gate_places import GatePlaces, find_gate_places
from onnxmerge.passes.widen import Widen, same_architecture
from onnxmerge.passes.widen_body import WidenBody, same_bodies


class PlannedSpace(BaseModel):
    """A channel space of all networks side by side."""

    model_config = ConfigDict(extra="forbid")

    name: str
    channels: int
    """Of all networks together; a run of the first's before that of the second."""
    keep: int
    reason: str | None = None
    """Why all are kept; None where gates choose."""
    kept: dict[str, list[int]] = Field(default_factory=dict)
    """By network which of its channels were kept; empty in a plan."""


class GatePlan(BaseModel):
    """What is gated, and what is kept whole."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    schema_version: int = Field(default=1, alias="schema")
    method: str = "gate"
    networks: list[str]
    heads: Literal["mean", "apart"] = "mean"
    """"mean": the networks have one task; "apart": each keeps its outputs."""
    width: float
    """Share of the channels of all networks together that stay in a space that is gated."""
    spaces: list[PlannedSpace]

    @property
    def apart(self) -> bool:
        """Whether each network keeps its outputs."""
        return self.heads == "apart"

    @property
    def teacher(self) -> str:
        """Who teaches where labels do not."""
        return "each network itself" if self.apart else "the networks' mean prediction"

    @property
    def whole(self) -> list[PlannedSpace]:
        """The spaces that are kept whole."""
        return [space for space in self.spaces if space.reason is not None]

    def to_json(self) -> str:
        """The text of plan.json."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


@dataclass(frozen=True)
class Planned:
    """The plan, the networks side by side, and where their gates stand."""

    plan: GatePlan
    widened: oir.Model
    places: GatePlaces


def make_gate_plan(networks: Sequence[Network], settings: GateSettings) -> Planned:
    """Put the networks side by side and find where gates can stand.

    Raises:
        ModelError: the networks are of different architectures, cannot be put side by side, or nothing can be gated.
    """
    first, *others = networks
    apart = settings.heads == "apart" or (settings.heads is None and _only_heads_differ(first, others))
    widened = _widened(first, others, apart=apart)
    width = settings.width or 1 / len(networks)
    places = find_gate_places(widened, first.model, len(networks), width)
    gated = [PlannedSpace(name=own.space.name, channels=own.space.size, keep=own.keep) for own in places.spaces]
    whole = [
        PlannedSpace(name=name, channels=places.all_spaces[name].size, keep=places.all_spaces[name].size, reason=reason)
        for name, reason in places.whole.items()
    ]
    if not gated:
        reasons = "; ".join(f"{space.name}: {space.reason}" for space in whole) or "it has no hidden channels"
        raise ModelError(f"{first.path}: no channels can be chosen ({reasons})")
    order = {name: number for number, name in enumerate(places.all_spaces)}
    spaces = sorted([*gated, *whole], key=lambda space: order[space.name])
    names = [network.name for network in networks]
    plan = GatePlan(networks=names, heads="apart" if apart else "mean", width=width, spaces=spaces)
    return Planned(plan, widened, places)


def _only_heads_differ(first: Network, others: Sequence[Network]) -> bool:
    """Whether the networks are of one architecture up to their heads, and some heads are not alike."""
    if all(same_architecture(first.model, other.model) for other in others):
        return False
    return all(same_bodies(first.model, other.model) for other in others)


def _widened(first: Network, others: Sequence[Network], *, apart: bool) -> oir.Model:
    try:
        if apart:
            return WidenBody({other.name: other.model for other in others}, first.name)(first.model).model
        return Widen([other.model for other in others])(first.model).model
    except ModelError as error:
        raise ModelError(_explained(first, others, error)) from error


def _explained(first: Network, others: Sequence[Network], error: ModelError) -> str:
    """What is wrong, with files in place of numbers."""
    text = str(error)
    for number, other in enumerate(others, start=2):
        start = f"network {number} is not of the same architecture as the first: "
        if text.startswith(start):
            kept = "; --heads apart keeps the outputs of each" if same_bodies(first.model, other.model) else ""
            return other_architecture(first, other, text.removeprefix(start)) + kept
    return f"{first.path}: cannot be put beside another network of its kind: {text}"


def other_architecture(first: Network, other: Network, reason: str) -> str:
    """What is said of a network that is not like the first."""
    return (
        f"{other.path}: is not of the same architecture as {first.path}: {reason}; "
        "fuse merges networks of one task whose architectures differ, zip networks of different tasks"
    )
