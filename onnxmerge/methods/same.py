"""Does a rewritten model still give the same? Both run in onnxruntime on made-up inputs."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from onnxmerge.errors import OnnxMergeError, UsageError
from onnxmerge.methods.pack.parity import difference
from onnxmerge.runtime.session import open_session, random_feeds, run

TOLERANCE = 1e-4
"""Largest relative difference of an output that passes as float rounding."""
_BATCHES = (2, 1)
"""Sizes tried for a symbolic first axis: some exports run at batch 1 only."""

Arrays = Mapping[str, np.ndarray]


class Runs:
    """A model file on made-up inputs: numbers from N(0, 1), from 0 to 1, and from 0 to 255, as pixels come.

    Args:
        path: of the model.
        seed: of the inputs.
        threads: for onnxruntime.

    Raises:
        ModelError: onnxruntime refuses the model.
    """

    def __init__(self, path: Path, seed: int, threads: int | None):
        self._session = open_session(path, threads=threads)
        self._seed = seed
        self.inputs = {value.name: (value.type, value.shape) for value in self._session.get_inputs()}
        self.outputs = {value.name: (value.type, value.shape) for value in self._session.get_outputs()}
        self.failure: OnnxMergeError | None = None
        """Why the model does not run on made-up inputs, once that was tried."""

    def check_interface(self, after: "Runs", step: str) -> None:
        """See that the model `after` the step has the same inputs and outputs.

        Raises:
            UsageError: one is gone, new, elsewhere, or of another type or shape.
        """
        for kind, ours, theirs in (("input", self.inputs, after.inputs), ("output", self.outputs, after.outputs)):
            changed = _changed(ours, theirs)
            if changed is not None:
                raise UsageError(f"{step}: {changed.format(kind)}; --change-interface allows it")

    def compare(self, after: "Runs") -> dict[str, float] | None:
        """The largest relative difference of each output that both have; None where this model does not run.

        Inputs and outputs pair by name, or in order where names changed and their number did not.

        Raises:
            ModelError: the other does not run.
        """
        fed, made = _pairs(list(self.inputs), list(after.inputs)), _pairs(list(self.outputs), list(after.outputs))
        found: dict[str, float] = {}
        for feeds, expected in self._results:
            try:
                got = run(after._session, {fed[name]: array for name, array in feeds.items() if name in fed})
            except UsageError:
                return None  # an input is new, or takes something else
            for ours, theirs in made.items():
                largest = difference({ours: got[theirs]}, {ours: expected[ours]}).largest
                found[ours] = max(found.get(ours, 0.0), largest)
        return found or None

    @cached_property
    def _results(self) -> list[tuple[Arrays, Arrays]]:
        for batch in _BATCHES:
            try:
                drawn = random_feeds(self._session, batch, self._seed)
                return [(feeds, run(self._session, feeds)) for feeds in self._spread(drawn)]
            except OnnxMergeError as error:
                self.failure = error
        return []

    def _spread(self, drawn: Arrays) -> Iterator[Arrays]:
        yield drawn
        generator = np.random.default_rng(self._seed)
        uniform = {
            name: generator.random(array.shape).astype(array.dtype)
            for name, array in drawn.items()
            if array.dtype.kind == "f"
        }
        for scale in (1, 255) if uniform else ():
            yield {**drawn, **{name: (scale * array).astype(array.dtype) for name, array in uniform.items()}}


def _changed(ours: Mapping[str, tuple[str, Sequence]], theirs: Mapping[str, tuple[str, Sequence]]) -> str | None:
    """What sets two lists of inputs or outputs apart; the kind goes where `{}` stands."""
    for name in ours:
        if name not in theirs:
            return f"the {{}} {name!r} is gone"
    for name in theirs:
        if name not in ours:
            return f"there is a new {{}} {name!r}"
    if list(ours) != list(theirs):
        return "the {}s stand in another order"
    for name, (kind, shape) in ours.items():
        if theirs[name][0] != kind:
            return f"the {{}} {name!r} is of type {theirs[name][0]}, no longer {kind}"
        if not _may_be_one(shape, theirs[name][1]):
            return f"the {{}} {name!r} has shape {theirs[name][1]}, no longer {shape}"
    return None


def _may_be_one(ours: Sequence, theirs: Sequence) -> bool:
    """Whether two shapes differ in nothing but in which sizes are known; onnxruntime calls an unknown rank []."""
    if not ours or not theirs:
        return True
    known = [(a, b) for a, b in zip(ours, theirs, strict=False) if isinstance(a, int) and isinstance(b, int)]
    return len(ours) == len(theirs) and all(a == b for a, b in known)


def _pairs(ours: Sequence[str], theirs: Sequence[str]) -> dict[str, str]:
    common = {name: name for name in ours if name in theirs}
    return common if common or len(ours) != len(theirs) else dict(zip(ours, theirs, strict=True))
