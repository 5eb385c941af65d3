"""Refit the layers of a network, one after the other, towards one or several teachers (approximate).

Layers are taken in topological order. Each is fitted on the network's *own* activations, so it sees and repairs the
errors of the layers before it. The network is walked cut by cut: the values of a cut are kept on disk, so that the cost
is linear in depth and no set of activations is ever held in memory. Between two cuts each teacher runs once, and what
it computes at the sampled positions is kept as well. The student runs once for each wave of layers that are ready
together and once for the cut, however many teachers share its samples.

Where a layer's output is added to a value that is final already (the skip of a residual block), its target is the
teacher's sum minus that actual value: the branch then makes up for what the skip got wrong.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import UsageError
from onnxmerge.ir.compose import cut_out
from onnxmerge.ir.layers import Layer, find_layers
from onnxmerge.ir.weights import get_array, set_array
from onnxmerge.runtime.activations import BATCH, Arrays, OnDisk, Samples, Stored, keep, lockstep, store, stream
from onnxmerge.runtime.heap import return_memory
from onnxmerge.runtime.patches import (
    Positions,
    channel_axis,
    grid_of,
    input_rows,
    output_rows,
    positions_needed,
    weight_array,
    weight_matrix,
)
from onnxmerge.runtime.statistics import Regression
from onnxmerge.scratch import scratch

Solve = Callable[[Layer, Sequence[Regression], np.ndarray], np.ndarray]
"""(layer, statistics of each teacher, current weights [groups, fan in + 1, outputs]) -> new weights.

Statistics without rows are those of a teacher that has no target for the layer; at least one has some.
"""


@dataclass(frozen=True)
class Teacher:
    """One original network and how the student's values stand for its own.

    Attributes:
        model: the original.
        samples: its inputs.
        student_samples: the same samples as the student reads them; what is gathered of the student serves all teachers
            that have the same object here.
        count: number of samples.
        values: name of a student's value -> name of the teacher's value that it stands for. Layers and cuts may be
            missing, as where the teacher is shallower.
        orders: name of a student's value -> for each of its channels, the teacher's channel; absent: the same order.
        scales: name of a student's value -> for each of its channels, the factor on the teacher's; absent: 1.
        maps: name of a student's value -> [ours, theirs], the mean of the teacher's channels that each of its channels
            stands for, where that is no order.
        shifts: name of a student's value -> for each of its channels, what is added to the teacher's.
    """

    model: oir.Model
    samples: Samples
    student_samples: Samples
    count: int
    values: Mapping[str, str]
    orders: Mapping[str, np.ndarray] = field(default_factory=dict)
    scales: Mapping[str, np.ndarray] = field(default_factory=dict)
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)
    shifts: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class _Fit:
    layer: Layer
    target: str
    """The student's value whose teacher is the target."""
    skip: str | None
    """A final value to subtract from the target."""

    @property
    def name(self) -> str:
        """Of the layer's own output."""
        return self.layer.linear.name or ""


_Wave = list[_Fit]
"""Layers that can be fitted as soon as those of the waves before are."""


@dataclass(frozen=True)
class _Seen:
    """What one teacher computes between two cuts."""

    places: Mapping[str, Sequence[Positions]]
    """By the name of a fit: where its layer is looked at, for each `BATCH` samples."""
    targets: Mapping[str, np.ndarray | OnDisk]
    """By the name of a fit: [samples, positions, channels], in the student's channels and scale."""
    cut: np.ndarray | OnDisk | None
    """What arrives at the second cut; None at the end of the network."""

    def rows(self, fit: _Fit, start: int, stop: int) -> np.ndarray:
        """[samples * positions, channels]: the targets of the samples from `start` to `stop`."""
        found = self.targets[fit.name][start:stop]
        return found.reshape(-1, found.shape[-1])


