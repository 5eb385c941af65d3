"""Channel spaces: maximal sets of tensor axes whose indices stand for the same channels.

After the label run an atom's *signature* is what its class touches: how often, in which constants and which values. A
space is all classes with one signature, so a Split, a skip that reads half the channels, or two halves that pass
through different operators separate by themselves, and a flatten gives each channel its block of slots in order.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.labels import NO_CHANNEL, Frozen, Rows, Trace, carries
from onnxmerge.ir.rules import RULES


@dataclass(frozen=True)
class Slots:
    """Where a space lies in one array: along `axes` (flattened together), channel c owns the indices `index[c]`."""

    name: str
    axes: tuple[int, ...]
    index: np.ndarray
    """[channels, slots per channel]"""
    rows: Rows | None = None


@dataclass(frozen=True)
class Space:
    """One channel space: `size` channels, the constants to rewrite, and the values that carry it."""

    name: str
    size: int
    weights: tuple[Slots, ...]
    values: tuple[Slots, ...]

    def value(self, name: str) -> Slots | None:
        """Where the space lies in the value `name`, if it does."""
        return next((slots for slots in self.values if slots.name == name), None)


@dataclass(frozen=True)
class Spaces:
    """All spaces of a graph in order of appearance, and the nodes that stop the analysis."""

    spaces: tuple[Space, ...]
    frozen: tuple[Frozen, ...]

    def permutable(self) -> list[Space]:
        """The spaces with more than one channel."""
        return [space for space in self.spaces if space.size > 1]


def find_spaces(model: oir.Model, open_outputs: frozenset[str] = frozenset()) -> Spaces:
    """Find the channel spaces of a normalised model in time linear in its labels.

    Args:
        model: the normal form (see `normalise`).
        open_outputs: graph outputs whose channel order is free, because whatever reads them will be told.
    """
    trace = Trace()
    for node in model.graph:
        _apply_rule(node, trace)
    for output in model.graph.outputs:
        if output.name not in open_outputs:
            trace.fix(trace.label(output))
    return Spaces(tuple(_collect(trace)), tuple(trace.frozen))


def _apply_rule(node: oir.Node, trace: Trace) -> None:
    captured = [v for v in _captured(node) if carries(trace.label(v))]
    rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    reached = [trace.label(v) for v in node.inputs if v is not None] + [trace.label(v) for v in captured]
    if rule is not None and not captured and all(v.shape is not None for v in _read(node)):
        rule(node, trace)
    elif node.op_type != "Shape":
        why = "it has no label rule" if rule is None else "the shape of an input is unknown"
        trace.freeze(node, f"{why}; the channels that reach it keep their order", *reached)


def _read(node: oir.Node) -> list[oir.Value]:
    return [value for value in node.inputs if value is not None]


def _captured(node: oir.Node) -> list[oir.Value]:
    """Outer values that the node's sub-graphs read."""
    found = []
    for attribute in node.attributes.values():
        if attribute.type == oir.AttributeType.GRAPH:
            graphs = [attribute.as_graph()]
        elif attribute.type == oir.AttributeType.GRAPHS:
            graphs = list(attribute.as_graphs())
        else:
            continue
        for graph in graphs:
            inner = {id(v) for v in graph.inputs} | {id(o) for n in graph.all_nodes() for o in n.outputs}
            found += [v for n in graph.all_nodes() for v in n.inputs if v is not None and id(v) not in inner]
            found += [v for v in graph.outputs if id(v) not in inner]
    return found


_Touch = tuple[str, tuple[int, ...], Rows | None, np.ndarray]
"""Name, axes, rows and atoms of an array or value."""


def _collect(trace: Trace) -> list[Space]:
    classes, fixed = trace.classes()
    touched: list[_Touch] = [(use.name, use.axes, use.rows, use.atoms) for use in trace.uses]
    values: list[_Touch] = [(name, _axes(label), None, label.ravel()) for name, label in trace.labels.items()]
    signature = _refine(classes, len(fixed), [t[3] for t in touched + values] + trace.tags, trace.moves)
    members: dict[int, list[int]] = {}
    for cls in dict.fromkeys(classes.tolist()):  # in order of the first atom
        if not fixed[cls]:
            members.setdefault(int(signature[cls]), []).append(cls)
    space_of = np.full(len(fixed), -1)
    place = np.zeros(len(fixed), np.int64)
    for number, own in enumerate(members.values()):
        space_of[own] = number
        place[own] = np.arange(len(own))
    sizes = [len(own) for own in members.values()]
    weights = _slots(touched, classes, space_of, place, sizes)
    carried = _slots(values, classes, space_of, place, sizes)
    found = []
    seen: Counter[str] = Counter()
    for size, own_weights, own_values in zip(sizes, weights, carried, strict=True):
        if not own_weights:
            continue
        name = own_weights[0].name
        seen[name] += 1
        unique = name if seen[name] == 1 else f"{name}#{seen[name]}"  # e.g. the groups of a grouped convolution
        found.append(Space(unique, size, tuple(own_weights), tuple(own_values)))
    return found


def _axes(label: np.ndarray) -> tuple[int, ...]:
    return tuple(axis for axis, size in enumerate(label.shape) if size > 1)


def _refine(
    classes: np.ndarray, count: int, groups: Iterable[np.ndarray], moves: Iterable[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Split the classes until all with one number are touched equally often by every group of atoms, and had their
    slots reordered in the same way by every transposition.
    """
    keys = [np.unique(classes[atoms[atoms != NO_CHANNEL]], return_counts=True) for atoms in groups]
    keys += [_reorderings(classes, atoms, places) for atoms, places in moves]
    number = np.zeros(count, np.int64)
    next_number = 1
    for own, key in keys:
        if len(own) == 0:
            continue
        _, split = np.unique(np.stack([number[own], key]), axis=1, return_inverse=True)
        number[own] = next_number + split.ravel()
        next_number += int(split.max()) + 1
    return number


def _reorderings(classes: np.ndarray, atoms: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The classes that a transposition touches, and for each a number that tells how it reordered the class's slots."""
    real = atoms != NO_CHANNEL
    before: dict[int, list[int]] = {}
    for cls, place in zip(classes[atoms[real]].tolist(), places[real].tolist(), strict=True):
        before.setdefault(cls, []).append(place)
    patterns: dict[tuple[int, ...], int] = {}
    order = [patterns.setdefault(tuple(np.argsort(own).tolist()), len(patterns)) for own in before.values()]
    return np.array(list(before), np.int64), np.array(order, np.int64)


def _slots(
    touched: list[_Touch],
    classes: np.ndarray,
    space_of: np.ndarray,
    place: np.ndarray,
    sizes: list[int],
) -> list[list[Slots]]:
    found: list[list[Slots]] = [[] for _ in sizes]
    for name, axes, rows, atoms in touched:
        real = np.flatnonzero(atoms != NO_CHANNEL)
        own = classes[atoms[real]]
        for number in np.unique(space_of[own]):
            if number < 0:
                continue
            inside = space_of[own] == number
            order = np.argsort(place[own[inside]], kind="stable")
            index = real[inside][order].reshape(sizes[number], -1)
            found[number].append(Slots(name, axes, index, rows))
    return found
