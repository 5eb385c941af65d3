"""For every channel space of a stem: which mixture, or which choice, of all networks' channels is shared."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import onnx_ir as oir
from scipy.linalg import block_diag

from onnxmerge.ir.spaces import Slots, Space
from onnxmerge.methods.fuse.selecting import reading_root
from onnxmerge.methods.task import Task
from onnxmerge.methods.zip.alignment import Aligned
from onnxmerge.methods.zip.stems.union import Union
from onnxmerge.passes.roles import LAYERS, MOVES, read_axis
from onnxmerge.passes.subspace import (
    Bend,
    Sight,
    Subspace,
    choose_channels,
    choose_private,
    choose_subspace,
    covariance_of,
    decoder,
    importance,
    root_of,
)
from onnxmerge.runtime.activations import lockstep
from onnxmerge.runtime.patches import Positions, grid_of, output_rows

_POSITIONS = 16
"""Looked at in each sample."""
_ENTRIES = 8_000_000
"""Numbers kept of each place."""
_WIDEST = 512
"""Channels of a union up to which mixing pays; wider ones are chosen from."""
_BENDS = {"Tanh": Bend(-1, 1), "Sigmoid": Bend(-2, 2), "HardSigmoid": Bend(-2.5, 2.5), "Softsign": Bend(-1, 1)}
"""What is near enough to choose by; everything else is looked at as a ReLU."""
_POINTWISE = frozenset(
    (
        *("Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Gelu", "HardSwish", "Swish", "Mish", "Softplus", "Clip"),
        *("ThresholdedRelu", *_BENDS),
    )
)
_POOLS = frozenset(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Resize", "Dropout", "ReduceMean"))


class Kind(StrEnum):
    """How a space can be shared."""

    MIX = "mix"
    """Any linear map: only layers and nonlinearities read and make its channels."""
    CHOOSE = "choose"
    """Channels stay themselves: depthwise layers, gates or norms of single channels stand between."""
    MATCH = "match"
    """All channels are looked at together (a norm over them, products of activations): the mean of matched ones."""


@dataclass(frozen=True)
class View:
    """Channels that are computed, in terms of all networks' channels, and what is predicted from them."""

    subspace: Subspace
    back: np.ndarray
    """[n, computed] how each channel is predicted."""


@dataclass(frozen=True)
class SharedSpace:
    """What becomes of one space."""

    shared: View
    tasks: Mapping[str, View]
    """What each task reads: the shared channels and its private ones."""


@dataclass(frozen=True)
class _Place:
    """A value in which a space is read."""

    name: str
    slots: Slots
    bend: Bend | None


@dataclass(frozen=True)
class Choice:
    """All that decides, for the same tasks, samples and seed, what is chosen in a space."""

    space: str
    kind: Kind
    places: tuple[tuple[str, Bend | None], ...]
    width: int
    private: int


