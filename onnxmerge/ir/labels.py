"""Run a graph on labels instead of numbers: the trace that the label rules write to.

Each value carries an integer array that broadcasts against its shape: size 1 on axes that carry no channels (batch,
space), an *atom* id for each index on axes that do. Two atoms that a rule unites are the same channel. A *use* says
which atoms the slots along some axes of a constant belong to; a frozen atom must keep its place.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as oir
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

NO_CHANNEL = -1
"""The label of an axis, or of an index, that carries no channel."""


@dataclass(frozen=True)
class Rows:
    """A restriction of a use to `start:stop` on `axis` of the constant (one group of a grouped convolution)."""

    axis: int
    start: int
    stop: int


@dataclass(frozen=True)
class Use:
    """The slots along `axes` (flattened together, C order) of the constant `name` belong to `atoms`."""

    name: str
    axes: tuple[int, ...]
    atoms: np.ndarray
    rows: Rows | None = None


@dataclass(frozen=True)
class Frozen:
    """A node that fixes the order of channels, and why."""

    node: str
    op: str
    reason: str


@dataclass
class Trace:
    """Labels of all values seen so far, and what the rules said of them."""

    constants: Container[str]
    """Names of the arrays that can be rewritten; others are made from sizes, such as a table of positions."""
    uses: list[Use] = field(default_factory=list)
    frozen: list[Frozen] = field(default_factory=list)
    tags: list[np.ndarray] = field(default_factory=list)
    """Sets of atoms that must not mix with others (the channels of one group)."""
    moves: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    """For each transposed label its atoms in their new order, and the place that each had before."""
    binds: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    """Parents [P] and children [P, D]: channel p of the parents moves together with row p as one block."""
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    atoms: int = 0
    _united: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _fixed: list[np.ndarray] = field(default_factory=list)

    def label(self, value: oir.Value) -> np.ndarray:
        """The label array of `value`, of its rank; all of size 1 when it carries no channels."""
        known = self.labels.get(value.name or "")
        return no_channels(rank(value)) if known is None else known

    def set_label(self, value: oir.Value, label: np.ndarray) -> None:
        """Give `value` its label; axes along which it does not vary shrink to size 1."""
        for axis, size in enumerate(label.shape):
            if size > 1 and (label == label.take([0], axis)).all():
                label = label.take([0], axis)
        if (label != NO_CHANNEL).any():
            self.labels[value.name or ""] = label

    def fresh(self, count: int) -> np.ndarray:
        """`count` new atoms."""
        self.atoms += count
        return np.arange(self.atoms - count, self.atoms, dtype=np.int64)

    def unite(self, left: np.ndarray, right: np.ndarray) -> None:
        """Say that the atoms of `left` and `right` are the same channels, index by index after broadcasting."""
        left, right = np.broadcast_arrays(left, right)
        self._united.append((left.ravel(), right.ravel()))

    def use(self, constant: oir.Value, axes: Sequence[int], atoms: np.ndarray, rows: Rows | None = None) -> None:
        """Record that the slots along `axes` of `constant` belong to `atoms`.

        An array that cannot be rewritten fixes them, unless it is the same for all.
        """
        if self.is_weight(constant):
            self.uses.append(Use(constant.name or "", tuple(axes), atoms.ravel(), rows))
        elif constant.const_value is None or (np.ptp(constant.const_value.numpy(), axis=tuple(axes)) != 0).any():
            self.fix(atoms)

    def is_weight(self, value: oir.Value) -> bool:
        """Whether `value` is an array that can be rewritten."""
        return (value.name or "") in self.constants

    def tag(self, atoms: np.ndarray) -> None:
        """Keep `atoms` among themselves."""
        self.tags.append(atoms.ravel())

    def bind(self, parents: np.ndarray, children: np.ndarray) -> None:
        """Say that channel p of `parents` [P] moves together with row p of `children` [P, D], as a head of attention
        moves with its channels; the children of a row keep among themselves.
        """
        self.binds.append((parents.ravel(), children.reshape(parents.size, -1)))

    def transposed(self, label: np.ndarray, perm: Sequence[int]) -> np.ndarray:
        """`label` with its axes in another order. Where several carry channels, the slots of one channel may change
        places, which two channels of one space must do alike.
        """
        moved = label.transpose(perm)
        if len(channel_axes(label)) > 1:
            self.moves.append((moved.ravel(), np.arange(label.size).reshape(label.shape).transpose(perm).ravel()))
        return moved

    def together(self, label: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        """The label of a statistic over `axes` (a mean, a softmax's sum), of size 1 along them.

        Without channels on other axes it carries none: it is symmetric in what it sums over. Else each index of the
        other axes is a parent of the channels it sums over.
        """
        if all(label.shape[axis] == 1 for axis in axes):
            return label
        kept = tuple(size if axis not in axes else 1 for axis, size in enumerate(label.shape))
        if max(kept, default=1) == 1:
            return no_channels(label.ndim)
        parents = self.fresh(int(np.prod(kept)))
        order = [axis for axis in range(label.ndim) if axis not in axes] + sorted(axes)
        self.bind(parents, label.transpose(order).reshape(parents.size, -1))
        return parents.reshape(kept)

    def combine(self, node: oir.Node, operands: Sequence[tuple[np.ndarray, Sequence[int]]]) -> np.ndarray:
        """The label of an operator that acts on each index alone, from the labels and sizes of its operands.

        Operands have one rank. Where one varies along fewer axes, each of its channels moves together with the channels
        it meets. One that varies along a channel axis without carrying channels there fixes their order.
        """
        whole = max((label for label, _ in operands), key=np.size)
        varying = channel_axes(whole)
        for label, _ in operands:  # the first channel on each position stands for all
            if channel_axes(label) == varying:
                whole = np.where(whole == NO_CHANNEL, label, whole)
        for label, sizes in operands:
            own = channel_axes(label)
            unlabelled = [axis for axis in varying if axis not in own and sizes[axis] > 1]
            if unlabelled:
                self.freeze(node, "a channel axis meets a tensor that carries no channels there", label)
                self.keep_order(node, whole, unlabelled)
            elif own == varying:
                self.unite(label, whole)
            elif not set(own) <= set(varying):
                self.freeze(node, "its operands carry channels along different axes", label)
                if shared := [axis for axis in own if axis in varying]:
                    self.keep_order(node, whole, shared)
            elif own:  # a single channel spread over many is none of them
                self.bind(label, _rows(whole, own))
        return whole

    def keep_order(self, node: oir.Node, label: np.ndarray, axes: Sequence[int]) -> None:
        """Fix the order of `label` along `axes`; along its other axes channels stay free within each index of these."""
        if set(channel_axes(label)) <= set(axes):
            self.freeze(node, "a channel axis meets a tensor that carries no channels there", label)
            return
        parents = self.fresh(int(np.prod([label.shape[axis] for axis in axes])))
        self.freeze(node, "blocks of channels meet a tensor that carries no channels there", parents)
        self.bind(parents, _rows(label, axes))

    def united(self, label: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        """`label` of size 1 along `axes`, what varied along them being one channel from now on."""
        for axis in axes:
            self.unite(label, label.take([0], axis))
            label = label.take([0], axis)
        return label

    def use_partly(self, constant: oir.Value, axes: Sequence[int], whole: np.ndarray, own: Sequence[int]) -> None:
        """Record that axes `axes` of `constant` vary with the axes `own` of the label `whole`, and with no other."""
        if tuple(own) == channel_axes(whole):
            self.use(constant, axes, whole)
            return
        parents = self.fresh(int(np.prod([whole.shape[axis] for axis in own])))
        self.use(constant, axes, parents)
        self.bind(parents, _rows(whole, own))

    def along(self, node: oir.Node, label: np.ndarray, axis: int) -> np.ndarray:
        """`label` of size 1 on all axes but `axis`, for operators that mix what lies along the others.

        What varies along others at one index of `axis` becomes one channel. Frozen, and none left, where `label` does
        not vary along `axis` at all.
        """
        others = [other for other in channel_axes(label) if other != axis]
        if others and label.shape[axis] == 1:
            self.freeze(node, "channels lie on an axis that it mixes", label)
            return no_channels(label.ndim)
        return self.united(label, others)

    def fix(self, atoms: np.ndarray) -> None:
        """Fix the place of `atoms` without blaming a node (graph outputs)."""
        self._fixed.append(atoms[atoms != NO_CHANNEL].ravel())

    def freeze(self, node: oir.Node, reason: str, *labels: np.ndarray) -> None:
        """Fix the place of every atom in `labels` because of `node`; does nothing where they carry none."""
        if any(carries(label) for label in labels):
            self.blame(node, reason)
            for label in labels:
                self.fix(label)

    def blame(self, node: oir.Node, reason: str) -> None:
        """Record that something keeps its order because of `node`."""
        self.frozen.append(Frozen(node.name or node.outputs[0].name or "", node.op_type, reason))

    def classes(self) -> tuple[np.ndarray, np.ndarray]:
        """For each atom the id of its class, and for each class whether it is fixed."""
        pairs = self._united or [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        left = np.concatenate([pair[0] for pair in pairs])
        right = np.concatenate([pair[1] for pair in pairs])
        real = (left != NO_CHANNEL) & (right != NO_CHANNEL)
        graph = coo_matrix((np.ones(real.sum(), np.int8), (left[real], right[real])), shape=(self.atoms, self.atoms))
        count, classes = connected_components(graph, directed=False)
        fixed = np.zeros(count, bool)
        for atoms in self._fixed:
            fixed[classes[atoms]] = True
        return classes, fixed


def _rows(whole: np.ndarray, own: Sequence[int]) -> np.ndarray:
    """[index of the axes `own`, index of the others]"""
    order = [*own, *(axis for axis in range(whole.ndim) if axis not in own)]
    return whole.transpose(order).reshape(int(np.prod([whole.shape[axis] for axis in own])), -1)


def no_channels(dimensions: int) -> np.ndarray:
    """The label of a value of that rank that carries no channels."""
    return np.full((1,) * dimensions, NO_CHANNEL, dtype=np.int64)


def aligned(label: np.ndarray, dimensions: int) -> np.ndarray:
    """`label` with axes of size 1 put before it, as numpy broadcasting does."""
    return label.reshape((1,) * (dimensions - label.ndim) + label.shape)


def rank(value: oir.Value) -> int:
    """Rank of `value`; 0 when its shape is unknown."""
    return 0 if value.shape is None else len(value.shape)


def dims(value: oir.Value) -> tuple[int | None, ...]:
    """Sizes of `value`, None where symbolic."""
    return () if value.shape is None else tuple(d if isinstance(d, int) else None for d in value.shape)


def carries(label: np.ndarray) -> bool:
    """Whether any index of `label` is a channel."""
    return bool((label != NO_CHANNEL).any())


def channel_axes(label: np.ndarray) -> tuple[int, ...]:
    """The axes of `label` along which channels vary."""
    return tuple(axis for axis, size in enumerate(label.shape) if size > 1)
