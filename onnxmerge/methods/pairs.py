"""Second moments of two networks' channels on the same samples."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.compose import cut_out
from onnxmerge.ir.units import find_units
from onnxmerge.methods.task import Network, Task
from onnxmerge.runtime.activations import BATCH, Arrays, Samples, Stored, keep, lockstep
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
    within: bool = True,
) -> dict[str, PairStatistics]:
    """Statistics of our channels (a) and theirs (b) at sampled positions, by our value names.

    Values that do not have as many positions in both networks are left out.

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
        within: see `PairStatistics`.
    """
    found: dict[str, PairStatistics] = {}
    generator = np.random.default_rng(seed)
    for owner in {id(owner.data): owner for owner in owners}.values():
        split = owner.data.calibration.take(samples, seed)
        feeds = owner.feeds(split, ours), owner.feeds(split, theirs)
        grids = _grids((ours.model, model), feeds, values, places, threads)
        drawn = [
            {name: Positions.sample(generator, grid) for name, grid in grids.items()}
            for _ in range(0, len(split), BATCH)
        ]

        def update(start: int, a: Arrays, b: Arrays, drawn: Sequence[Mapping[str, Positions]] = drawn) -> None:
            for name in [name for name in a if name in drawn[0]]:
                at = places[name], drawn[start // BATCH][name]
                found.setdefault(name, PairStatistics(within)).update(
                    output_rows(a[name], *at), output_rows(b[name], *at)
                )

        _walk((ours.model, model), feeds, values, list(places), update, threads)
    return {name: found[name] for name in places if name in found}


class _First:
    """The first of some samples."""

    def __init__(self, samples: Samples):
        self._samples = samples

    def batches(self, size: int) -> Iterator[Mapping[str, np.ndarray]]:
        """See `Samples`."""
        yield next(self._samples.batches(1))


def _grids(
    models: tuple[oir.Model, oir.Model],
    feeds: tuple[Samples, Samples],
    values: Mapping[str, str],
    places: Mapping[str, int],
    threads: int | None,
) -> dict[str, tuple[int, ...]]:
    """The grid of each place that has the same one in both networks."""
    found: dict[str, tuple[int, ...]] = {}

    def compare(_: int, a: Arrays, b: Arrays) -> None:
        grids = {name: (grid_of(a[name], places[name]), grid_of(b[name], places[name])) for name in a if name in places}
        found.update({name: grid for name, (grid, theirs) in grids.items() if grid == theirs})

    _walk(models, (_First(feeds[0]), _First(feeds[1])), values, list(places), compare, threads)
    return {name: found[name] for name in places if name in found}


def _walk(
    models: tuple[oir.Model, oir.Model],
    feeds: tuple[Samples, Samples],
    values: Mapping[str, str],
    wanted: Sequence[str],
    update: Callable[[int, Arrays, Arrays], None],
    threads: int | None,
) -> None:
    """Tell `update` the number of the first sample of each batch and the values `wanted` of both, by our names.

    Both networks are walked from cut to cut, and what arrives at one is kept on disk: so only the weights between two
    cuts are loaded at a time.
    """
    their_cuts = {unit.cut for unit in find_units(models[1])}
    cuts = [unit.cut for unit in find_units(models[0]) if values.get(unit.cut) in their_cuts]
    at = [[value.name or "" for value in model.graph.inputs] for model in models]
    samples: tuple[Samples, Samples] = feeds
    left = list(wanted)
    with tempfile.TemporaryDirectory(prefix="onnxmerge-") as folder:
        for step, cut in enumerate([*cuts, None]):
            inside = left if cut is None else _computed(cut_out(models[0], at[0], [cut]), left)
            left = [name for name in left if name not in inside]
            asked = list(dict.fromkeys([*inside, *([] if cut is None else [cut])]))
            if not inside and not left:
                return
            names = asked, [values[name] for name in asked]
            pieces = [cut_out(model, *ends) for model, *ends in zip(models, at, names, strict=True)]
            batches = lockstep(*zip(pieces, samples, names, strict=True), threads=threads)
            kept = keep(_passing(batches, values, cut, update), Path(folder) / str(step)).arrays
            if cut is not None:
                samples = Stored({cut: kept["ours"]}), Stored({values[cut]: kept["theirs"]})
                at = [[cut], [values[cut]]]
            if step:
                shutil.rmtree(Path(folder) / str(step - 1))


def _computed(piece: oir.Model, names: Sequence[str]) -> list[str]:
    made = {value.name for node in piece.graph for value in node.outputs}
    return [name for name in names if name in made]


def _passing(
    batches: Iterator[tuple[Arrays, ...]],
    values: Mapping[str, str],
    cut: str | None,
    update: Callable[[int, Arrays, Arrays], None],
) -> Iterator[Arrays]:
    """What arrives at the cut, after `update` has seen the batch."""
    start = 0
    for a, b in batches:
        update(start, a, {name: b[values[name]] for name in a})
        start += len(next(iter(a.values())))
        yield {} if cut is None else {"ours": a[cut], "theirs": b[values[cut]]}
