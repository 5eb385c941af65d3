"""The permutation law as a preflight: does permuting the channel spaces leave the network's function alone?

Every space gets a random cyclic permutation, which moves every channel, and onnxruntime runs the network before and
after. Only float rounding may differ.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.save import save
from onnxmerge.ir.spaces import Space, Spaces
from onnxmerge.passes.permute import Permute
from onnxmerge.runtime.session import open_session, random_feeds, run
from onnxmerge.scratch import scratch

TOLERANCE = 1e-4
"""Largest relative error that passes as float rounding."""
ALONE_LIMIT = 60
"""Up to so many spaces each is tried alone even when all at once pass."""
_BATCH = 2
_SATURATING = {"Sigmoid", "HardSigmoid", "Softmax", "Tanh", "Clip"}

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Check:
    """How the permutation law fared.

    Attributes:
        passed: every error is within `TOLERANCE`.
        max_relative_error: the largest max|a - b| / max|a| of any output and any permutation tried.
        worst_space: the space with the largest error when permuted alone; None where none was tried alone.
    """

    passed: bool
    max_relative_error: float
    worst_space: str | None


def check_spaces(model: oir.Model, spaces: Spaces, *, seed: int, threads: int | None = None) -> Check:
    """Permute all spaces of `model` at once, then each alone, and compare outputs in onnxruntime.

    Each alone is left out where all at once pass and there are more than `ALONE_LIMIT` spaces. An output that ends in a
    saturating activation is compared before it, where an error cannot hide.

    Args:
        model: a normalised model; stays as it is.
        spaces: its channel spaces.
        seed: of inputs and permutations.
        threads: for onnxruntime.

    Raises:
        ModelError: onnxruntime refuses the model or cannot run it.
        UsageError: an input is no tensor of numbers.
    """
    permutable = spaces.permutable()
    if not permutable:
        return Check(True, 0.0, None)
    generator = np.random.default_rng(seed)
    permutations = {space.name: _cycle(space.size, generator) for space in permutable}
    judged = _judge_before_saturation(model)
    with scratch() as folder:
        trial = _Trial(judged, folder / "model.onnx", seed, threads)
        together = trial.error(permutable, permutations)
        alone: dict[str, float] = {}
        if not together <= TOLERANCE or len(permutable) <= ALONE_LIMIT:
            alone = {space.name: trial.error([space], permutations) for space in permutable}
    worst = max([together, *alone.values()])
    return Check(worst <= TOLERANCE, worst, max(alone, key=alone.__getitem__) if alone else None)


class _Trial:
    """The network on one set of inputs, and what its outputs were before any permutation."""

    def __init__(self, model: oir.Model, path: Path, seed: int, threads: int | None):
        self._model, self._path, self._threads = model, path, threads
        save(model, path)
        session = open_session(path, threads=threads)
        made_up = random_feeds(session, _BATCH, seed)
        generator = np.random.default_rng(seed)
        uniform = {
            name: generator.random(a.shape).astype(a.dtype) for name, a in made_up.items() if a.dtype.kind == "f"
        }
        self._feeds = made_up | uniform
        self._before = run(session, self._feeds)
        if uniform and not any(np.ptp(array) > 0 for array in self._before.values()):  # pixels may be 0..255
            self._feeds = made_up | {name: 255 * array for name, array in uniform.items()}
            self._before = run(session, self._feeds)

    def error(self, spaces: Sequence[Space], permutations: Arrays) -> float:
        """The largest relative error of any output when `spaces` are permuted."""
        permuted = self._model.clone()
        Permute({s.name: permutations[s.name] for s in spaces}, {s.name: s for s in spaces})(permuted)
        save(permuted, self._path)
        after = run(open_session(self._path, threads=self._threads), self._feeds)
        return max(_relative_error(self._before[name], after[name]) for name in self._before)


def _cycle(size: int, generator: np.random.Generator) -> np.ndarray:
    order = generator.permutation(size)
    permutation = np.empty(size, np.int64)
    permutation[order] = np.roll(order, 1)
    return permutation


def _judge_before_saturation(model: oir.Model) -> oir.Model:
    """A copy whose outputs are taken before the saturating activations that end the graph."""
    copy = model.clone()
    for index, output in enumerate(copy.graph.outputs):
        value, producer = output, output.producer()
        while producer is not None and producer.op_type in _SATURATING and (source := producer.inputs[0]) is not None:
            value, producer = source, source.producer()
        if value.type is not None and value not in copy.graph.outputs and not value.is_graph_input():
            copy.graph.outputs[index] = value
    return copy


def _relative_error(before: np.ndarray, after: np.ndarray) -> float:
    """max|before - after| / max|before|; infinite where the shapes differ or a number is not finite."""
    if before.shape != after.shape:
        return float("inf")
    if before.size == 0:
        return 0.0
    a, b = before.astype(np.float64), after.astype(np.float64)
    difference, scale = float(np.abs(a - b).max()), float(np.abs(a).max())
    if difference == 0:
        return 0.0
    return difference / scale if scale > 0 and np.isfinite(difference) else float("inf")
