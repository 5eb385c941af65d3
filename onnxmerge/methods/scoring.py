"""Compare a merged model with its originals in onnxruntime, on held-out samples.

A task is a classifier where its first output looks like one: [N, classes] or [N, classes, 1, 1], not ended by what ends
independent labels, coordinates or embeddings, and not naming one and the same class on many samples; labels settle it.
Images, boxes, sequences and other numbers are judged by their relative error.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as oir

from onnxmerge.data import Batch, Split
from onnxmerge.errors import UsageError
from onnxmerge.ir.outputs import is_class_shape, may_name_classes, same_but_for_ones
from onnxmerge.methods.tolerance import Gap
from onnxmerge.report.schema import TaskScore
from onnxmerge.runtime.activations import BATCH, CPU, Samples, stream

MANY = 50
"""Samples of which a classifier should name more than one class: else agreement says nothing."""


@dataclass
class Tally:
    """Running sums over batches of one task's outputs."""

    correct: int = 0
    original_correct: int = 0
    labelled: int = 0
    agreeing: int = 0
    classified: int = 0
    named: set[int] = field(default_factory=set)
    """Classes that the original names."""
    differences: list[float] = field(default_factory=list)
    magnitudes: list[float] = field(default_factory=list)
    """Sums of squares over all samples, for each output."""
    gaps: Sequence[Gap | None] = ()
    """For each output its gap where that has a tolerance; empty: none has."""
    may_classify: bool = True
    """Whether the first output's end allows that it names classes (see `may_name_classes`)."""

    def update(self, merged: Sequence[np.ndarray], original: Sequence[np.ndarray], labels: np.ndarray | None) -> None:
        """Add a batch: the outputs in one order, and class numbers where known."""
        self.differences = self.differences or [0.0] * len(original)
        self.magnitudes = self.magnitudes or [0.0] * len(original)
        for place, (ours, theirs) in enumerate(zip(merged, original, strict=True)):
            gap = ours.astype(np.float64) - theirs
            self.differences[place] += float((gap**2).sum())
            self.magnitudes[place] += float((theirs.astype(np.float64) ** 2).sum())
            if self.gaps and (own := self.gaps[place]) is not None:
                own.update(ours, theirs)
        if not is_class_shape(original[0].shape) or not (self.may_classify or labels is not None):
            return
        ours, theirs = (output.reshape(len(output), -1).argmax(1) for output in (merged[0], original[0]))
        self.classified += len(theirs)
        self.agreeing += int((ours == theirs).sum())
        self.named |= set(theirs.tolist())
        if labels is not None:
            self.labelled += len(labels)
            self.correct += int((ours == labels).sum())
            self.original_correct += int((theirs == labels).sum())

    def relative_error(self) -> float | None:
        """|merged - original| / |original| of the output that fares worst; None where all originals are zero.

        Outputs are not added up: boxes in pixels would drown the scores that come with them.
        """
        pairs = zip(self.differences, self.magnitudes, strict=True)
        return max((float(np.sqrt(d / m)) for d, m in pairs if m > 0), default=None)

    def score(self) -> TaskScore:
        """The figures of the report."""
        classifier = self.labelled > 0 or (self.classified > 0 and (len(self.named) > 1 or self.classified < MANY))
        return TaskScore(
            accuracy=self.correct / self.labelled if self.labelled else None,
            original_accuracy=self.original_correct / self.labelled if self.labelled else None,
            agreement=self.agreeing / self.classified if classifier else None,
            relative_error=self.relative_error(),
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
    providers: Sequence[str] = CPU,
) -> Tally:
    """Run `merged` over `merged_samples` and hold its outputs `names` against the original's, batch by batch."""
    tally.may_classify = may_name_classes(merged, names[0])
    ours = stream(merged, merged_samples, names, threads=threads, providers=providers)
    for batch, ran, expected in zip(split.batches(BATCH), ours, original, strict=True):
        _check_labels(batch, expected[original_names[0]], original_names[0])
        tally.update([ran[n] for n in names], [expected[n] for n in original_names], batch.classes)
    return tally


def _check_labels(batch: Batch, output: np.ndarray, name: str) -> None:
    classes, numbers = batch.classes, batch.labels
    if classes is not None:
        if is_class_shape(output.shape) and len(classes) and classes.max() >= output.shape[1]:
            raise UsageError(
                f"a label says class {int(classes.max())}, but the output {name!r} has {output.shape[1]} classes; "
                "do these labels belong to this task?"
            )
    elif numbers is not None and not same_but_for_ones(numbers.shape[1:], output.shape[1:]):
        raise UsageError(
            f"the labels are floats of shape {list(numbers.shape[1:])} for each sample, but the output {name!r} has "
            f"{list(output.shape[1:])}; class numbers are integers"
        )
