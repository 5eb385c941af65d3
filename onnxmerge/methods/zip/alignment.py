"""Align several networks with the first: how deep they can be shared, and which channels stand for which."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.compose import cut_out
from onnxmerge.ir.correspond import Correspondence, correspond
from onnxmerge.ir.labels import dims
from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.spaces import Space, find_spaces
from onnxmerge.ir.units import Unit, find_units
from onnxmerge.methods.pairs import pair_statistics
from onnxmerge.methods.task import Network, Task
from onnxmerge.methods.zip.fitting import Fitting
from onnxmerge.passes.align import Alignment, align_by_activations, matched
from onnxmerge.passes.fold_adapter import reading_place
from onnxmerge.report.schema import LayerSimilarity
from onnxmerge.runtime.statistics import PairStatistics


@dataclass(frozen=True)
class Cut:
    """A place where the networks can be split, behind a unit, and its channel axis."""

    unit: Unit
    axis: int
    size: int
    value: str
    """Where the reference is split: the end of the unit or, without adapters, its `reading_place`."""
    names: dict[str, str]
    """The value's name in each task's network."""
    adapted: bool = True
    """Whether each task reads the stem through an adapter."""
    direct: "Cut | None" = None
    """The same unit split where, in every network, an adapter can be folded into the layers that read it."""


@dataclass
class Sharable:
    """What the networks have in common, reckoned from their inputs.

    Attributes:
        reference: the task whose graph and channel order the stem takes.
        cuts: where a stem can end; candidate k ends at `cuts[k - 1]`.
        spaces: channel spaces of the deepest stem, in the reference network.
        partners: for each other task, which of its values and constants stand for the reference's.
        limit: why no deeper stem is possible.
        stem: the deepest.
        fictive: whether some network has fictive neurons here (see `onnxmerge.methods.zip.fictive`).
    """

    reference: Network
    cuts: list[Cut]
    spaces: list[Space]
    partners: dict[str, Correspondence]
    limit: str
    stem: oir.Model | None = None
    fictive: bool = False

    def up_to(self, cut: Cut) -> oir.Model:
        """The reference's network up to `cut`."""
        return cut_out(self.reference.model, self.reference.inputs, [cut.value])

    def before(self, cut: Cut) -> list[Cut]:
        """The cuts of the units before that of `cut`."""
        return list(itertools.takewhile(lambda other: other.unit != cut.unit, self.cuts))


@dataclass
class Aligned:
    """Channel alignment of one task with the reference.

    Attributes:
        alignment: by space.
        orders: value of the reference -> for each of its channels the task's channel.
        scales: value of the reference -> for each of its channels the factor that brings the task's channel to the
            reference's standard deviation. A positive factor passes through a ReLU, and what is read after it is
            refitted, so channels are compared in one scale.
        similarity: one record for each stem layer.
    """

    alignment: Alignment
    orders: dict[str, np.ndarray] = field(default_factory=dict)
    scales: dict[str, np.ndarray] = field(default_factory=dict)
    similarity: list[LayerSimilarity] = field(default_factory=list)


def find_sharable(tasks: Sequence[Network], until: str | None = None) -> Sharable:
    """Match the networks from their inputs on and find every place where they can be split, up to the cut `until`."""
    reference, *others = tasks
    partners = {task.name: correspond(reference.model, task.model) for task in others}
    cuts: list[Cut] = []
    limit = "what follows is each network's head"
    for unit in find_units(reference.model):
        stem = cut_out(reference.model, reference.inputs, [unit.cut])
        missing = [t for t, found in partners.items() if not _covers(found, stem)]
        if missing:
            reason = partners[missing[0]].stopped
            limit = f"{missing[0]} differs from {reference.name} at {reason[0]}" if reason else f"{missing[0]} ends"
            break
        place = _whole_axis(stem, unit.cut)
        if place is not None:
            cut = Cut(unit, *place, unit.cut, _names(reference, partners, unit.cut))
            cuts.append(replace(cut, direct=_direct(tasks, partners, cut)))
        if unit.cut == until:
            break
    sharable = Sharable(reference, cuts, [], partners, limit)
    if cuts:
        sharable.stem = sharable.up_to(cuts[-1])
        sharable.spaces = stem_spaces(sharable.stem)
    return sharable


def _names(reference: Network, partners: Mapping[str, Correspondence], value: str) -> dict[str, str]:
    return {task: found.values[value] for task, found in partners.items()} | {reference.name: value}


def _direct(tasks: Sequence[Network], partners: Mapping[str, Correspondence], cut: Cut) -> Cut | None:
    places = {task.name: reading_place(task.model, cut.names[task.name], cut.axis) for task in tasks}
    value = places[tasks[0].name]
    if value is None or any(value not in found.values for found in partners.values()):
        return None
    names = _names(tasks[0], partners, value)
    return replace(cut, value=value, names=names, adapted=False) if names == places else None


