"""Second moments of two networks' channels on the same samples."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.compose import cut_out
from onnxmerge.ir.units import find_units
from onnxmerge.methods.task import Network, Task
from onnxmerge.runtime.activations import BATCH, Arrays, Samples, Stored, keep, lockstep
from onnxmerge.runtime.heap import return_memory
from onnxmerge.runtime.patches import Positions, grid_of, output_rows
from onnxmerge.runtime.statistics import PairStatistics
from onnxmerge.scratch import scratch


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

        def update(start: int, both: Sequence[Arrays], drawn: Sequence[Mapping[str, Positions]] = drawn) -> None:
            a, b = both
            for name in [name for name in a if name in drawn[0]]:
                at = places[name], drawn[start // BATCH][name]
                found.setdefault(name, PairStatistics(within)).update(
                    output_rows(a[name], *at), output_rows(b[name], *at)
                )

        for _ in walk((ours.model, model), [feeds], (_same(values), values), list(places), update, threads):
            pass
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

    def compare(_: int, both: Sequence[Arrays]) -> None:
        a, b = both
        grids = {name: (grid_of(a[name], places[name]), grid_of(b[name], places[name])) for name in a if name in places}
        found.update({name: grid for name, (grid, theirs) in grids.items() if grid == theirs})

    first = _First(feeds[0]), _First(feeds[1])
    for _ in walk(models, [first], (_same(values), values), list(places), compare, threads):
        pass
    return {name: found[name] for name in places if name in found}


def _same(values: Mapping[str, str]) -> dict[str, str]:
    return {name: name for name in values}


def walk(
    models: Sequence[oir.Model],
    feeds: Sequence[Sequence[Samples]],
    values: Sequence[Mapping[str, str]],
    wanted: Sequence[str],
    update: Callable[[int, Sequence[Arrays]], None],
    threads: int | None,
) -> Iterator[list[str]]:
    """Run several networks side by side over the same samples; yields the names of values that are done with.

    The networks are walked from cut to cut, and what arrives at one is kept on disk: so only the weights between two
    cuts are loaded at a time. What was freed, before and at each cut, goes back to the system.

    Args:
        models: of one structure between the cuts that all have.
        feeds: sets of samples, each as every model reads it.
        values: for each model our names of values -> its own.
        wanted: our names; a model need not have all of them.
        update: told the number of the first sample of each batch, and for each model the values by our names.
        threads: for onnxruntime.
    """
    cuts = _common_cuts(models, values)
    at = [[value.name or "" for value in model.graph.inputs] for model in models]
    samples = [list(own) for own in feeds]
    left = list(wanted)
    return_memory()
    with scratch() as folder:
        for step, cut in enumerate([*cuts, None]):
            ends = [] if cut is None else [own[cut] for own in values]
            inside = left if cut is None else _computed(models, at, ends, values, left)
            left = [name for name in left if name not in inside]
            if not inside and not left:
                return
            asked = list(dict.fromkeys([*inside, *([] if cut is None else [cut])]))
            names = [[name for name in asked if name in own] for own in values]
            known = [[own[name] for name in some] for own, some in zip(values, names, strict=True)]
            pieces = [cut_out(*piece) if piece[2] else piece[0] for piece in zip(models, at, known, strict=True)]
            for number, own in enumerate(samples):
                batches = lockstep(*zip(pieces, own, known, strict=True), threads=threads)
                room = folder / f"{step}-{number}"
                kept = keep(_passing(batches, names, values, cut, update), room).arrays
                if step:
                    shutil.rmtree(folder / f"{step - 1}-{number}")
                if cut is not None:
                    samples[number] = [Stored({end: kept[str(place)]}) for place, end in enumerate(ends)]
            at = [[end] for end in ends]
            del pieces, batches
            return_memory()
            yield inside
            return_memory()


def _common_cuts(models: Sequence[oir.Model], values: Sequence[Mapping[str, str]]) -> list[str]:
    """Our names of the first model's cuts that are cuts of all."""
    cuts = [[unit.cut for unit in find_units(model)] for model in models]
    ours = {name: own for own, name in values[0].items()}
    candidates = [ours[cut] for cut in cuts[0] if cut in ours]
    return [cut for cut in candidates if all(own.get(cut) in some for own, some in zip(values, cuts, strict=True))]


def _computed(
    models: Sequence[oir.Model],
    at: Sequence[Sequence[str]],
    ends: Sequence[str],
    values: Sequence[Mapping[str, str]],
    names: Sequence[str],
) -> list[str]:
    """Which of the values lie before the ends."""
    found: set[str] = set()
    for model, inputs, end, own in zip(models, at, ends, values, strict=True):
        piece = cut_out(model, inputs, [end])
        made = {value.name for node in piece.graph for value in node.outputs}
        found |= {name for name in names if own.get(name) in made}
    return [name for name in names if name in found]


def _passing(
    batches: Iterator[tuple[Arrays, ...]],
    names: Sequence[Sequence[str]],
    values: Sequence[Mapping[str, str]],
    cut: str | None,
    update: Callable[[int, Sequence[Arrays]], None],
) -> Iterator[Arrays]:
    """What arrives at the cut, after `update` has seen the batch."""
    start = 0
    for arrays in batches:
        own = [
            {name: batch[called[name]] for name in some}
            for batch, some, called in zip(arrays, names, values, strict=True)
        ]
        update(start, own)
        start += max((len(array) for batch in own for array in batch.values()), default=0)
        yield {} if cut is None else {str(place): batch[cut] for place, batch in enumerate(own)}
