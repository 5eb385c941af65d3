"""Does a packed model give what its originals give? Both run in onnxruntime on made-up inputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxmerge.errors import ModelError, OnnxMergeError, UsageError
from onnxmerge.runtime.session import open_session, random_feeds, run

if TYPE_CHECKING:
    import onnxruntime

_BATCHES = (2, 1)
"""Sizes tried for a symbolic first axis: some exports run at batch 1 only."""


@dataclass(frozen=True)
class Original:
    """A task's file, and for each of its inputs what the packed model calls it."""

    path: Path
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class Difference:
    """How far a task's outputs are from the original's, all outputs together.

    Attributes:
        identical: equal bit for bit.
        largest: the largest max|packed - original| / max|original| of any output.
        relative: |packed - original| / |original|, Frobenius norms.
    """

    identical: bool
    largest: float
    relative: float


def compare(
    packed: Path, originals: Mapping[str, Original], *, seed: int, threads: int | None
) -> tuple[dict[str, Difference], list[str]]:
    """Run the packed model and then each original, one session at a time.

    Returns:
        The differences by task, and one sentence for each task that could not be compared.

    Raises:
        ModelError: onnxruntime refuses the packed model, or cannot run it, but bears the originals.
    """
    try:
        session = open_session(packed, threads=threads)
    except OnnxMergeError as error:
        for original in originals.values():
            try:
                open_session(original.path, threads=threads)
            except OnnxMergeError as refused:
                return {}, [f"Nothing was compared: {refused}."]
        raise ModelError(f"{packed.name}: {str(error).removeprefix(f'{packed}: ')}") from error
    try:
        feeds, outputs, failure = _run_packed(session, seed)
    except UsageError as error:
        return {}, [f"Nothing was compared: {error}."]
    del session  # one at a time is in memory
    found: dict[str, Difference] = {}
    notes, bearing = [], []
    for task, original in originals.items():
        own = {name: feeds[called] for name, called in original.inputs.items()}
        try:
            expected = run(open_session(original.path, threads=threads), own)
        except OnnxMergeError as error:
            notes.append(f"{task} was not compared, for the original itself does not run on made-up inputs: {error}.")
            continue
        if failure is not None:
            bearing.append(original.path)
            continue
        found[task] = difference({name: outputs[f"{task}/{name}"] for name in expected}, expected)
    if bearing and len(bearing) == len(originals):
        raise ModelError(f"{packed.name}: {failure}, but {bearing[0]} runs on the same inputs") from failure
    if bearing:
        notes.append(f"{', '.join(path.stem for path in bearing)} could not be compared for the same reason.")
    return found, notes


def _run_packed(
    session: "onnxruntime.InferenceSession", seed: int
) -> tuple[dict[str, np.ndarray], dict[str, Any], OnnxMergeError | None]:
    """Made-up inputs, the outputs on them, and the last error when no batch size works."""
    failure: OnnxMergeError | None = None
    for batch in _BATCHES:
        feeds = random_feeds(session, batch, seed)
        try:
            return feeds, run(session, feeds), None
        except OnnxMergeError as error:
            failure = error
    return feeds, {}, failure


def difference(got: Mapping[str, Any], expected: Mapping[str, Any]) -> Difference:
    """How far the outputs `got` are from those of the same names in `expected`."""
    pairs = [(np.asarray(got[name]), np.asarray(expected[name])) for name in expected]
    if all(_is_same(ours, theirs) for ours, theirs in pairs):
        return Difference(identical=True, largest=0.0, relative=0.0)
    numeric = all(a.shape == b.shape and a.dtype == b.dtype and a.dtype.kind in "fiub" for a, b in pairs)
    if not numeric:
        return Difference(identical=False, largest=float("inf"), relative=float("inf"))
    gaps = [(np.abs(a.astype(np.float64) - b), np.abs(b.astype(np.float64))) for a, b in pairs]
    largest = max((_ratio(gap.max(initial=0.0), size.max(initial=0.0)) for gap, size in gaps), default=0.0)
    total = np.sqrt([sum((part[i] ** 2).sum() for part in gaps) for i in (0, 1)])
    return Difference(identical=False, largest=largest, relative=_ratio(total[0], total[1]))


def _is_same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    return bool((ours == theirs).all()) if ours.dtype == object else ours.tobytes() == theirs.tobytes()


def _ratio(gap: float, size: float) -> float:
    """gap / size; infinite where it is no number, or where something differs from nothing."""
    ratio = 0.0 if gap == 0 else float(gap) / float(size) if size > 0 else float("inf")
    return ratio if np.isfinite(ratio) else float("inf")
