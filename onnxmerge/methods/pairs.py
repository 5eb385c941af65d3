"""Second moments of two networks' channels on the same samples."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as oir

from onnxmerge.methods.task import Network, Task
from onnxmerge.runtime.activations import stream
from onnxmerge.runtime.patches import Positions, grid_of, output_rows
from onnxmerge.runtime.statistics import PairStatistics


def pair_statistics(
    ours: Network,
    theirs: Network,
    model: oir.Model,
    owners: Sequence[Task],
    values: Mapping[str, str],
    places: Mapping[str, int],
    *,
    samples: int,
    seed: int,
    threads: int | None,
) -> dict[str, PairStatistics]:
    """Statistics of our channels (a) and theirs (b) at sampled positions, by our value names.

    Args:
        ours: our network.
        theirs: the other.
        model: the form of the other network to run.
        owners: whose samples are looked at; those with the same data count once.
        values: names of our values -> those in `model`.
        places: the channel axis of each of our values that count.
        samples: of each owner.
        seed: of the choice of samples and positions.
        threads: for onnxruntime.
    """
    found = {name: PairStatistics() for name in places}
    generator = np.random.default_rng(seed)
    for owner in {id(owner.data): owner for owner in owners}.values():
        split = owner.data.calibration.take(samples, seed)
        first = stream(ours.model, owner.feeds(split, ours), list(places), threads=threads)
        second = stream(model, owner.feeds(split, theirs), [values[name] for name in places], threads=threads)
        for a, b in zip(first, second, strict=True):
            for name, axis in places.items():
                positions = Positions.sample(generator, grid_of(a[name], axis))
                rows = output_rows(a[name], axis, positions)
                found[name].update(rows, output_rows(b[values[name]], axis, positions))
    return found
