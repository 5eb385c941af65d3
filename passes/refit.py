"""Refit the layers of a network, one after the other, towards one or several teachers (approximate).

Layers are taken in topological order. Each is fitted on the network's *own* activations, so it sees and repairs the
errors of the layers before it. The network is walked cut by cut: the values of a cut are kept on disk, so that the cost
is linear in depth and no set of activations is ever held in memory.

Where a layer's output is added to a value that is final already (the skip of a residual block), its target is the
teacher's sum minus that actual value: the branch then makes up for what the skip got wrong.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.compose import cut_out
from onnxmerge.ir.layers import Layer, find_layers
from onnxmerge.ir.weights import get_array, set_array
from onnxmerge.runtime.activations import Arrays, Samples, store, stream
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
        student_samples: the same samples as the student reads them.
        count: number of samples.
        values: name of a student's value -> name of the teacher's value that it stands for. Layers and cuts may be
            missing, as where the teacher is shallower.
        orders: name of a student's value -> for each of its channels, the teacher's channel; absent: the same order.
        scales: name of a student's value -> for each of its channels, the factor on the teacher's; absent: 1.
        maps: name of a student's value -> [ours, theirs], the mean of the teacher's channels that each of its channels
            stands for, where that is no order.
    """

    model: oir.Model
    samples: Samples
    student_samples: Samples
    count: int
    values: Mapping[str, str]
    orders: Mapping[str, np.ndarray] = field(default_factory=dict)
    scales: Mapping[str, np.ndarray] = field(default_factory=dict)
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class _Fit:
    layer: Layer
    target: str
    """The student's value whose teacher is the target."""
    skip: str | None
    """A final value to subtract from the target."""


class Refit(oir.passes.InPlacePass):
    """Replace the weights of every Conv, Gemm and MatMul layer by what `solve` makes of its statistics.

    A layer for whose output no teacher has a target stays as it is.

    Args:
        teachers: by task.
        cuts: cuts of the student in order, where the walk rests; may be empty. It passes over those that a teacher has
            not.
        solve: the rule.
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
        compensate: bool = True,
        seed: int = 0,
        threads: int | None = None,
        progress: Callable[[str], None] | None = None,
    ):
        self.teachers = teachers
        self.cuts = cuts
        self.solve = solve
        self.compensate = compensate
        self.seed = seed
        self.threads = threads
        self.progress = progress or (lambda _: None)

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Walk the network and refit it."""
        at = [value.name or "" for value in model.graph.inputs]
        with tempfile.TemporaryDirectory(prefix="onnxmerge-") as folder:
            walked = dict(self.teachers)
            cuts = [cut for cut in self.cuts if all(cut in teacher.values for teacher in walked.values())]
            for step, cut in enumerate([*cuts, None]):
                ends = [cut] if cut is not None else [v.name or "" for v in model.graph.outputs]
                if not set(ends) - set(at):
                    continue
                piece = cut_out(model, at, ends)
                self._refit_piece(piece, walked)
                _copy_weights(piece, model)
                if cut is not None:
                    walked = {
                        task: self._advance(piece, teacher, at, cut, Path(folder) / str(step) / task)
                        for task, teacher in walked.items()
                    }
                    at = ends
        return oir.passes.PassResult(model, modified=True)

    def _advance(self, piece: oir.Model, teacher: Teacher, at: list[str], cut: str, folder: Path) -> Teacher:
        theirs = teacher.values[cut]
        model = cut_out(teacher.model, [teacher.values[name] for name in at], [theirs])
        after = cut_out(teacher.model, [theirs], [v.name or "" for v in teacher.model.graph.outputs])
        return Teacher(
            after,
            store(model, teacher.samples, [theirs], folder / "teacher", threads=self.threads),
            store(piece, teacher.student_samples, [cut], folder / "student", threads=self.threads),
            teacher.count,
            teacher.values,
            teacher.orders,
            teacher.scales,
            teacher.maps,
        )

    def _refit_piece(self, piece: oir.Model, teachers: Mapping[str, Teacher]) -> None:
        waiting = [layer for layer in find_layers(piece) if layer.op != "ConvTranspose"]
        while waiting:
            ancestors = _ancestors(piece, {layer.node for layer in waiting})
            ready = [layer for layer in waiting if not ancestors[layer.input]]
            fits = [self._fit(layer, ancestors) for layer in ready]
            fits = [fit for fit in fits if any(fit.target in t.values for t in teachers.values())]
            statistics = [self._gather(piece, teacher, fits) for teacher in teachers.values()]
            for number, fit in enumerate(fits):
                current = weights_and_bias(fit.layer)
                set_weights_and_bias(fit.layer, self.solve(fit.layer, [task[number] for task in statistics], current))
                self.progress(fit.layer.name)
            waiting = [layer for layer in waiting if layer not in ready]

    def _fit(self, layer: Layer, unfinished: Mapping[oir.Value, bool]) -> _Fit:
        uses = list(layer.linear.uses())
        if self.compensate and len(uses) == 1 and uses[0][0].op_type == "Add":
            add, index = uses[0]
            other = add.inputs[1 - index]
            if other is not None and other.const_value is None and not unfinished[other]:
                return _Fit(layer, add.outputs[0].name or "", other.name)
        return _Fit(layer, layer.linear.name or "", None)

    def _gather(self, piece: oir.Model, teacher: Teacher, fits: Sequence[_Fit]) -> list[Regression]:
        generator = np.random.default_rng(self.seed)
        found = [Regression() for _ in fits]
        known = [(fit, own) for fit, own in zip(fits, found, strict=True) if fit.target in teacher.values]
        for ours, theirs in self._lockstep(piece, teacher, [fit for fit, _ in known]):
            for fit, statistics in known:
                axis = channel_axis(fit.layer)
                target = theirs[teacher.values[fit.target]]
                fan_in = weight_matrix(fit.layer, get_array(fit.layer.weight)).shape[1]
                needed = positions_needed(fan_in + 1, teacher.count)
                positions = Positions.sample(generator, grid_of(target, axis), needed)
                rows = output_rows(target, axis, positions)
                if fit.target in teacher.orders:
                    rows = rows[:, teacher.orders[fit.target]]
                if fit.target in teacher.maps:
                    rows = rows @ teacher.maps[fit.target].T
                if fit.target in teacher.scales:
                    rows = rows * teacher.scales[fit.target]
                if fit.skip is not None:
                    rows = rows - output_rows(ours[fit.skip], axis, positions)
                statistics.update(input_rows(fit.layer, ours[fit.layer.input.name or ""], positions), rows)
        return found

    def _lockstep(self, piece: oir.Model, teacher: Teacher, fits: Sequence[_Fit]) -> Iterator[tuple[Arrays, Arrays]]:
        read = [name for fit in fits for name in (fit.layer.input.name, fit.skip) if name]
        targets = [teacher.values[fit.target] for fit in fits]
        ours = stream(piece, teacher.student_samples, list(dict.fromkeys(read)), threads=self.threads)
        theirs = stream(teacher.model, teacher.samples, list(dict.fromkeys(targets)), threads=self.threads)
        return zip(ours, theirs, strict=True)


def _ancestors(piece: oir.Model, unfinished: set[oir.Node]) -> dict[oir.Value, bool]:
    """For each computed value whether an unfinished layer stands before it."""
    depends = dict.fromkeys(piece.graph.inputs, False)
    for node in piece.graph:
        late = node in unfinished or any(depends.get(v, False) for v in node.inputs if v is not None)
        depends |= dict.fromkeys(node.outputs, late)
    return depends


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
