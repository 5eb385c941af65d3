"""zip in weights mode: the tasks share weights, and each keeps its own stream of activations.

Layer after layer the neurons of all networks are paired, the shared part of the weight is solved on the activations of
the networks as merged so far, each task's on its own data, and the merged graph holds that part once (`StackTasks`).
This saves memory, not time. Biases and depthwise convolutions stay the tasks' own, as do norms.

A merge goes on from an earlier one that shares fewer units (`weights_begun`), as it was calibrated.

Sources: Multi-Task Zipping (He, Zhou and Thiele 2018, algorithm 1), with all networks at once instead of one after the
other; Zippering MobileNets (Chou et al. 2019) for depthwise convolutions and for going on from what was calibrated.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.compose import rename_value
from onnxmerge.ir.layers import Layer
from onnxmerge.ir.weights import add_initializer, get_array, set_array
from onnxmerge.methods.progress import Progress, Silent
from onnxmerge.methods.task import Task
from onnxmerge.methods.zip.alignment import Aligned, Cut, Sharable
from onnxmerge.methods.zip.choices import Rule
from onnxmerge.methods.zip.fictive import with_own_inputs
from onnxmerge.methods.zip.fitting import Fitting
from onnxmerge.methods.zip.stems.tails import ARRIVING, own_tail, refit_tail
from onnxmerge.methods.zip.weights.begun import ORDER, Begun, SoFar, orders_of, read_tasks
from onnxmerge.methods.zip.weights.plan import Counts, Extent, Share, find_extent, is_whole, with_counts
from onnxmerge.methods.zip.weights.settings import WeightSharing
from onnxmerge.methods.zip.weights.walk import Stream, Walk
from onnxmerge.passes.align import Alignment
from onnxmerge.passes.attach_tails import unshared
from onnxmerge.passes.average import Partner, aligned_array
from onnxmerge.passes.pad_inputs import Padding
from onnxmerge.passes.shared_weights import share_least_squares
from onnxmerge.passes.stack_tasks import StackTasks, read_streams
from onnxmerge.passes.weight_parts import Part
from onnxmerge.runtime.statistics import Regression
from onnxmerge.scratch import scratch

After = Callable[[oir.Model, str], None]
"""(merged model, the layer that was shared last): may train the model in place."""


@dataclass(frozen=True)
class Merged:
    """What came out: the model, and how many neurons of each space it shares."""

    model: oir.Model
    counts: Counts


def share_weights(
    sharable: Sharable,
    aligned: Mapping[str, Aligned],
    tasks: Sequence[Task],
    share: Share,
    sharing: WeightSharing | None = None,
    *,
    begun: Begun | None = None,
    after: After | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Merge networks into one that holds what they share once.

    Args:
        sharable: the networks, as `find_sharable` matched them.
        aligned: for each task but the first its alignment with the first; where neurons are paired by functional
            difference none is needed, and what there is, is where spaces begin that no layer makes.
        tasks: the originals with their samples, the first of `sharable` first.
        share: the number k of units that are shared wholly, or how many neurons of each space are.
        sharing: see `WeightSharing`.
        begun: go on from this merged model; `share` is a number of units then.
        after: called after each shared layer, for a light retraining. What it trains goes on into the layers behind,
            and tails are then left to it; without it least squares refits them.
        progress: told of each layer.

    Returns:
        The merged model with the first task's inputs and the outputs `TASK/output`, and what it shares.

    Raises:
        UsageError: the plan does not fit the networks.
        ModelError: a network cannot be run, or has a sub-graph before the last cut.
    """
    sharing = sharing or WeightSharing()
    extent = find_extent(sharable, share, depthwise=sharing.depthwise)
    if extent.cut is None:
        return Merged(unshared({task.name: with_own_inputs(task).model for task in tasks}), extent.counts)
    with scratch() as folder:
        merging = _Merging(sharable, aligned, tasks, extent, sharing, begun, folder)
        return merging.run(after, progress or Silent())