def find_subspaces(
    union: Union,
    tasks: Sequence[Task],
    aligned: Mapping[str, Aligned],
    widths: Mapping[str, int],
    private: Mapping[str, int],
    weights: Mapping[str, float],
    known: dict[Choice, SharedSpace],
    *,
    samples: int,
    seed: int,
    threads: int | None,
) -> dict[str, SharedSpace]:
    """By space of the union's reference, what is shared and what each task has besides.

    Args:
        union: the networks up to a cut.
        tasks: the networks with their samples.
        aligned: the other networks' channel alignment, for spaces that can only be matched.
        widths: by space how many channels are shared.
        private: by space how many more each task has; spaces that can only be matched have none.
        weights: how much each task counts.
        known: what was chosen for stems of the same tasks before, and grows.
        samples: unlabelled samples of each task.
        seed: of samples, positions and descent.
        threads: for onnxruntime.
    """
    own = union.stems[union.names[0]]
    kinds = {space.name: kind_of(own, space) for space in union.spaces}
    mapped = [space for space in union.spaces if kinds[space.name] is not Kind.MATCH]
    places = {space.name: _places(own, union, space) for space in mapped}
    choices = {
        space.name: Choice(
            space.name,
            kinds[space.name],
            tuple((place.name, place.bend) for place in places[space.name]),
            widths[space.name],
            private.get(space.name, 0),
        )
        for space in mapped
    }
    new = {name: own for name, own in places.items() if choices[name] not in known}
    rows = _gather(union, tasks, new, samples, seed, threads)
    found = {}
    for space in union.spaces:
        if not places.get(space.name):
            view = _matched(union, space, aligned)
            found[space.name] = SharedSpace(view, dict.fromkeys(union.names, view))
            continue
        choice = choices[space.name]
        if choice in known:
            found[space.name] = known[choice]
            continue
        sights = [
            _sight(union, space, place, group, seen, weights)
            for place in places[space.name]
            for group, seen in rows[place.name, space.name]
        ]
        mixed = kinds[space.name] is Kind.MIX and sights[0].rows.shape[1] <= _WIDEST
        width, more = choice.width, choice.private
        subspace = choose_subspace(sights, width, seed) if mixed else choose_channels(sights, width)
        view, views = View(subspace, decoder(subspace, sights)), {}
        for name in union.names:
            views[name] = view
            if more:
                with_own = choose_private(subspace, sights, union.own(name, space), more)
                views[name] = View(with_own, decoder(with_own, sights))
        found[space.name] = known[choice] = SharedSpace(view, views)
    return found


def kind_of(stem: oir.Model, space: Space) -> Kind:
    """How a space of a stem can be shared."""
    carried = {slots.name for slots in space.values}
    kind = Kind.MIX
    for node in stem.graph:
        read = [v.name for v in node.inputs if v is not None and v.name in carried]
        if not read and not any(output.name in carried for output in node.outputs):
            continue
        op, computed = node.op_type, [v for v in node.inputs if v is not None and v.const_value is None]
        if op in ("MatMul", "Gemm", "Einsum") and len(computed) > 1:
            return Kind.MATCH
        if op in ("LayerNormalization", "GroupNormalization", "RMSNormalization", "Softmax", "LogSoftmax", "LRN"):
            return Kind.MATCH
        grouped = "group" in node.attributes and node.attributes["group"].as_int() > 1
        plain = (op in LAYERS and read_axis(node) is not None and not grouped) or op in _POINTWISE | _POOLS | MOVES
        if not plain and not (op in ("Add", "Sum") and len(computed) > 1):
            kind = Kind.CHOOSE
    return kind


def _places(stem: oir.Model, union: Union, space: Space) -> list[_Place]:
    """The joined values of a space that are read: those that are not a branch on its way into a sum."""
    values = {o.name or "": o for node in stem.graph for o in node.outputs}
    found = []
    for slots in space.values:
        if slots.name not in union.joined or slots.index.shape[1] > 1:
            continue
        readers = [node for node, _ in values[slots.name].uses()]
        if len(readers) == 1 and readers[0].op_type in ("Add", "BatchNormalization"):
            continue
        bends = [_bend(node) for node in readers if node.op_type in _POINTWISE]
        last = values[slots.name] is stem.graph.outputs[0]
        found.append(_Place(slots.name, slots, None if last or not bends else bends[0]))
    return found


def _bend(node: oir.Node) -> Bend:
    if node.op_type == "Clip":
        limits = [v.const_value.numpy().item() if v is not None and v.const_value else None for v in node.inputs[1:]]
        low, high = [*limits, None, None][:2]
        return Bend(-np.inf if low is None else float(low), np.inf if high is None else float(high))
    if node.op_type == "LeakyRelu":
        return Bend(leak=node.attributes["alpha"].as_float() if "alpha" in node.attributes else 0.01)
    return _BENDS.get(node.op_type, Bend())


