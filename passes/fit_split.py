"""Fit the last shared layer together with the adapters behind it (approximate).

Between the cut and the tasks' nonlinearities stand only linear maps, so the shared channels need not be any task's:
they are to span what all tasks read. With X the layer's inputs and a column of ones, S the skip that is added to its
output (if any), Z_t task t's own values at the cut and w_t the inverse of their mean variance,

    minimise over W and all V_t    sum_t w_t / n_t |(X W + S) V_t - Z_t|^2

This is reduced-rank regression (Izenman 1975) with a different design for each task. It is solved by alternating exact
least squares: V_t in closed form, W by conjugate gradients. The V_t only serve to find W: `Refit` fits the adapters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.layers import Layer, find_layers
from onnxmerge.passes.refit import Teacher, set_weights_and_bias, weights_and_bias
from onnxmerge.runtime.activations import stream
from onnxmerge.runtime.patches import Positions, channel_axis, grid_of, input_rows, output_rows, positions_needed
from onnxmerge.runtime.statistics import Regression

_SWEEPS = 12
_CONJUGATE_STEPS = 30
_RIDGE = 1e-3


class FitSplit(oir.passes.InPlacePass):
    """Refit the layer that writes a stem's only output; a stem that ends otherwise stays as it is.

    Args:
        teachers: by task; `values` must name the teacher's own value at the stem's output.
        seed: of the sampled positions.
        threads: for onnxruntime.
    """

    preserves = "approximate"

    def __init__(self, teachers: Mapping[str, Teacher], *, seed: int = 0, threads: int | None = None):
        self.teachers = teachers
        self.seed = seed
        self.threads = threads

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Gather the statistics in one run over the samples and solve."""
        (cut,) = model.graph.outputs
        found = _last_layer(model, cut)
        if found is None:
            return oir.passes.PassResult(model, modified=False)
        layer, skip = found
        statistics = [self._gather(model, teacher, layer, skip, cut) for teacher in self.teachers.values()]
        start = weights_and_bias(layer)[0]
        set_weights_and_bias(layer, solve_split(statistics, start)[None])
        return oir.passes.PassResult(model, modified=True)

    def _gather(
        self, model: oir.Model, teacher: Teacher, layer: Layer, skip: oir.Value | None, cut: oir.Value
    ) -> Regression:
        generator = np.random.default_rng(self.seed)
        axis = channel_axis(layer)
        read = [layer.input.name or ""] + ([] if skip is None else [skip.name or ""])
        theirs = teacher.values[cut.name or ""]
        ours = stream(model, teacher.student_samples, read, threads=self.threads)
        expected = stream(teacher.model, teacher.samples, [theirs], threads=self.threads)
        statistics = Regression()
        unknowns = weights_and_bias(layer).shape[1]
        for have, want in zip(ours, expected, strict=True):
            needed = positions_needed(unknowns, teacher.count)
            positions = Positions.sample(generator, grid_of(want[theirs], axis), needed)
            rows = input_rows(layer, have[read[0]], positions)
            if skip is not None:
                rows = np.concatenate([rows, output_rows(have[read[1]], axis, positions)[None]], axis=2)
            statistics.update(rows, output_rows(want[theirs], axis, positions))
        return statistics


def _last_layer(model: oir.Model, cut: oir.Value) -> tuple[Layer, oir.Value | None] | None:
    """The layer whose output is the cut, or is added to a skip that does not depend on it to make the cut."""
    layers = {layer.linear: layer for layer in find_layers(model) if layer.op != "ConvTranspose" and layer.groups == 1}
    if cut in layers:
        return layers[cut], None
    node = cut.producer()
    if node is None or node.op_type != "Add":
        return None
    first, second = node.inputs
    if second in layers and first is not None and len(list(second.uses())) == 1:
        return layers[second], first
    if first in layers and second is not None and len(list(first.uses())) == 1:
        return layers[first], second
    return None


@dataclass(frozen=True)
class _Design:
    """One task's normalised second moments over X' = [X, 1, S]."""

    gram: np.ndarray
    cross: np.ndarray