class _Merging:
    """One merge under way: the tasks' stems in one channel order, and their tails."""

    def __init__(
        self,
        sharable: Sharable,
        aligned: Mapping[str, Aligned],
        tasks: Sequence[Task],
        extent: Extent,
        sharing: WeightSharing,
        begun: Begun | None,
        folder: Path,
    ):
        assert extent.cut is not None
        self.tasks, self.cut, self.sharing, self.folder = tasks, extent.cut, sharing, folder
        start: Cut | None = None
        found: dict[str, SoFar] = {}
        if begun is not None:
            start, found = read_tasks(begun, extent.cut.unit.cut, depthwise=sharing.depthwise)
            extent = with_counts(extent, begun.counts, depthwise=sharing.depthwise)
        self.streams = {
            task.name: _stream(sharable, aligned, task, extent, sharing, start, found.get(task.name)) for task in tasks
        }
        self.walk = Walk(self.streams, extent, sharing, folder, start)
        now = [found[task.name].task if found else task for task in tasks]
        self.tails = {task.name: own_tail(task, self.cut).clone() for task in now}

    def run(self, after: After | None, progress: Progress) -> Merged:
        """Walk the stem; `after` may train in between."""
        for layer in self.walk.layers():
            progress.advance(layer)
            if after is not None and layer in self.walk.extent.parts:
                self._retrain(after, layer)
        if after is None and self.sharing.rule == Rule.LEAST_SQUARES:
            for task in self.tasks:
                self._refit_tail(task, progress)
        return Merged(self._merged(), self.walk.extent.counts)

    def _partly(self) -> dict[str, Part]:
        """The weights of which only a part is shared so far."""
        shared = self.walk.extent.parts
        return {name: shared[name] for name in self.walk.done if name in shared and not is_whole(shared[name])}

    def _merged(self) -> oir.Model:
        """The model in which the layers visited so far are shared."""
        (first, stream), *others = self.streams.items()
        tails = {task.name: self._ordered_tail(task) for task in self.tasks}
        stacked = StackTasks(
            first, {name: other.student for name, other in others}, tails, self._partly(), self._own_inputs()
        )
        return stacked(stream.student).model

    def _own_inputs(self) -> dict[str, list[tuple[str, Padding]]] | None:
        """The tasks' own inputs, where they differ in some."""
        if not any(task.paddings for task in self.tasks):
            return None
        return {task.name: [(n, task.paddings.get(n, Padding(0, 0))) for n in task.inputs] for task in self.tasks}

    def _retrain(self, after: After, layer: str) -> None:
        merged = self._merged()
        after(merged, layer)
        read_streams(merged, {name: stream.student for name, stream in self.streams.items()}, self._partly())
        for task, tail in self.tails.items():
            for name, value in tail.graph.initializers.items():
                set_array(value, get_array(merged.graph.initializers[f"{task}/{name}"]))
        self.walk.catch_up()

    def _ordered_tail(self, task: Task) -> oir.Model:
        """The task's tail, which reads the stem's channels in the order that they have there."""
        theirs = self.cut.names[task.name]
        tail = self.tails[task.name].clone()
        order = self.streams[task.name].order_at(
            self.cut.unit.cut, self.cut.axis, self.cut.size, self.walk.extent.spaces
        )
        rename_value(tail, theirs, ARRIVING)
        if (order != np.arange(self.cut.size)).any():
            _insert_gather(tail, np.argsort(order), self.cut.axis, theirs)
        return tail

    def _refit_tail(self, task: Task, progress: Progress) -> None:
        """Fit the task's own layers behind the cut to what arrives there now."""
        student = self._ordered_tail(task)
        fitting = Fitting(self.sharing.samples, self.sharing.seed, self.sharing.threads, self.folder, progress)
        refit_tail(student, task, self.cut, self.streams[task.name].student, self.tasks[0], self._alone, fitting)
        for name, value in self.tails[task.name].graph.initializers.items():
            set_array(value, get_array(student.graph.initializers[name]))

    def _alone(self, _: Layer, statistics: Sequence[Regression], current: np.ndarray) -> np.ndarray:
        """A layer that no other task shares."""
        nothing = np.zeros(current.shape[1], bool)
        return share_least_squares(statistics, [current], nothing, [1.0], self.sharing.ridge)[0]


def _stream(
    sharable: Sharable,
    aligned: Mapping[str, Aligned],
    task: Task,
    extent: Extent,
    sharing: WeightSharing,
    start: Cut | None,
    so_far: SoFar | None,
) -> Stream:
    """The task's network up to the cut, with the reference's graph and names and in the merged channel order."""
    assert extent.stem is not None
    orders = {space.name: np.arange(space.size) for space in extent.spaces}
    orders |= aligned[task.name].alignment if task.name in aligned else {}
    if start is not None and so_far is not None:
        orders |= orders_of(extent.spaces, start, so_far.order)
    teacher = _in_order(sharable, extent, task, orders)
    student = teacher.clone() if so_far is None else _in_order(sharable, extent, so_far.task, orders)
    if so_far is not None:
        for name, value in so_far.stem.graph.initializers.items():
            if name in student.graph.initializers:  # sizes may be held under other names where spaces are wider
                set_array(student.graph.initializers[name], get_array(value))
    split = task.data.calibration.take(sharing.samples, sharing.seed)
    feeds = task.feeds(split, sharable.reference)
    return Stream(student, teacher, feeds, task.feeds(split, task), len(split), orders)


def _in_order(sharable: Sharable, extent: Extent, task: Task, orders: Alignment) -> oir.Model:
    """The stem with a task's arrays, its channels in these orders."""
    assert extent.stem is not None
    stem = extent.stem.clone()
    reference = task.name == sharable.reference.name
    same = {name: name for name in stem.graph.initializers}
    partner = Partner(task.model, same if reference else sharable.partners[task.name].constants, orders)
    for name, value in stem.graph.initializers.items():
        set_array(value, aligned_array(name, partner, extent.spaces))
    return stem


def _insert_gather(tail: oir.Model, order: np.ndarray, axis: int, name: str) -> None:
    """Let the tail read the channels of its input in this order, as the value `name`."""
    (source,) = tail.graph.inputs
    readers = list(source.uses())
    index = add_initializer(tail.graph, f"{name}{ORDER}", order.astype(np.int64))
    gather = oir.node("Gather", [source, index], {"axis": axis}, name=f"{name}__gather")
    ordered = gather.outputs[0]
    ordered.name, ordered.shape, ordered.type = name, source.shape, source.type
    for node, place in readers:
        node.replace_input_with(place, ordered)
    first = next(iter(tail.graph), None)
    if first is None:
        tail.graph.append(gather)
    else:
        tail.graph.insert_before(first, gather)
