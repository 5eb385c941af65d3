"""Products that sum over shared indices: the one rule behind MatMul, Gemm, Einsum and attention.

Every axis of the operands goes by an index, as in Einsum. An index that both operands have and the result has not is
summed over: there the channels of both are the same. A weight makes fresh channels on the indices that it alone has.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.labels import Trace, carries, dims

Index = str


@dataclass(frozen=True)
class Factor:
    """An operand: its label, the index of each axis, and the value (None for what exists only inside an operator)."""

    label: np.ndarray
    indices: Sequence[Index]
    value: oir.Value | None = None

    def axes(self, indices: Sequence[Index]) -> list[int]:
        """The axes that go by `indices`."""
        return [list(self.indices).index(index) for index in indices]

    def arranged(self, order: Sequence[Index], trace: Trace) -> np.ndarray:
        """The label with its axes in that order, of size 1 on new indices; those left out must be of size 1."""
        own = [index for index in order if index in self.indices]
        rest = [index for index in self.indices if index not in order]
        moved = trace.transposed(self.label, self.axes([*own, *rest]))
        return moved.reshape([moved.shape[own.index(index)] if index in own else 1 for index in order])


def contract_weight(node: oir.Node, trace: Trace, data: Factor, weight: Factor, result: Sequence[Index]) -> np.ndarray:
    """The label of data times a weight.

    The weight's axes that it shares with the data read channels, the others make them. Channels that the weight does
    not touch pass, and then what it makes keeps its order: one atom cannot stand for a pair of channels.
    """
    assert weight.value is not None
    shared = [index for index in weight.indices if index in data.indices]
    each = [index for index in shared if index in result]  # one matrix for each
    passing = [index for index in data.indices if index not in weight.indices]
    made = [index for index in weight.indices if index not in data.indices]
    label = data.label
    passes = any(label.shape[axis] > 1 for axis in data.axes(passing))
    reads = any(label.shape[axis] > 1 for axis in data.axes(shared)) or (carries(label) and not passes)
    if passes and not reads:
        return data.arranged(result, trace)
    for axis in data.axes(passing):  # all of them meet the same weight
        trace.unite(label, label.take([0], axis))
        label = label.take([0], axis)
    met = Factor(label, data.indices)
    if reads:
        sizes = [size if i in shared else 1 for i, size in zip(weight.indices, _sizes(weight.value), strict=True)]
        read = np.broadcast_to(met.arranged(weight.indices, trace), sizes)
        trace.use(weight.value, weight.axes(shared), read)
    count = dict(zip(weight.indices, _sizes(weight.value), strict=True))
    kept = [*each, *made]
    shape = [count[index] for index in kept]
    fresh = trace.fresh(int(np.prod(shape))).reshape(shape)
    trace.use(weight.value, weight.axes(kept), fresh)
    if each:
        rows = int(np.prod(shape[: len(each)]))
        parents = trace.fresh(rows)
        trace.bind(parents, fresh.reshape(rows, -1))
        if reads:
            order = [*each, *(index for index in shared if index not in each)]
            read = np.broadcast_to(met.arranged(order, trace), [count[i] for i in order])
            trace.bind(parents, read.reshape(rows, -1))
    return Factor(fresh, kept).arranged(result, trace)


def contract(node: oir.Node, trace: Trace, left: Factor, right: Factor, result: Sequence[Index]) -> np.ndarray | None:
    """The label of a product of two computed values, or None (and frozen) where only one carries what is summed.

    For queries [heads, tokens, width] times keys [heads, width, tokens] the channels of each head's width are the same
    in both, and the product has one parent for each head.
    """
    if not carries(left.label) and not carries(right.label):
        return np.full((1,) * len(result), -1)
    everything = list(dict.fromkeys([*left.indices, *right.indices]))
    summed = [index for index in everything if index not in result]
    both = [factor.arranged(everything, trace) for factor in (left, right)]
    axes = [everything.index(index) for index in summed]
    if any(both[0].shape[axis] != both[1].shape[axis] for axis in axes):
        trace.freeze(node, "it sums channels times a tensor that carries no channels there", left.label, right.label)
        return None
    if any(both[0].shape[axis] > 1 for axis in axes):
        trace.unite(*both)
    whole = trace.combine(node, [trace.together(label, axes) for label in both])
    return Factor(whole, everything).arranged(result, trace)


def _sizes(value: oir.Value) -> list[int]:
    return [int(size or 0) for size in dims(value)]