def stem_spaces(stem: oir.Model) -> list[Space]:
    """The channel spaces of a stem, whose outputs are open; blocks keep their order, what is in them not."""
    ends = frozenset(value.name or "" for value in stem.graph.outputs)
    return [space for space in find_spaces(stem, ends).permutable() if not space.blocks]


def _covers(found: Correspondence, stem: oir.Model) -> bool:
    values = all(o.name in found.values for node in stem.graph for o in node.outputs)
    return values and all(name in found.constants for name in stem.graph.initializers)


def _whole_axis(stem: oir.Model, cut: str) -> tuple[int, int] | None:
    """Axis and size of the channels of `cut`, when one whole axis is one free space."""
    for space in find_spaces(stem, frozenset([cut])).spaces:
        slots = space.value(cut)
        if slots is not None:
            whole = len(slots.axes) == 1 and slots.index.shape[1] == 1
            sizes = dims(stem.graph.outputs[0])
            return (slots.axes[0], space.size) if whole and sizes[slots.axes[0]] == space.size else None
    return None


def align(
    sharable: Sharable, task: Task, tasks: Sequence[Task], *, samples: int, seed: int, threads: int | None
) -> Aligned:
    """Align `task` with the reference by the correlation of pre-activations on every task's samples."""
    assert sharable.stem is not None
    places = _places(sharable)
    statistics = pair_statistics(
        sharable.reference,
        task,
        task.model,
        tasks,
        sharable.partners[task.name].values,
        places,
        samples=samples,
        seed=seed,
        threads=threads,
    )
    aligned = Aligned(align_by_activations(sharable.spaces, statistics))
    carriers = {o.name or "": o for node in sharable.stem.graph for o in node.outputs}
    for space in sharable.spaces:
        order = aligned.alignment[space.name]
        own = [(statistics[slots.name], slots.index[:, 0]) for slots in space.values if slots.name in places]
        ratio = _scale(own, order) if own else None
        for slots in space.values:  # several spaces may lie side by side in one value
            size = math.prod(dims(carriers[slots.name])[axis] or 0 for axis in slots.axes)
            aligned.orders.setdefault(slots.name, np.arange(size))[slots.index] = slots.index[order]
            if ratio is not None:
                aligned.scales.setdefault(slots.name, np.ones(size, np.float32))[slots.index] = ratio[:, None]
    aligned.similarity = _similarity(sharable, aligned.orders, statistics)
    return aligned


def align_all(sharable: Sharable, tasks: Sequence[Task], fitting: Fitting) -> dict[str, Aligned]:
    """Align every task but the first with the first."""
    fitting.progress.stage("align", len(tasks) - 1)
    aligned = {}
    for task in tasks[1:]:
        aligned[task.name] = align(
            sharable, task, tasks, samples=fitting.samples, seed=fitting.seed, threads=fitting.threads
        )
        fitting.progress.advance(task.name)
    return aligned


def _places(sharable: Sharable) -> dict[str, int]:
    """The channel axis of each pre-activation and cut of the stem in which every channel has one slot."""
    assert sharable.stem is not None
    wanted = {layer.pre_activation.name for layer in find_layers(sharable.stem)}
    wanted |= {cut.unit.cut for cut in sharable.cuts}
    return {
        slots.name: slots.axes[0]
        for space in sharable.spaces
        for slots in space.values
        if slots.name in wanted and len(slots.axes) == 1 and slots.index.shape == (space.size, 1)
    }


def _scale(statistics: list[tuple[PairStatistics, np.ndarray]], order: np.ndarray) -> np.ndarray:
    """Ratio of the reference's standard deviation to the matched channel's, pooled over the places of a space.

    Each place comes with the channels of the value that belong to the space.
    """
    ours = np.sqrt(sum(s.deviations()[0][index] ** 2 for s, index in statistics))
    theirs = np.sqrt(sum(s.deviations()[1][index] ** 2 for s, index in statistics))[order]
    alive = (ours > 1e-6) & (theirs > 1e-6)
    return np.where(alive, ours / np.where(alive, theirs, 1.0), 1.0)


def _similarity(
    sharable: Sharable,
    orders: dict[str, np.ndarray],
    statistics: dict[str, PairStatistics],
) -> list[LayerSimilarity]:
    assert sharable.stem is not None
    unit_of = {layer: n for n, cut in enumerate(sharable.cuts, start=1) for layer in cut.unit.layers}
    records = []
    for layer in find_layers(sharable.stem):
        name = layer.pre_activation.name or ""
        if name not in statistics or layer.name not in unit_of:
            continue
        correlation = statistics[name].correlation()
        order = orders[name]
        records.append(
            LayerSimilarity(
                unit=unit_of[layer.name],
                layer=layer.name,
                channels=len(order),
                correlation=matched(correlation, order),
                correlation_unaligned=matched(correlation, np.arange(len(order))),
                cka=statistics[name].cka(),
            )
        )
    return records