def _gather(
    union: Union,
    tasks: Sequence[Task],
    places: Mapping[str, Sequence[_Place]],
    samples: int,
    seed: int,
    threads: int | None,
) -> dict[tuple[str, str], list[tuple[tuple[str, ...], np.ndarray]]]:
    """By place and space: for each set of data the tasks that read it, and rows [samples * positions, n]."""
    spaces = {space.name: space for space in union.spaces}
    wanted = [
        (place, spaces[name], union.columns(place.name, spaces[name])[:, 0])
        for name, own in places.items()
        for place in own
    ]
    found: dict[tuple[str, str], list[tuple[tuple[str, ...], np.ndarray]]] = {}
    owners: dict[int, list[Task]] = {}
    for task in tasks:
        owners.setdefault(id(task.data), []).append(task)
    for number, sharing in enumerate(owners.values()):
        split = sharing[0].data.calibration.take(samples, seed)
        names = list(dict.fromkeys(place.name for place, *_ in wanted))
        kept: dict[tuple[str, str], list[np.ndarray]] = {(p.name, s.name): [] for p, s, _ in wanted}
        source = union.model, sharing[0].feeds(split, tasks[0]), names
        # each of its own, so that what is seen in one place does not hang on what else is looked at
        generators = {key: np.random.default_rng([seed, number, zlib.crc32("/".join(key).encode())]) for key in kept}
        for (values,) in lockstep(source, threads=threads) if names else ():
            for place, space, columns in wanted:
                array, axis = values[place.name], union.joined[place.name].axis
                most = max(1, _ENTRIES // (len(columns) * len(split) * len(owners)))
                positions = Positions.sample(
                    generators[place.name, space.name], grid_of(array, axis), min(_POSITIONS, most)
                )
                kept[place.name, space.name].append(output_rows(array, axis, positions)[:, columns])
        for key, parts in kept.items():
            whole = np.concatenate(parts).astype(np.float32)
            stride = max(1, whole.size // _ENTRIES)
            found.setdefault(key, []).append((tuple(task.name for task in sharing), whole[::stride]))
    return found


def _sight(
    union: Union, space: Space, place: _Place, group: Sequence[str], rows: np.ndarray, weights: Mapping[str, float]
) -> Sight:
    """The importances are those of the tasks that these samples are of."""
    sight = Sight(rows, np.zeros((0, 0)), place.bend)
    read, roots = sight.read(), []
    for network in union.names:
        own = read[:, union.own(network, space)]
        root = np.zeros((own.shape[1], 0))
        if network in group:
            said, skipped = _readers(union, network, space, union.joined[place.name].parts[network])
            root = np.sqrt(weights[network]) * root_of(importance(covariance_of(own), said, skipped))
        roots.append(root)
    return Sight(rows, block_diag(*roots).astype(np.float32), place.bend)


def _readers(union: Union, network: str, space: Space, value: str) -> tuple[np.ndarray, bool]:
    """[channels, r] the weights that read a value, and whether it is also added to what comes later."""
    model, theirs = union.networks[network], union.theirs[network][space.name]
    first = theirs.value(value)
    assert first is not None
    whole = next((s for s in union.whole[network] if _lies_at(s, first)), theirs)
    carried = {slots.name: slots for slots in whole.values}
    values = {o.name or "": o for node in model.graph for o in node.outputs}
    columns, skipped, waiting, seen = [np.zeros((theirs.size, 0))], False, [value], {value}
    while waiting:
        name = waiting.pop()
        slots = carried.get(name)
        if slots is None:
            skipped = True
            continue
        columns.append(reading_root(model, name, slots))
        for node, _ in values[name].uses():
            if node.op_type in ("Add", "Sum", "Mul", "Concat"):
                skipped = True
            elif node.op_type not in LAYERS:
                new = [o.name or "" for o in node.outputs if o.name in carried and o.name not in seen]
                waiting += new
                seen |= set(new)
    return np.concatenate(columns, axis=1), skipped


def _lies_at(space: Space, slots: Slots) -> bool:
    own = space.value(slots.name)
    return own is not None and np.array_equal(own.index, slots.index)


def _matched(union: Union, space: Space, aligned: Mapping[str, Aligned]) -> View:
    """The mean of matched channels; the reference's order."""
    count = len(union.names)
    orders = [np.arange(space.size), *(aligned[name].alignment[space.name] for name in union.names[1:])]
    mix = np.concatenate([np.eye(space.size)[order] for order in orders], axis=1)
    return View(Subspace((mix / count).astype(np.float32), np.zeros(space.size, np.float32)), mix.T)
