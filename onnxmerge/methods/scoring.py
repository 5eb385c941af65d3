"""Compare a merged model with its originals in onnxruntime, on held-out samples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from onnxmerge.data import Split
from onnxmerge.errors import UsageError
from onnxmerge.report.schema import TaskScore
from onnxmerge.runtime.activations import BATCH, Samples, stream


@dataclass
class Tally:
    """Running sums over batches of one task's outputs."""

    correct: int = 0
    original_correct: int = 0
    labelled: int = 0
    agreeing: int = 0
    classified: int = 0
    difference: float = 0.0
    magnitude: float = 0.0
    largest: float = 0.0
    """Largest absolute difference of any output."""
    compared: int = 0
    violations: int = 0
    """Output values that differ by more than `atol + rtol |original|`."""
    atol: float | None = None
    rtol: float | None = None

    def update(self, merged: Sequence[np.ndarray], original: Sequence[np.ndarray], labels: np.ndarray | None) -> None:
        """Add a batch: the outputs in one order, and class numbers where known."""
        for ours, theirs in zip(merged, original, strict=True):
            gap = ours.astype(np.float64) - theirs
            self.difference += float((gap**2).sum())
            self.magnitude += float((theirs.astype(np.float64) ** 2).sum())
            self.largest = max(self.largest, float(np.abs(gap).max(initial=0)))
            self.compared += gap.size
            if self.atol is not None or self.rtol is not None:
                bound = (self.atol or 0.0) + (self.rtol or 0.0) * np.abs(theirs)
                self.violations += int((np.abs(gap) > bound).sum())
        if original[0].ndim != 2 or original[0].shape[1] < 2:
            return
        ours, theirs = merged[0].argmax(1), original[0].argmax(1)
        self.classified += len(theirs)
        self.agreeing += int((ours == theirs).sum())
        if labels is not None:
            self.labelled += len(labels)
            self.correct += int((ours == labels).sum())
            self.original_correct += int((theirs == labels).sum())

    def score(self) -> TaskScore:
        """The figures of the report."""
        return TaskScore(
            accuracy=self.correct / self.labelled if self.labelled else None,
            original_accuracy=self.original_correct / self.labelled if self.labelled else None,
            agreement=self.agreeing / self.classified if self.classified else None,
            relative_error=float(np.sqrt(self.difference / self.magnitude)) if self.magnitude > 0 else None,
        )


def compare(
    merged: oir.Model,
    names: Sequence[str],
    merged_samples: Samples,
    original: Iterator[Mapping[str, np.ndarray]],
    original_names: Sequence[str],
    split: Split,
    tally: Tally,
    *,
    threads: int | None = None,
) -> Tally:
    """Run `merged` over `merged_samples` and hold its outputs `names` against the original's, batch by batch."""
    ours = stream(merged, merged_samples, names, threads=threads)
    for batch, ran, expected in zip(split.batches(BATCH), ours, original, strict=True):
        _check_labels(batch.labels, expected[original_names[0]], original_names[0])
        tally.update([ran[n] for n in names], [expected[n] for n in original_names], batch.labels)
    return tally


def _check_labels(labels: np.ndarray | None, output: np.ndarray, name: str) -> None:
    if labels is not None and output.ndim == 2 and len(labels) and labels.max() >= output.shape[1]:
        raise UsageError(
            f"a label says class {int(labels.max())}, but the output {name!r} has {output.shape[1]} classes; "
            "do these labels belong to this task?"
        )
