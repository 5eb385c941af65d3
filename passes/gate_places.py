"""Where a widened network's channels can be gated: for each channel space, what reads it and how many of it stay.

A gate g_c for each channel c of a space multiplies what every layer reads of it,

    W (f * g) = (W diag g) f,

so it stands behind the activation and never before a norm, and all who read one residual stream read through one
vector: a space is one however many blocks write to it. A channel whose gate is 0 contributes nothing, whatever
carries it (norms, activations, skips, depthwise layers), so leaving it out changes nothing (see `prune`).

Source: Pašen and Boža, Merging of neural networks, section 2.2 and figure 6.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.labels import dims, rank
from onnxmerge.ir.rules.registry import integer, required
from onnxmerge.ir.space import Slots, Space
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.passes.beside_alone import original_title
from onnxmerge.passes.prune import Prune
from onnxmerge.passes.resize import sizes_of
from onnxmerge.passes.roles import read_axis, why_not_alone

OPEN = -1
"""The gate of a position that has none."""


@dataclass(frozen=True)
class GatedSpace:
    """A space whose channels have gates: channel c of `space` has the gate `first + c`, and `keep` of them stay."""

    space: Space
    first: int
    keep: int

    @property
    def gates(self) -> slice:
        """Its gates among those of all spaces."""
        return slice(self.first, self.first + self.space.size)


@dataclass(frozen=True)
class GatedValue:
    """A value of `rank` axes that layers read through gates; position p along `axis` has gate number `gate[p]`."""

    name: str
    rank: int
    axis: int
    gate: np.ndarray
    readers: tuple[int, ...]
    """Of these layers, by the number of each among the nodes."""


@dataclass(frozen=True)
class GatePlaces:
    """All that is gated, and by name the spaces that are kept whole, each with the reason."""

    spaces: tuple[GatedSpace, ...]
    values: tuple[GatedValue, ...]
    whole: Mapping[str, str]
    all_spaces: Mapping[str, Space]

    @property
    def count(self) -> int:
        """How many gates there are."""
        return sum(own.space.size for own in self.spaces)

    def kept(self, importance: np.ndarray) -> dict[str, np.ndarray]:
        """By space the channels of the largest `importance` [gates], ascending; of equal ones the first."""
        found = {}
        for own in self.spaces:
            order = np.argsort(-importance[own.gates], kind="stable")
            found[own.space.name] = np.sort(order[: own.keep])
        return found

    def closed(self, kept: Mapping[str, np.ndarray]) -> np.ndarray:
        """[gates] of truth values: which belong to channels that are not `kept`."""
        closed = np.ones(self.count, bool)
        for own in self.spaces:
            closed[own.first + kept[own.space.name]] = False
        return closed


def find_gate_places(widened: oir.Model, network: oir.Model, networks: int, width: float) -> GatePlaces:
    """Where the gates of a widened network stand.

    Args:
        widened: `networks` networks side by side (see `widen`).
        network: the first of them.
        networks: how many there are.
        width: share of each space's channels that stay; 1 / networks gives spaces as wide as one network's.
    """
    spaces = {space.name: space for space in find_spaces(widened).spaces}
    narrow = {space.name: space.size for space in find_spaces(network).spaces}
    single = [space for space in spaces.values() if not space.blocks and space.size > 1]
    whole = {}
    for space in single:
        reason = _why_whole(widened, space, networks * narrow.get(space.name, 0))
        if reason is not None:
            whole[space.name] = reason
    keep = {s.name: max(1, round(width * s.size)) for s in single if s.name not in whole}
    whole |= _not_prunable(widened, spaces, keep)
    gated, first = [], 0
    for space in single:
        if space.name not in whole:
            gated.append(GatedSpace(space, first, keep[space.name]))
            first += space.size
    return GatePlaces(tuple(gated), tuple(_gated_values(widened, gated)), whole, spaces)


def reads(node: oir.Node, index: int) -> bool:
    """Whether input `index` of `node` is what a layer reads with its weight, and no depthwise layer."""
    if index != 0 or read_axis(node) is None:
        return False
    groups, weight = integer(node, "group", 1), dims(required(node, 1))
    depthwise = weight[0] == groups if node.op_type == "ConvTranspose" else weight[1] == 1
    return groups == 1 or not depthwise


def channel_axis(node: oir.Node) -> int:
    """The axis of its input along which a layer reads channels."""
    return 1 if node.op_type.startswith("Conv") else rank(required(node, 0)) - 1


def _why_whole(model: oir.Model, space: Space, wanted: int) -> str | None:
    """Why a space cannot be gated, or None."""
    carried = {slots.name: slots for slots in space.values}
    is_read, grouped = False, False
    for node in model.graph:
        grouped |= integer(node, "group", 1) > 1 and any(value.name in carried for value in node.outputs)
        for index, value in enumerate(node.inputs):
            slots = carried.get(value.name or "") if value is not None else None
            if slots is None:
                continue
            grouped |= integer(node, "group", 1) > 1
            if reads(node, index):
                if slots.axes != (channel_axis(node),) or slots.axes == (0,):
                    return f"{original_title(node)}: its channels lie on several axes of what it reads"
                is_read = True
                continue
            reason = why_not_alone(node, index, slots.axes)
            if reason is not None:
                return f"{original_title(node)}: {reason}"
    if space.size != wanted:
        alone = "what works on each network, or each head, alone reads or makes its channels"
        return "its channels lie in the groups of a convolution" if grouped else alone
    return None if is_read else "no layer reads it"


def _not_prunable(model: oir.Model, spaces: Mapping[str, Space], keep: Mapping[str, int]) -> dict[str, str]:
    """The spaces that cannot become narrower while those before them do, each with the reason."""
    wanted = {name: np.arange(count) for name, count in keep.items()}
    if _why_not(model, wanted, spaces) is None:
        return {}
    found: dict[str, str] = {}
    chosen: dict[str, np.ndarray] = {}
    for name, channels in wanted.items():
        reason = _why_not(model, chosen | {name: channels}, spaces)
        if reason is None:
            chosen[name] = channels
        else:
            found[name] = reason
    return found


def _why_not(model: oir.Model, keep: Mapping[str, np.ndarray], spaces: Mapping[str, Space]) -> str | None:
    try:
        Prune(keep, spaces)(model)
    except ModelError as error:
        return str(error)
    return None


def _gated_values(model: oir.Model, gated: Iterable[GatedSpace]) -> list[GatedValue]:
    carried: dict[str, list[tuple[GatedSpace, Slots]]] = {}
    for own in gated:
        for slots in own.space.values:
            carried.setdefault(slots.name, []).append((own, slots))
    sizes, readers, axes = sizes_of(model), dict[str, list[int]](), dict[str, int]()
    for number, node in enumerate(model.graph):
        name = node.inputs[0].name if node.inputs and node.inputs[0] is not None else None
        if name in carried and reads(node, 0):
            readers.setdefault(name, []).append(number)
            axes[name] = channel_axis(node)
    values = []
    for name, numbers in readers.items():
        axis = axes[name]
        gate = np.full(sizes[name][axis], OPEN)
        for own, slots in carried[name]:
            gate[slots.index] = own.first + np.arange(own.space.size)[:, None]
        values.append(GatedValue(name, len(sizes[name]), axis, gate, tuple(numbers)))
    return values
