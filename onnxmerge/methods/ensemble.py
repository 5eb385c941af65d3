"""The ensemble of networks of one task: their mean prediction, the yardstick of what becomes of them.

A classifier's prediction is its logits (output [N, classes]) divided by their standard deviation, so that no network
has more say for being sure of itself; anything else's are its outputs. Without labels, agreement with the ensemble says
which of several networks is best: its members err in different places, so it is right more often than they are.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as oir

from onnxmerge.methods.scoring import Tally, compare
from onnxmerge.methods.task import Feeds, Task
from onnxmerge.report.schema import TaskScore
from onnxmerge.runtime.activations import BATCH, Arrays, Stored, store


class Ensemble:
    """The mean prediction of `tasks` on the held-out samples of all.

    Args:
        tasks: networks of one task.
        weights: of each in the mean.
        folder: for temporary files: what every network makes of every sample.
        threads: for onnxruntime.
    """

    def __init__(self, tasks: Sequence[Task], weights: Sequence[float], folder: Path, threads: int | None):
        self._tasks, self._threads = tasks, threads
        self._owners = list({id(task.data): task for task in tasks}.values())
        self._shares = np.array(weights) / sum(weights)
        self._outputs = [
            [self._store(task, owner, folder / f"{n}-{number}") for number, task in enumerate(tasks)]
            for n, owner in enumerate(self._owners)
        ]

    def score(self, model: oir.Model) -> TaskScore:
        """How `model`, whose inputs and outputs pair with the networks' in order, fares against the ensemble.

        The ensemble is the original: its accuracy is `original_accuracy`. A classifier, whose logits have another scale
        than the predictions, has no relative error.
        """
        tally = Tally()
        inputs, outputs = ([v.name or "" for v in values] for values in (model.graph.inputs, model.graph.outputs))
        for owner, stored in zip(self._owners, self._outputs, strict=True):
            split = owner.data.held_out
            feeds = Feeds(split, dict(zip(owner.inputs, inputs, strict=True)))
            names = self._tasks[0].outputs
            compare(model, outputs, feeds, self._means(stored), names, split, tally, threads=self._threads)
        score = tally.score()
        return score if score.agreement is None else score.model_copy(update={"relative_error": None})

    def _store(self, task: Task, owner: Task, folder: Path) -> Stored:
        return store(task.model, owner.feeds(owner.data.held_out, task), task.outputs, folder, threads=self._threads)

    def _means(self, stored: Sequence[Stored]) -> Iterator[Arrays]:
        """The mean prediction for each batch, under the first network's names."""
        factors = [
            [share / _scale(outputs, name) for name in task.outputs]
            for share, task, outputs in zip(self._shares, self._tasks, stored, strict=True)
        ]
        for batches in zip(*(outputs.batches(BATCH) for outputs in stored), strict=True):
            yield {
                name: np.sum(
                    [
                        own[place] * batch[task.outputs[place]]
                        for own, task, batch in zip(factors, self._tasks, batches, strict=True)
                    ],
                    axis=0,
                )
                for place, name in enumerate(self._tasks[0].outputs)
            }


def _scale(outputs: Stored, name: str) -> float:
    """The standard deviation of logits around each sample's mean; 1 for other outputs."""
    square, count = 0.0, 0
    for batch in outputs.batches(BATCH):
        if batch[name].ndim != 2 or batch[name].shape[1] < 2:
            return 1.0
        logits = batch[name].astype(np.float64)
        square += float(((logits - logits.mean(axis=1, keepdims=True)) ** 2).sum())
        count += batch[name].size
    return float(np.sqrt(square / count)) or 1.0
