"""Which tasks go through the merged network together, and what they are fed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onnxmerge.calibration import ranks
from onnxmerge.calibration.module import GraphModule
from onnxmerge.calibration.objective import Objective
from onnxmerge.data import Batch, Split
from onnxmerge.errors import UsageError

Batches = dict[str, Batch]
"""One batch for each task of a stream."""


@dataclass(frozen=True)
class Stream:
    """Tasks whose batches go through the merged network in one pass."""

    objectives: tuple[Objective, ...]

    def run(self, merged: GraphModule, batches: Batches, *, taps: bool = True) -> dict[str, Tensor]:
        """The merged network's outputs and, if asked for, its tapped values."""
        feed = {name: x for o in self.objectives for name, x in o.feed(batches[o.task]).items()}
        return merged(feed, [name for o in self.objectives for name in (o.outputs + o.taps if taps else o.outputs)])

    def loss(self, merged: GraphModule, batches: Batches, weight: float) -> Tensor:
        """Sum of the tasks' losses; `weight`: see `Objective.loss`."""
        values = self.run(merged, batches)
        losses = [o.loss(values, o.targets(batches[o.task]), batches[o.task], weight) for o in self.objectives]
        return torch.stack(losses).sum()

    def shuffled(self, splits: Mapping[str, Split], size: int, seed: int, skip: int) -> Iterator[Batches]:
        """This process's part of batches without end, the first `skip` left out.

        Tasks with the very same split get the very same batch.
        """
        distinct, part = self._distinct(splits), (ranks.rank(), ranks.count())
        size = self.size(splits, size)
        return self._spread(splits, {key: s.shuffled(size, seed, skip, part) for key, s in distinct.items()})

    def weight(self, splits: Mapping[str, Split], size: int) -> float:
        """How many times the mean part of a batch this process's part of it is.

        Raises:
            UsageError: there are fewer samples in a batch than processes.
        """
        size = self.size(splits, size)
        if size < ranks.count():
            raise UsageError(f"a batch of {size} samples cannot be shared by {ranks.count()} processes")
        return len(np.array_split(np.arange(size), ranks.count())[ranks.rank()]) * ranks.count() / size

    def subset(self, splits: Mapping[str, Split], samples: int, size: int, seed: int) -> Iterator[Batches]:
        """At most `samples` samples of each task, once, in batches of `size`."""
        distinct = self._distinct(splits)
        samples = min(samples, *(len(split) for split in distinct.values()))
        return self._spread(splits, {key: split.take(samples, seed).batches(size) for key, split in distinct.items()})

    def bytes_of_one(self, merged: GraphModule, splits: Mapping[str, Split]) -> int:
        """What the values for one sample of each task take (see `GraphModule.value_bytes`)."""
        batches = next(self.subset(splits, 1, 1, 0))
        feed = {name: x for o in self.objectives for name, x in o.feed(batches[o.task]).items()}
        return merged.value_bytes(feed, [name for o in self.objectives for name in o.outputs + o.taps])

    def size(self, splits: Mapping[str, Split], size: int) -> int:
        """How many samples a batch has: `size`, or as many as there are."""
        return min(size, *(len(split) for split in self._distinct(splits).values()))

    def _distinct(self, splits: Mapping[str, Split]) -> dict[int, Split]:
        return {id(splits[o.task]): splits[o.task] for o in self.objectives}

    def _spread(self, splits: Mapping[str, Split], sources: Mapping[int, Iterator[Batch]]) -> Iterator[Batches]:
        for drawn in zip(*sources.values(), strict=False):
            batch_of = dict(zip(sources, drawn, strict=True))
            yield {o.task: batch_of[id(splits[o.task])] for o in self.objectives}


def group(
    merged: GraphModule, objectives: Sequence[Objective], data: Mapping[str, Split], held_out: Mapping[str, Split]
) -> list[Stream]:
    """Join tasks that read the very same data, and tasks whose outputs need each other's inputs; keep others apart.

    Raises:
        UsageError: an output needs an input that no task feeds.
    """
    groups: list[list[Objective]] = []
    for objective in objectives:
        joined = [g for g in groups if any(_belong(merged, objective, other, data, held_out) for other in g)]
        groups = [g for g in groups if g not in joined] + [[o for g in joined for o in g] + [objective]]
    for members in groups:
        fed = {name for o in members for name in o.inputs}
        for name in (name for o in members for name in merged.feeds(o.outputs + o.taps) if name not in fed):
            raise UsageError(f"the merged model's input {name!r} belongs to no task that is calibrated")
    return [Stream(tuple(members)) for members in groups]


def _belong(
    merged: GraphModule, a: Objective, b: Objective, data: Mapping[str, Split], held_out: Mapping[str, Split]
) -> bool:
    if data[a.task] is data[b.task] and held_out[a.task] is held_out[b.task]:
        return True
    missing = {o.task: set(merged.feeds(o.outputs + o.taps)) - set(o.inputs) for o in (a, b)}
    return bool(missing[a.task] & set(b.inputs) or missing[b.task] & set(a.inputs))
