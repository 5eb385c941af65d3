"""Walk the tasks' networks side by side, layer by layer, and let each layer share its weights.

The students are the tasks' stems as merged so far, the teachers the same stems as they were; all have one graph and one
channel order. From cut to cut their values are kept on disk, so that the cost is linear in depth.

A channel space is paired where the first layer makes it, and keeps that order wherever it lies: the channels of a
residual stream are the same at all its layers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.compose import cut_out
from onnxmerge.ir.layers import Layer, find_layers
from onnxmerge.ir.spaces import Slots, Space
from onnxmerge.ir.units import find_units
from onnxmerge.methods.zip.alignment import Cut
from onnxmerge.methods.zip.choices import Pairing, Rule
from onnxmerge.methods.zip.weights.plan import Counts, Extent, shared_rows, with_counts
from onnxmerge.methods.zip.weights.settings import WeightSharing
from onnxmerge.passes.permute import Permute
from onnxmerge.passes.refit import depends_on, set_weights_and_bias, target_of, weights_and_bias
from onnxmerge.passes.roles import read_axis
from onnxmerge.passes.shared_weights import (
    differences,
    energies,
    pair_by_assignment,
    pair_greedily,
    share_by_hessian,
    share_least_squares,
)
from onnxmerge.runtime.activations import BATCH, Samples, lockstep, store
from onnxmerge.runtime.patches import Positions, channel_axis, grid_of, input_rows, output_rows, positions_needed
from onnxmerge.runtime.statistics import Regression

_PAIRS: dict[Pairing, Callable[[np.ndarray, int], np.ndarray]] = {
    Pairing.CORRELATION: lambda cost, _: np.arange(len(cost)),  # paired before the walk
    Pairing.GREEDY: pair_greedily,
    Pairing.ASSIGNMENT: pair_by_assignment,
}


@dataclass
class Stream:
    """One task's network up to the last cut, with the reference's graph and names.

    Attributes:
        student: as merged so far.
        teacher: as it was.
        feeds: the task's samples as both read them.
        originals: the same samples as the task's own network reads them.
        count: number of samples.
        orders: for each space the task's own channel that stands for each channel.
    """

    student: oir.Model
    teacher: oir.Model
    feeds: Samples
    originals: Samples
    count: int
    orders: dict[str, np.ndarray]
    arriving: dict[str, Samples] = field(default_factory=dict)
    """Where the walk is: what the student and the teacher read."""

    def __post_init__(self) -> None:
        """Begin at the inputs."""
        self.arriving = {"student": self.feeds, "teacher": self.feeds}

    def permute(self, space: Space, order: np.ndarray) -> None:
        """Put the channels of a space in another order."""
        for model in (self.student, self.teacher):
            Permute({space.name: order}, {space.name: space})(model)
        self.orders[space.name] = self.orders[space.name][order]

    def order_at(self, value: str, axis: int, size: int, spaces: Sequence[Space]) -> np.ndarray:
        """[channels of `value`]: the task's own channel at each place."""
        order = np.arange(size)
        for space in spaces:
            slots = space.value(value)
            if slots is not None and slots.axes == (axis,):
                order[slots.index] = slots.index[self.orders[space.name]]
        return order


