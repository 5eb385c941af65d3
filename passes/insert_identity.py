"""Insert a layer or a residual block that changes nothing (exact), so that networks of unequal depth can be matched.

Behind a value x = f(z), with f idempotent (f(f(z)) = f(z), such as ReLU) or no activation at all:

    dense      f(I x + 0)
    conv       f(K * x + 0), K the Dirac kernel: 1 in the middle of each channel's own kernel
    residual   f(x + W2 g(W1 x)), W1 = I or K, W2 = 0; g is f, or ReLU where there is none

A batch norm in it has scale 1, shift 0, mean 0 and variance 1 - epsilon, so that it multiplies by exactly 1. W1 is not
zero, as in CLAFusion, but the identity: with two zero layers no gradient would ever reach either.

A layer or block with the operators of another network's: see `insert_like`.

Sources: CLAFusion (Nguyen et al.), section 3.2, and Net2Net (Chen et al. 2016), "deeper".
"""

from typing import Literal

import onnx_ir as oir

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.labels import dims, rank
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.passes.identity_piece import EPSILON, Piece, Shape, find_value, repeatable, reroute

Kind = Literal["dense", "conv", "residual"]


class InsertIdentity(oir.passes.InPlacePass):
    """Insert one layer or block behind a value; whatever read the value reads what comes out.

    Args:
        after: name of the value.
        kind: "dense" works on the last axis, "conv" on axis 1, "residual" on whichever carries the channels.
        kernel: size of a convolution's kernel along every axis of space, odd.
        norm: put a batch norm behind each layer inserted.
        groups: of the convolutions.
        name: prefix of the new nodes, values and arrays; derived from `after` when not given.
    """

    preserves = "exact"

    def __init__(
        self, after: str, kind: Kind, *, kernel: int = 3, norm: bool = False, groups: int = 1, name: str | None = None
    ):
        self.after = after
        self.kind = kind
        self.kernel = kernel
        self.norm = norm
        self.groups = groups
        self.name = name

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Insert it.

        Raises:
            UsageError: there is no such value, or kernel or groups do not fit.
            ModelError: the value's activation is not idempotent, or its shape fits no such layer.
        """
        source = find_value(model, self.after)
        activation = repeatable(source)
        axis = self._channel_axis(model, source)
        size = dims(source)[axis]
        if size is None or source.dtype is None:
            raise ModelError(f"{self.after!r}: the number of its channels is not known")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UsageError(f"a kernel of size {self.kernel} has no middle: the size must be odd")
        if self.groups < 1 or size % self.groups:
            raise UsageError(f"{self.after!r}: {size} channels cannot be parted into {self.groups} groups")
        convolution = self.kind == "conv" or (self.kind == "residual" and axis == 1 and rank(source) > 2)
        if source.is_graph_input() and source.is_graph_output():
            raise ModelError(f"{self.after!r} is an input and an output: nothing can stand between")
        readers = list(source.uses())
        shape = Shape(axis, size, self.kernel if convolution else None, self.groups)
        piece = Piece(model.graph, source, self.name or _free_prefix(model, self.after), shape)
        value = piece.layer(source, zero=False)
        if self.norm:
            value = piece.batch_norm(value, size, {"epsilon": EPSILON})
        if self.kind == "residual":
            value = piece.layer(piece.activated(value, activation or oir.node("Relu", [None])), zero=True)
            if self.norm:
                value = piece.batch_norm(value, size, {"epsilon": EPSILON})
            value = piece.node("Add", [value, source])
        if activation is not None:
            value = piece.activated(value, activation)
        piece.place()
        reroute(model, source, value, readers, piece.prefix)
        return oir.passes.PassResult(model, modified=True)

    def _channel_axis(self, model: oir.Model, source: oir.Value) -> int:
        count = rank(source)
        lowest = {"dense": 2, "conv": 3, "residual": 2}[self.kind]
        if count < lowest:
            raise ModelError(f"{self.after!r} has rank {count}, but kind {self.kind!r} needs at least rank {lowest}")
        carried = [
            s.axes for space in find_spaces(model).spaces for s in space.values if s.name == self.after and s.axes
        ]
        last = self.kind == "dense" or count == 2 or (self.kind == "residual" and (count - 1,) in carried)
        axis = count - 1 if last else 1
        if carried and (axis,) not in carried:
            raise ModelError(f"{self.after!r} has its channels on axes {carried[0]}: kind {self.kind!r} does not fit")
        if self.norm and axis != 1:
            raise ModelError(f"{self.after!r} has its channels on axis {axis}: a batch norm needs them on axis 1")
        return axis


def _free_prefix(model: oir.Model, after: str) -> str:
    taken = {node.name or "" for node in model.graph}
    number = 1
    while any(name.startswith(f"{after}/identity{number}/") for name in taken):
        number += 1
    return f"{after}/identity{number}"
