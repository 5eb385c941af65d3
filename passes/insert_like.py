"""Insert a copy of another network's layer or residual block, with arrays that change nothing (exact).

The copy has the operators and attributes of the other's, so that both graphs match node by node; see `insert_identity`
for the arrays that it gets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.labels import dims, rank
from onnxmerge.ir.rules.registry import integer, required
from onnxmerge.ir.weights import get_array
from onnxmerge.passes.identity_piece import (
    ACTIVATIONS,
    Piece,
    Shape,
    attributes_of,
    dirac,
    find_value,
    repeatable,
    reroute,
)
from onnxmerge.passes.roles import LAYERS, read_axis, title

_KEEPS_RANGE = frozenset(
    (
        *("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"),
        *("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose"),
    )
)
"""Operators whose results lie between the least and the greatest of what they read."""
_KEEPS_ZERO = frozenset(("Relu", "LeakyRelu", "PRelu"))
_GEOMETRY = ("strides", "dilations", "pads")


class InsertLike(oir.passes.InPlacePass):
    """Insert a copy of another network's step: the same operators and attributes, with arrays that change nothing.

    A layer becomes I or K. In a residual block the branch's last layer becomes zero and those before it I or K; their
    widths keep their ratio to the block's. What the copy makes is called NAME/end.

    Args:
        after: name of the value behind which the copy goes.
        nodes: the step in topological order, as it stands in its own normalised network: it reads one computed value,
            and its last node makes what it hands on.
        again: whether to put behind the copy, once more, the activation that lies before `after`.
        name: prefix of the new nodes, values and arrays.
    """

    preserves = "exact"

    def __init__(self, after: str, nodes: Sequence[oir.Node], *, again: bool, name: str):
        self.after = after
        self.nodes = nodes
        self.again = again
        self.name = name

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Insert it.

        Raises:
            UsageError: there is no such value.
            ModelError: the step changes sizes, is no layer or block with an identity skip, does not fit the value, or
                the activation is not idempotent.
        """
        source = find_value(model, self.after)
        activation = _activation_before(source) if self.again else None
        readers = list(source.uses())
        convolution = any(node.op_type == "Conv" for node in self.nodes)
        entry, axis = _entry(self.nodes), 1 if convolution else -1
        count, own = dims(source)[axis], dims(entry)[axis]
        if rank(source) != rank(entry) or count is None or own is None or source.dtype is None:
            raise ModelError(
                f"a step that reads {entry.name!r} of shape {list(dims(entry))} does not fit behind {source.name!r} of "
                f"shape {list(dims(source))}"
            )
        piece = Piece(model.graph, source, self.name, Shape(axis, count, None, 1))
        copy = _Copy(piece, count / own, _branch_end(self.nodes, entry), {entry: (source, count)})
        for node in self.nodes:
            copy.add(node)
        value, _ = copy.made[self.nodes[-1].outputs[0]]
        value.name = f"{self.name}/end"
        if activation is not None:
            value = piece.activated(value, activation)
        piece.place()
        reroute(model, source, value, readers, self.name)
        return oir.passes.PassResult(model, modified=True)


@dataclass
class _Copy:
    """The copy of a step under way."""

    piece: Piece
    ratio: float
    """Channels of the value behind which the copy goes, over those that the step itself reads."""
    last: oir.Node | None
    """The layer that ends a residual branch and becomes zero; None for a step that is one layer."""
    made: dict[oir.Value, tuple[oir.Value, int]]
    """Value of the step -> its copy and that copy's channels."""

    def add(self, node: oir.Node) -> None:
        """Copy one node whose inputs have been copied."""
        inputs = [None if v is None else self.made.get(v) for v in node.inputs]
        (value, count), *others = [given for given in inputs if given is not None]
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            made = self._layer(node, value, count)
        elif node.op_type == "BatchNormalization":
            made = self.piece.batch_norm(value, count, attributes_of(node)), count
        elif node.op_type == "Add" and not others:
            zeros = self.piece.array("bias", np.zeros(count))
            made = self.piece.node("Add", [zeros if given is None else value for given in inputs]), count
        elif node.op_type == "Add" and self.last is not None:
            made = self.piece.node("Add", [given[0] for given in inputs if given is not None]), count
        elif node.op_type in ACTIVATIONS and self.last is not None:
            made = self._activation(node, value, count), count
        else:
            raise ModelError(f"{title(node)} cannot be made to change nothing, so no step like its own can be inserted")
        self.made[node.outputs[0]] = made

    def _layer(self, node: oir.Node, value: oir.Value, count: int) -> tuple[oir.Value, int]:
        weight = node.inputs[1]
        axis = read_axis(node)
        if axis is None or weight is None:
            raise ModelError(f"{title(node)} has no constant matrix or kernel, so no step like its own can be inserted")
        width = count if self.last is None else max(1, round(self.ratio * int(dims(weight)[1 - axis] or 0)))
        groups = integer(node, "group", 1)
        if count % groups or width % groups:
            raise ModelError(f"{title(node)}: {count} -> {width} channels cannot be parted into its {groups} groups")
        if node.op_type == "Conv":
            array = dirac(width, count, groups, tuple(int(size or 0) for size in dims(weight)[2:]), _middle(node))
        else:
            array = np.eye(width, count) if axis == 1 else np.eye(count, width)
        arrays = [self.piece.array("weight", np.zeros_like(array) if node is self.last else array)]
        arrays += [self.piece.array("bias", np.zeros(width)) for _ in node.inputs[2:]]
        return self.piece.node(node.op_type, [value, *arrays], **attributes_of(node)), width

    def _activation(self, node: oir.Node, value: oir.Value, count: int) -> oir.Value:
        """Its slopes or bounds go along; one for each channel becomes their mean, as the channels are others."""
        arrays: list[oir.Value | None] = []
        for given in node.inputs[1:]:
            array = None if given is None else get_array(given)
            if array is not None and array.size > 1:
                array = np.full([count if size > 1 else 1 for size in array.shape], array.mean())
            arrays.append(None if array is None else self.piece.array("bound", array))
        return self.piece.node(node.op_type, [value, *arrays], **attributes_of(node))


