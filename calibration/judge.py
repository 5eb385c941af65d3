"""Judge weights by their loss on held-out data."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from onnxmerge.calibration.module import GraphModule
from onnxmerge.calibration.streams import Batches, Stream
from onnxmerge.data import Split

HELD_OUT_SAMPLES = 1000
"""At most this many held-out samples of each task judge the weights."""


class Judge:
    """The held-out loss on a fixed choice of samples; the teachers' outputs are computed once, in float32."""

    def __init__(
        self, student: GraphModule, streams: Sequence[Stream], held_out: Mapping[str, Split], batch: int, seed: int
    ):
        """Run the teachers, and tell the objectives how large their outputs are."""
        self._student, self._streams, self._held_out, self._batch, self._seed = student, streams, held_out, batch, seed
        self._targets: dict[str, list[list[Tensor]]] = {}
        for stream in streams:
            for objective in stream.objectives:
                targets = [objective.output_targets(batches[objective.task]) for batches in self._batches(stream)]
                objective.scale(targets)
                self._targets[objective.task] = targets

    def loss(self) -> float:
        """The sum of all tasks' output losses, each its mean over the samples."""
        with torch.no_grad():
            return sum(self._stream_loss(stream) for stream in self._streams)

    def _batches(self, stream: Stream) -> Iterator[Batches]:
        return stream.subset(self._held_out, HELD_OUT_SAMPLES, self._batch, self._seed)

    def _stream_loss(self, stream: Stream) -> float:
        total, samples = 0.0, 0
        for number, batches in enumerate(self._batches(stream)):
            values = stream.run(self._student, batches, taps=False)
            count = len(next(iter(next(iter(batches.values())).inputs.values())))
            for o in stream.objectives:
                total += count * float(o.output_loss(values, self._targets[o.task][number], batches[o.task]))
            samples += count
        return total / samples
