"""Products that sum over shared indices: the one rule behind MatMul, Gemm, Einsum and attention.

Every axis of the operands goes by an index, as in Einsum. An index that both operands have and the result has not is
summed over: there the channels of both are the same. A weight makes fresh channels on the indices that it alone has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.labels import Trace, carries, dims

Index = str


@dataclass(frozen=True)
class Factor:
    """An operand: its label, the index of each axis, and the size of each index."""

    label: np.ndarray
    indices: Sequence[Index]
    sizes: Sequence[int]

    @classmethod
    def of(cls, value: oir.Value, label: np.ndarray, indices: Sequence[Index]) -> Self:
        """The factor `value`."""
        return cls(label, indices, [int(size or 0) for size in dims(value)])

    def size(self, index: Index) -> int:
        """Size of an index; 1 for one that it has not."""
        return self.sizes[list(self.indices).index(index)] if index in self.indices else 1

    def axes(self, indices: Sequence[Index]) -> list[int]:
        """The axes that go by `indices`."""
        return [list(self.indices).index(index) for index in indices]

    def arranged(self, order: Sequence[Index], trace: Trace) -> np.ndarray:
        """The label with its axes in that order, of size 1 on new indices; those left out must be of size 1."""
        own = [index for index in order if index in self.indices]
        rest = [index for index in self.indices if index not in order]
        moved = trace.transposed(self.label, self.axes([*own, *rest]))
        return moved.reshape([moved.shape[own.index(index)] if index in own else 1 for index in order])


def contract_weight(
    node: oir.Node, trace: Trace, data: Factor, weight: oir.Value, indices: Sequence[Index], result: Sequence[Index]
) -> np.ndarray:
    """The label of data times a weight whose axes go by `indices`.

    The weight's axes that it shares with the data read channels, the others make them. Channels that the weight does
    not touch pass, and then what it makes keeps its order: one atom cannot stand for a pair of channels.
    """
    own = Factor.of(weight, data.label, indices)
    shared = [index for index in indices if index in data.indices]
    each = [index for index in shared if index in result]  # one matrix for each
    passing = data.axes([index for index in data.indices if index not in indices])
    passes = any(data.label.shape[axis] > 1 for axis in passing)
    reads = any(data.label.shape[axis] > 1 for axis in data.axes(shared)) or (carries(data.label) and not passes)
    if passes and not reads:
        trace.blame(node, "its weight works along an axis without channels, so what it makes keeps its order")
        return data.arranged(result, trace)
    met = Factor(trace.united(data.label, passing), data.indices, data.sizes)  # all of them meet the same weight
    if reads:
        read = np.broadcast_to(met.arranged(shared, trace), [own.size(index) for index in shared])
        trace.use(weight, own.axes(shared), read)
    kept = [*each, *(index for index in indices if index not in data.indices)]
    shape = [own.size(index) for index in kept]
    fresh = trace.fresh(int(np.prod(shape))).reshape(shape)
    trace.use(weight, own.axes(kept), fresh)
    for row in fresh.reshape(int(np.prod(shape[: len(each)])), -1) if each else ():
        trace.tag(row)
    if each and reads:
        order = [*each, *(index for index in shared if index not in each)]
        read = np.broadcast_to(met.arranged(order, trace), [own.size(index) for index in order])
        for row in read.reshape(int(np.prod(shape[: len(each)])), -1):
            trace.tag(row)
    return Factor(fresh, kept, shape).arranged(result, trace)


def contract(node: oir.Node, trace: Trace, left: Factor, right: Factor, result: Sequence[Index]) -> np.ndarray | None:
    """The label of a product of two computed values, or None (and frozen) where only one carries what is summed.

    For queries [heads, tokens, width] times keys [heads, width, tokens] the channels of each head's width are the same
    in both, and the product has one parent for each head.
    """
    if not carries(left.label) and not carries(right.label):
        return np.full((1,) * len(result), -1)
    everything = list(dict.fromkeys([*left.indices, *right.indices]))
    summed = [axis for axis, index in enumerate(everything) if index not in result]
    both = [factor.arranged(everything, trace) for factor in (left, right)]
    if any(both[0].shape[axis] != both[1].shape[axis] for axis in summed):
        trace.freeze(node, "it sums channels times a tensor that carries no channels there", left.label, right.label)
        return None
    if any(both[0].shape[axis] > 1 for axis in summed):
        trace.unite(*both)
    sizes = [[factor.size(index) if index in result else 1 for index in everything] for factor in (left, right)]
    whole = trace.combine(node, [(trace.together(label, summed), own) for label, own in zip(both, sizes, strict=True)])
    return Factor(whole, everything, sizes[0]).arranged(result, trace)