def solve_split(statistics: Sequence[Regression], start: np.ndarray) -> np.ndarray:
    """The layer's new weights.

    Args:
        statistics: one for each task, inputs [X, S, 1] in this order, or [X, 1] without a skip.
        start: [fan in + 1, channels], the bias in the last row.

    Returns:
        [fan in + 1, channels]
    """
    free, channels = start.shape
    designs = [_design(task, free) for task in statistics]
    skip = np.eye(channels) if len(designs[0].gram) > free else np.zeros((0, channels))
    weights = np.array(start)
    scale = np.mean([np.trace(d.gram[: free - 1, : free - 1]) for d in designs]) / max(free - 1, 1)
    pull = np.full((free, 1), _RIDGE * max(scale, 1e-12))
    pull[-1] = 0
    for _ in range(_SWEEPS):
        whole = np.concatenate([weights, skip])
        adapters = [_adapter(d, whole, free) for d in designs]
        squares = [v @ v.T for v, _ in adapters]
        right = pull * start
        for design, (adapter, shift) in zip(designs, adapters, strict=True):
            offset = np.outer(design.gram[:free, free - 1], shift) + design.gram[:free, free:] @ skip @ adapter
            right += (design.cross[:free] - offset) @ adapter.T
        weights = _conjugate(weights, right, [d.gram[:free, :free] for d in designs], squares, pull)
    return weights if len(skip) else _decorrelate(weights, statistics)


def _decorrelate(weights: np.ndarray, statistics: Sequence[Regression]) -> np.ndarray:
    """Make the shared channels uncorrelated and equally large, which the adapters undo.

    Without a skip, W R and R^-1 V_t are as good as W and V_t for any R; gradient steps want the best conditioned one.
    """
    free = len(weights)
    gram = np.mean([task.gram[0][:free, :free] / task.rows for task in statistics], axis=0)
    mean = gram[-1] @ weights
    covariance = weights.T @ gram @ weights - np.outer(mean, mean)
    variances, axes = np.linalg.eigh(covariance)
    floor = 1e-4 * variances.max()
    whiten = axes @ np.diag(np.sqrt(np.trace(covariance) / len(variances) / np.maximum(variances, floor))) @ axes.T
    return weights @ whiten


def _design(task: Regression, free: int) -> _Design:
    """Move the ones before the skip and normalise by rows and target variance."""
    size = task.gram.shape[1]
    order = [*range(free - 1), size - 1, *range(free - 1, size - 1)]
    factor = 1 / (task.rows * max(float(task.target_variance().mean()), 1e-12))
    return _Design(factor * task.gram[0][np.ix_(order, order)], factor * task.cross[0][order])


def _adapter(design: _Design, whole: np.ndarray, free: int) -> tuple[np.ndarray, np.ndarray]:
    """The task's best linear map [channels, own channels] and shift [own channels] behind the shared channels."""
    ones = np.zeros((len(whole), 1))
    ones[free - 1] = 1
    made = np.concatenate([whole, ones], axis=1)
    gram = made.T @ design.gram @ made
    gram[np.diag_indices_from(gram)] += 1e-6 * np.trace(gram) / len(gram)
    solution = np.linalg.solve(gram, made.T @ design.cross)
    return solution[:-1], solution[-1]


def _conjugate(
    weights: np.ndarray, right: np.ndarray, grams: list[np.ndarray], squares: list[np.ndarray], pull: np.ndarray
) -> np.ndarray:
    """Solve sum_t G_t W S_t + pull W = right by conjugate gradients from `weights`."""

    def apply(matrix: np.ndarray) -> np.ndarray:
        return sum((g @ matrix @ s for g, s in zip(grams, squares, strict=True)), pull * matrix)

    residual = right - apply(weights)
    direction = np.array(residual)
    square = float((residual**2).sum())
    for _ in range(_CONJUGATE_STEPS):
        if square < 1e-18:
            break
        moved = apply(direction)
        step = square / float((direction * moved).sum())
        weights = weights + step * direction
        residual = residual - step * moved
        new = float((residual**2).sum())
        direction = residual + (new / square) * direction
        square = new
    return weights