class Refit(oir.passes.InPlacePass):
    """Replace the weights of every Conv, Gemm and MatMul layer by what `solve` makes of its statistics.

    A layer for whose output no teacher has a target stays as it is.

    Args:
        teachers: by task.
        cuts: cuts of the student in order, where the walk rests; may be empty. It passes over those that a teacher has
            not.
        solve: the rule.
        beside: by cut, values of the student that pass it too.
        compensate: let a residual branch make up for its skip.
        seed: of the sampled positions.
        threads: for onnxruntime.
        progress: called with the name of each layer that is done.
    """

    preserves = "approximate"

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        cuts: Sequence[str],
        solve: Solve,
        *,
        beside: Mapping[str, Sequence[str]] | None = None,
        compensate: bool = True,
        seed: int = 0,
        threads: int | None = None,
        progress: Callable[[str], None] | None = None,
    ):
        self.teachers = teachers
        self.cuts = cuts
        self.solve = solve
        self.beside = beside or {}
        self.compensate = compensate
        self.seed = seed
        self.threads = threads
        self.progress = progress or (lambda _: None)

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Walk the network and refit it."""
        at = [value.name or "" for value in model.graph.inputs]
        with scratch() as folder:
            walked = dict(self.teachers)
            cuts = [cut for cut in self.cuts if all(cut in teacher.values for teacher in walked.values())]
            before: Path | None = None
            for step, cut in enumerate([*cuts, None]):
                ends = self._passing(cut) if cut is not None else [v.name or "" for v in model.graph.outputs]
                if not set(ends) - set(at):
                    continue
                piece, room = cut_out(model, at, ends), folder / str(step)
                seen = self._refit_piece(piece, walked, cut, room)
                _copy_weights(piece, model)
                if cut is not None:
                    walked, at = self._advanced(piece, walked, seen, cut, room), ends
                if before is not None:
                    shutil.rmtree(before)
                before = room
        return oir.passes.PassResult(model, modified=True)

    def _passing(self, cut: str) -> list[str]:
        return [cut, *self.beside.get(cut, ())]

    def _refit_piece(
        self, piece: oir.Model, teachers: Mapping[str, Teacher], cut: str | None, room: Path
    ) -> dict[str, _Seen]:
        """Refit what lies before `cut`; what the teachers compute there."""
        waves = self._waves(piece, teachers)
        student = next(iter(teachers.values())).student_samples
        targets = list(dict.fromkeys(fit.target for wave in waves for fit in wave))
        grids = next(stream(piece, student, targets, threads=self.threads, size=1))
        seen = {
            task: self._observe(task, teacher, waves, grids, cut, room / f"teacher{number}")
            for number, (task, teacher) in enumerate(teachers.items())
        }
        for wave in waves:
            return_memory()  # what was freed between waves would count in the peak of the next
            self._refit_wave(piece, wave, teachers, seen)
        return_memory()
        return seen

    def _advanced(
        self,
        piece: oir.Model,
        teachers: Mapping[str, Teacher],
        seen: Mapping[str, _Seen],
        cut: str,
        room: Path,
    ) -> dict[str, Teacher]:
        """The teachers from `cut` on, with what arrives there."""
        advanced = {}
        for number, tasks in enumerate(_sharing(teachers)):
            samples = teachers[tasks[0]].student_samples
            arriving = store(piece, samples, self._passing(cut), room / f"student{number}", threads=self.threads)
            for task in tasks:
                teacher, own = teachers[task], seen[task].cut
                assert own is not None
                theirs, ends = teacher.values[cut], [v.name or "" for v in teacher.model.graph.outputs]
                rest = cut_out(teacher.model, [theirs], ends)
                advanced[task] = replace(teacher, model=rest, samples=Stored({theirs: own}), student_samples=arriving)
        return {task: advanced[task] for task in teachers}

    def _waves(self, piece: oir.Model, teachers: Mapping[str, Teacher]) -> list[_Wave]:
        """The layers that some teacher has a target for, in the order in which they are fitted."""
        waves = []
        waiting = [layer for layer in find_layers(piece) if layer.op != "ConvTranspose"]
        while waiting:
            ancestors = depends_on(piece, {layer.node for layer in waiting})
            ready = [layer for layer in waiting if not ancestors[layer.input]]
            fits = [_Fit(layer, *self._target(layer, ancestors)) for layer in ready]
            waves.append([fit for fit in fits if any(fit.target in t.values for t in teachers.values())])
            waiting = [layer for layer in waiting if layer not in ready]
        return [wave for wave in waves if wave]

    def _target(self, layer: Layer, unfinished: Mapping[oir.Value, bool]) -> tuple[str, str | None]:
        return target_of(layer, unfinished) if self.compensate else (layer.linear.name or "", None)

    def _observe(
        self, task: str, teacher: Teacher, waves: Sequence[_Wave], examples: Arrays, cut: str | None, folder: Path
    ) -> _Seen:
        """Run a teacher once; `examples` are the targets' values for one sample.

        Raises:
            UsageError: the teacher has values of another grid for a target.
        """
        places: dict[str, list[Positions]] = {fit.name: [] for wave in waves for fit in wave}
        for wave in waves:
            generator = np.random.default_rng(self.seed)
            for _ in range(0, teacher.count, BATCH):
                for fit in wave:
                    grid = grid_of(examples[fit.target], channel_axis(fit.layer))
                    fan_in = weight_matrix(fit.layer, get_array(fit.layer.weight)).shape[1]
                    needed = positions_needed(fan_in + 1, teacher.count)
                    places[fit.name].append(Positions.sample(generator, grid, needed))
        known = [fit for wave in waves for fit in wave if fit.target in teacher.values]
        grids = {fit.target: grid_of(examples[fit.target], channel_axis(fit.layer)) for fit in known}
        kept = keep(self._observed(task, teacher, known, places, grids, cut), folder).arrays
        numbered = {fit.name: kept[f"target {number}"] for number, fit in enumerate(known)}
        return _Seen(places, numbered, kept["cut"] if cut is not None else None)

    def _observed(
        self,
        task: str,
        teacher: Teacher,
        fits: Sequence[_Fit],
        places: Mapping[str, Sequence[Positions]],
        grids: Mapping[str, tuple[int, ...]],
        cut: str | None,
    ) -> Iterator[Arrays]:
        names = [teacher.values[name] for name in (*(fit.target for fit in fits), *([] if cut is None else [cut]))]
        source = teacher.model, teacher.samples, list(dict.fromkeys(names))
        start = 0
        for (values,) in lockstep(source, threads=self.threads) if names else ():
            found = {} if cut is None else {"cut": values[teacher.values[cut]]}
            count = len(values[names[0]])
            for number, fit in enumerate(fits):
                target = values[teacher.values[fit.target]]
                _see_that_grids_agree(task, teacher, fit, grids[fit.target], target)
                rows = output_rows(target, channel_axis(fit.layer), places[fit.name][start // BATCH])
                if fit.target in teacher.orders:
                    rows = rows[:, teacher.orders[fit.target]]
                if fit.target in teacher.maps:
                    rows = rows @ teacher.maps[fit.target].T
                if fit.target in teacher.scales:
                    rows = rows * teacher.scales[fit.target]
                if fit.target in teacher.shifts:
                    rows = rows + teacher.shifts[fit.target]
                found[f"target {number}"] = rows.reshape(count, -1, rows.shape[-1]).astype(target.dtype)
            yield found
            start += count

    def _refit_wave(
        self, piece: oir.Model, wave: _Wave, teachers: Mapping[str, Teacher], seen: Mapping[str, _Seen]
    ) -> None:
        found: dict[str, list[Regression]] = {}
        for tasks in _sharing(teachers):
            samples = teachers[tasks[0]].student_samples
            found |= self._gather(piece, samples, wave, {task: seen[task] for task in tasks})
        for fit in wave:
            statistics = [found[task].pop(0) for task in teachers]
            set_weights_and_bias(fit.layer, self.solve(fit.layer, statistics, weights_and_bias(fit.layer)))
            self.progress(fit.layer.name)

    def _gather(
        self, piece: oir.Model, samples: Samples, wave: _Wave, seen: Mapping[str, _Seen]
    ) -> dict[str, list[Regression]]:
        """For each task the statistics of each layer: the inputs are the student's, the targets the teacher's."""
        knowing = [[task for task, own in seen.items() if fit.name in own.targets] for fit in wave]
        known = [(fit, tasks, Regression()) for fit, tasks in zip(wave, knowing, strict=True) if tasks]
        read = [name for fit, _, _ in known for name in (fit.layer.input.name, fit.skip) if name]
        start = 0
        for (ours,) in lockstep((piece, samples, list(dict.fromkeys(read))), threads=self.threads) if read else ():
            stop = start + len(ours[read[0]])
            for fit, tasks, statistics in known:
                positions = seen[tasks[0]].places[fit.name][start // BATCH]
                targets = [seen[task].rows(fit, start, stop) for task in tasks]
                if fit.skip is not None:
                    skip = output_rows(ours[fit.skip], channel_axis(fit.layer), positions)
                    targets = [rows - skip for rows in targets]
                inputs = input_rows(fit.layer, ours[fit.layer.input.name or ""], positions)
                groups = [rows.reshape(len(rows), fit.layer.groups, -1) for rows in targets]
                statistics.update(inputs, np.stack(groups, axis=2))
            start = stop
        parts = {fit.name: dict(zip(tasks, own.split(len(tasks)), strict=True)) for fit, tasks, own in known}
        return {task: [parts.get(fit.name, {}).get(task, Regression()) for fit in wave] for task in seen}


def _see_that_grids_agree(task: str, teacher: Teacher, fit: _Fit, ours: tuple[int, ...], target: np.ndarray) -> None:
    theirs = grid_of(target, channel_axis(fit.layer))
    if theirs != ours:
        sizes = ["x".join(map(str, grid)) or "1" for grid in (ours, theirs)]
        raise UsageError(
            f"{fit.name} has {sizes[0]} positions and stands for {teacher.values[fit.target]} of {task}, which has "
            f"{sizes[1]}: least squares compares layers position by position"
        )


def _sharing(teachers: Mapping[str, Teacher]) -> list[list[str]]:
    """The tasks, those together whose teachers have the same student samples."""
    found: dict[int, list[str]] = {}
    for task, teacher in teachers.items():
        found.setdefault(id(teacher.student_samples), []).append(task)
    return list(found.values())


def depends_on(piece: oir.Model, unfinished: set[oir.Node]) -> dict[oir.Value, bool]:
    """For each input and computed value whether one of the nodes `unfinished` stands before it."""
    depends = dict.fromkeys(piece.graph.inputs, False)
    for node in piece.graph:
        late = node in unfinished or any(depends.get(v, False) for v in node.inputs if v is not None)
        depends |= dict.fromkeys(node.outputs, late)
    return depends


def target_of(layer: Layer, unfinished: Mapping[oir.Value, bool]) -> tuple[str, str | None]:
    """The value whose teacher is the layer's target, and a final value to subtract from it.

    Where a layer's output is added to a value that is final, as a branch is to its skip, these are the sum and that
    value; else the layer's output, and none. `unfinished`: see `depends_on`.
    """
    uses = list(layer.linear.uses())
    if len(uses) == 1 and uses[0][0].op_type == "Add":
        add, index = uses[0]
        other = add.inputs[1 - index]
        if other is not None and other.const_value is None and not unfinished[other]:
            return add.outputs[0].name or "", other.name
    return layer.linear.name or "", None


def weights_and_bias(layer: Layer) -> np.ndarray:
    """[groups, fan in + 1, outputs of a group], the bias in the last row."""
    return stacked(layer, get_array(layer.weight), None if layer.bias is None else get_array(layer.bias))


def stacked(layer: Layer, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """[groups, fan in + 1, outputs of a group]: arrays shaped like the layer's, the bias (zero where none) last."""
    matrix = weight_matrix(layer, weight).astype(np.float64)
    row = np.zeros(layer.out_channels) if bias is None else bias.astype(np.float64)
    rows = np.broadcast_to(row.reshape(-1), (layer.out_channels,)).reshape(len(matrix), 1, -1)
    return np.concatenate([matrix, rows], axis=1)


def set_weights_and_bias(layer: Layer, solution: np.ndarray) -> None:
    """The inverse of `weights_and_bias`: replace the layer's arrays."""
    set_array(layer.weight, weight_array(layer, solution[:, :-1]))
    bias = solution[:, -1].reshape(-1)
    if layer.bias is not None:
        set_array(layer.bias, bias)


def _copy_weights(source: oir.Model, target: oir.Model) -> None:
    for name, value in source.graph.initializers.items():
        set_array(target.graph.initializers[name], get_array(value))