def _entry(nodes: Sequence[oir.Node]) -> oir.Value:
    """The one computed value that a step's nodes read and do not make."""
    own = {value for node in nodes for value in node.outputs}
    read = dict.fromkeys(v for node in nodes for v in node.inputs if v is not None and v.const_value is None)
    entries = [value for value in read if value not in own]
    if len(entries) != 1:
        names = ", ".join(repr(value.name) for value in entries)
        raise ModelError(f"the step that ends with {title(nodes[-1])} reads {names}: only one value can be passed on")
    return entries[0]


def _branch_end(nodes: Sequence[oir.Node], entry: oir.Value) -> oir.Node | None:
    """The last layer of a residual block's branch; None when the step does not end in a sum."""
    computed = [value for value in nodes[-1].inputs if value is not None and value.const_value is None]
    if len(computed) == 1:
        return None
    if nodes[-1].op_type != "Add" or entry not in computed:
        raise ModelError(
            f"{title(nodes[-1])} does not add what its block reads: only blocks with an identity skip can be inserted"
        )
    value = computed[1 - computed.index(entry)]
    while (node := value.producer()) is not None and node in nodes:
        if node.op_type in LAYERS:
            return node
        read = [v for v in node.inputs if v is not None and v.const_value is None]
        if len(read) != 1 or node.op_type not in _KEEPS_ZERO | {"Add", "BatchNormalization"}:
            break
        value = read[0]
    raise ModelError(f"{title(nodes[-1])} adds {value.name!r}, which no layer of its branch can make zero")


def _middle(node: oir.Node) -> tuple[int, ...]:
    """Where a convolution's kernel holds the place it stands for.

    Raises:
        ModelError: its output is not as large as its input.
    """
    kernel = [int(size or 0) for size in dims(required(node, 1))[2:]]
    given = {name: list(node.attributes[name].as_ints()) for name in _GEOMETRY if name in node.attributes}
    dilations = given.get("dilations", [1] * len(kernel))
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    mode = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    if mode.startswith("SAME"):
        before = [(total + (mode == "SAME_LOWER")) // 2 for total in reach]
        after = [total - first for total, first in zip(reach, before, strict=True)]
    else:
        pads = given.get("pads", [0] * 2 * len(kernel)) if mode == "NOTSET" else [0] * 2 * len(kernel)
        before, after = pads[: len(kernel)], pads[len(kernel) :]
    strided = any(step != 1 for step in given.get("strides", []))
    fits = all(b + a == r and b % d == 0 for b, a, r, d in zip(before, after, reach, dilations, strict=True))
    if strided or not fits:
        raise ModelError(f"{title(node)} makes fewer or other places than it reads, so nothing like it changes nothing")
    return tuple(b // d for b, d in zip(before, dilations, strict=True))


def _activation_before(source: oir.Value) -> oir.Node:
    """The idempotent activation whose range `source` keeps, be there pooling or reshaping between."""
    value = source
    while (node := value.producer()) is not None and node.op_type in _KEEPS_RANGE:
        if integer(node, "count_include_pad", 0):
            break
        value = required(node, 0)
    activation = repeatable(value)
    if activation is None:
        raise ModelError(f"no activation makes {source.name!r}, so one put behind it would change it")
    return activation