class Walk:
    """The walk through the stems.

    Args:
        streams: by task, the reference first.
        extent: what is shared.
        sharing: how.
        folder: for temporary files.
        start: where the walk begins, if not at the inputs: all layers up to this cut are done.

    Attributes:
        done: the layers that have been visited.
        extent: what is shared; where neurons are shared up to a difference, the counts of the spaces of layers still to
            be visited are upper bounds.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        extent: Extent,
        sharing: WeightSharing,
        folder: Path,
        start: Cut | None = None,
    ):
        assert extent.cut is not None and extent.stem is not None
        self.done: list[str] = []
        self.extent = extent
        self._streams, self._all = streams, list(streams.values())
        self._sharing, self._folder = sharing, folder
        self._cuts = [*(unit.cut for unit in find_units(extent.stem)), extent.cut.unit.cut]
        self._inputs = [value.name or "" for value in extent.stem.graph.inputs]
        self._at, self._cut = self._inputs, self._cuts[0]
        self._numbers = {layer.name: number for number, layer in enumerate(find_layers(extent.stem))}
        self._decided: set[str] = set()
        self._weights = sharing.weights or (1.0,) * len(streams)
        if start is not None:
            self._begin_at(start.unit.cut)

    def layers(self) -> Iterator[str]:
        """Share one layer after the other; yields the name of each that is done."""
        for step, cut in enumerate(self._cuts):
            self._cut = cut
            for layer in find_layers(cut_out(self._all[0].student, self._at, [cut])):
                self._visit(layer)
                self.done.append(layer.name)
                yield layer.name
            if cut != self._cuts[-1]:
                self._advance(step)

    def _begin_at(self, cut: str) -> None:
        """Run students and teachers up to a cut: afresh, so that it makes no difference where an earlier walk ended."""
        for layer in find_layers(cut_out(self._all[0].student, self._inputs, [cut])):
            self._decided |= {space.name for space, _ in self._spaces_made(layer)}
            self.done.append(layer.name)
        for task, stream in self._streams.items():
            for role, model in (("student", stream.student), ("teacher", stream.teacher)):
                folder = self._folder / f"begun-{role}-{task}"
                stream.arriving[role] = store(model, stream.feeds, [cut], folder, threads=self._sharing.threads)
        self._at, self._cuts = [cut], self._cuts[self._cuts.index(cut) + 1 :]

    def catch_up(self) -> None:
        """Run the students anew, whose weights have been changed from outside."""
        if self._at != self._inputs:
            for task, stream in self._streams.items():
                folder = self._folder / f"{task}-{self.done[-1].replace('/', '_')}"
                stream.arriving["student"] = store(
                    stream.student, stream.feeds, self._at, folder, threads=self._sharing.threads
                )

    def _advance(self, step: int) -> None:
        for task, stream in self._streams.items():
            for role, model in (("student", stream.student), ("teacher", stream.teacher)):
                piece = cut_out(model, self._at, [self._cut])
                folder = self._folder / f"{step}-{role}-{task}"
                stream.arriving[role] = store(
                    piece, stream.arriving[role], [self._cut], folder, threads=self._sharing.threads
                )
        self._at = [self._cut]

    def _visit(self, reference: Layer) -> None:
        part = self.extent.parts.get(reference.name)
        made = self._spaces_made(reference)
        self._decided |= {space.name for space, _ in made}
        if part is None and self._sharing.max_difference is not None:
            self._set_counts({space.name: 0 for space, _ in made})  # nothing tells how much its neurons differ
        if reference.op == "ConvTranspose" or (part is None and self._sharing.rule == Rule.MTZ):
            return  # nothing to share, and nothing to repair
        statistics = [self._gather(stream, reference.name) for stream in self._all]
        if part is not None:
            for space, slots in made:
                statistics = self._pair(reference, space, slots, statistics)
            part = self.extent.parts.get(reference.name)
            if part is None and self._sharing.rule == Rule.MTZ:
                return
        layers = [_find(stream.student, reference.name) for stream in self._all]
        current = [weights_and_bias(layer) for layer in layers]
        makes = np.zeros(reference.out_channels, bool) if part is None else part.makes
        rows = shared_rows(reference, part, self._sharing.biases and part is not None)
        for layer, solution in zip(layers, self._solve(statistics, current, rows, makes), strict=True):
            set_weights_and_bias(layer, solution)

    def _solve(
        self, statistics: Sequence[Regression], current: Sequence[np.ndarray], rows: np.ndarray, makes: np.ndarray
    ) -> list[np.ndarray]:
        """The weights of each task: the outputs in `makes` share the rows in `rows`, the others are fitted alone."""
        if makes.all():
            return self._fit(statistics, current, rows)
        if not makes.any():
            return [self._fit_alone(one, own) for one, own in zip(statistics, current, strict=True)]
        found = [own.copy() for own in current]
        some = [_outputs(one, makes) for one in statistics]
        for own, solution in zip(found, self._fit(some, [own[..., makes] for own in current], rows), strict=True):
            own[..., makes] = solution
        if self._sharing.rule == Rule.LEAST_SQUARES:
            for own, one, before in zip(found, statistics, current, strict=True):
                own[..., ~makes] = self._fit_alone(_outputs(one, ~makes), before[..., ~makes])
        return found

    def _fit(
        self, statistics: Sequence[Regression], current: Sequence[np.ndarray], rows: np.ndarray
    ) -> list[np.ndarray]:
        if self._sharing.rule == Rule.MTZ:
            return share_by_hessian(statistics, current, rows, self._weights)
        return share_least_squares(statistics, current, rows, self._weights, self._sharing.ridge)

    def _fit_alone(self, statistics: Regression, current: np.ndarray) -> np.ndarray:
        """The weights of outputs that are a task's own, by least squares: the published rule leaves them."""
        nothing = np.zeros(current.shape[1], bool)
        return share_least_squares([statistics], [current], nothing, [1.0], self._sharing.ridge)[0]

    # --- pairing ----------------------------------------------------------------------------------------------------

    def _spaces_made(self, layer: Layer) -> list[tuple[Space, Slots]]:
        """The spaces that the layer is the first to make, and where they lie in its weight."""
        axis = read_axis(layer.node)
        return [
            (space, slots)
            for space in self.extent.spaces
            for slots in space.weights
            if slots.name == layer.name
            and axis is not None
            and slots.axes == (1 - axis,)
            and slots.rows is None
            and space.name not in self._decided
        ]

    def _pair(self, layer: Layer, space: Space, slots: Slots, statistics: Sequence[Regression]) -> list[Regression]:
        """Pair the neurons of a space, put those to be shared first, and the statistics of the layer with them."""
        count = self.extent.counts.get(space.name, 0)
        if layer.groups > 1:
            if self._sharing.max_difference is not None:
                self._set_counts({space.name: 0})
            return list(statistics)
        current = [weights_and_bias(_find(stream.student, layer.name)) for stream in self._all]
        rows = shared_rows(layer, self.extent.parts[layer.name], bias=False)
        costs = [_by_channel(cost, slots.index) for cost in differences(statistics, current, rows, self._weights)]
        limits = self._limits(slots, statistics, current)
        channels = np.arange(space.size)
        pair = _PAIRS[self._sharing.pairing]
        # a pair that is not shared costs its limit, whatever its difference
        orders = [channels] + [pair(np.minimum(cost, limit), count) for cost, limit in zip(costs, limits, strict=True)]
        total = sum(cost[order, channels] for cost, order in zip(costs, orders[1:], strict=True))
        if self._sharing.max_difference is not None:
            count = min(count, int((total <= sum(limits)).sum()))
            self._set_counts({space.name: count})
        cheapest = np.argsort(total, kind="stable")
        first = np.concatenate([np.sort(cheapest[:count]), np.sort(cheapest[count:])])
        permuted = []
        for stream, order, own in zip(self._all, orders, statistics, strict=True):
            stream.permute(space, order[first])
            columns = np.arange(layer.out_channels)
            columns[slots.index] = slots.index[order[first]]
            permuted.append(_outputs(own, columns))
        return permuted

    def _limits(self, slots: Slots, statistics: Sequence[Regression], current: Sequence[np.ndarray]) -> list[float]:
        """For each task but the first the largest difference of a pair that is shared."""
        if self._sharing.max_difference is None:
            return [np.inf] * (len(current) - 1)
        ours, *others = (own[slots.index].sum(1).mean() for own in energies(statistics, current, self._weights))
        return [self._sharing.max_difference * float(ours + theirs) for theirs in others]

    def _set_counts(self, counts: Counts) -> None:
        self.extent = with_counts(self.extent, counts, depthwise=self._sharing.depthwise)

    # --- statistics -------------------------------------------------------------------------------------------------

    def _gather(self, stream: Stream, name: str) -> Regression:
        """The layer's inputs in the student; its targets: the teacher's for least squares, else what it makes now."""
        piece = cut_out(stream.student, self._at, [self._cut])
        layer = _find(piece, name)
        fitted = self._sharing.rule == Rule.LEAST_SQUARES
        late = {other.node for other in find_layers(piece) if other.name not in self.done}
        target, skip = target_of(layer, depends_on(piece, late)) if fitted else (layer.linear.name or "", None)
        read = [layer.input.name or "", *([] if skip is None else [skip])]
        teacher = cut_out(stream.teacher, self._at, [self._cut]) if fitted else piece
        arriving = stream.arriving["teacher" if fitted else "student"]
        sources = (piece, stream.arriving["student"], read), (teacher, arriving, [target])
        generator = np.random.default_rng([self._sharing.seed, self._numbers[name]])
        statistics, axis, seen = Regression(), channel_axis(layer), 0
        needed = positions_needed(len(shared_rows(layer, None, bias=True)), stream.count)
        for ours, theirs in lockstep(*sources, threads=self._sharing.threads):
            if seen % BATCH == 0:
                positions = Positions.sample(generator, grid_of(theirs[target], axis), needed)
            seen += len(theirs[target])
            goal = output_rows(theirs[target], axis, positions)
            if skip is not None:
                goal = goal - output_rows(ours[skip], axis, positions)
            statistics.update(input_rows(layer, ours[read[0]], positions), goal)
        return statistics


def _find(model: oir.Model, name: str) -> Layer:
    return next(layer for layer in find_layers(model) if layer.name == name)


def _outputs(statistics: Regression, chosen: np.ndarray) -> Regression:
    """The statistics of some outputs of a layer of one group, by their numbers or by whether they are wanted."""
    return replace(
        statistics,
        cross=statistics.cross[..., chosen],
        target_sum=statistics.target_sum[..., chosen],
        target_square=statistics.target_square[..., chosen],
    )


def _by_channel(cost: np.ndarray, index: np.ndarray) -> np.ndarray:
    """[theirs, ours]: the cost of pairing two channels, the sum over their slots (`index` [channels, slots])."""
    return np.asarray(sum(cost[np.ix_(slot, slot)] for slot in index.T))
