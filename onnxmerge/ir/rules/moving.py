"""Operators that only move elements: the same move on the label array tells where each channel went."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.labels import Trace, carries, dims, rank
from onnxmerge.ir.rules.registry import axes_of, required, rule


@rule("Transpose")
def transpose(node: oir.Node, trace: Trace) -> None:
    """Transpose the label. Where several axes carry channels, the slots of one channel may change places."""
    label = trace.label(required(node, 0))
    perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else tuple(range(label.ndim))[::-1]
    trace.set_label(node.outputs[0], trace.transposed(label, perm))


@rule("Squeeze")
def squeeze(node: oir.Node, trace: Trace) -> None:
    """Remove axes of size 1."""
    data = required(node, 0)
    label = trace.label(data)
    axes = axes_of(node, 1, rank(data)) or [a for a, size in enumerate(dims(data)) if size == 1]
    if any(label.shape[axis] != 1 for axis in axes):
        trace.freeze(node, "it removes an axis that carries channels", label)
    else:
        trace.set_label(node.outputs[0], label.squeeze(tuple(axes)))


@rule("Unsqueeze")
def unsqueeze(node: oir.Node, trace: Trace) -> None:
    """Insert axes of size 1."""
    label = trace.label(required(node, 0))
    axes = axes_of(node, 1, rank(node.outputs[0]))
    if axes is None:
        trace.freeze(node, "its axes are computed", label)
    else:
        trace.set_label(node.outputs[0], np.expand_dims(label, tuple(axes)))


@rule("Reshape", "Flatten")
def reshape(node: oir.Node, trace: Trace) -> None:
    """Split both shapes into the finest runs of axes with equal products and reshape the label run by run.

    A run without channels stays without; in a run with channels each index of the result gets the atom that stood
    there: a flatten gives a channel its block of columns.
    """
    data, output = required(node, 0), node.outputs[0]
    label = trace.label(data)
    if not carries(label):
        return
    before, after = ([int(size or 0) for size in dims(value)] for value in (data, output))
    runs = _runs(before, after)
    if runs is None:
        trace.freeze(node, f"cannot tell where channels go from {_text(data)} to {_text(output)}", label)
    else:
        trace.set_label(output, _reshape(label, before, after, runs))


Runs = list[tuple[range, range]]


def _runs(before: Sequence[int], after: Sequence[int]) -> Runs | None:
    """Pairs of axis ranges that hold the same elements, as short as can be; None when the sizes do not agree."""
    runs: Runs = []
    i = j = 0
    while i < len(before) and j < len(after):
        start = (i, j)
        left, right = before[i], after[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right and i < len(before):
                left, i = left * before[i], i + 1
            elif right < left and j < len(after):
                right, j = right * after[j], j + 1
            else:
                return None
        runs.append((range(start[0], i), range(start[1], j)))
    if any(size != 1 for size in [*before[i:], *after[j:]]):
        return None
    runs.append((range(i, len(before)), range(j, len(after))))
    return runs


def _reshape(label: np.ndarray, before: Sequence[int], after: Sequence[int], runs: Runs) -> np.ndarray:
    whole: list[int] = []
    target: list[int] = []
    for source, result in runs:
        channels = any(label.shape[axis] > 1 for axis in source)
        whole += [before[axis] if channels else 1 for axis in source]
        target += [after[axis] if channels else 1 for axis in result]
    return np.broadcast_to(label, whole).reshape(target)


def _text(value: oir.Value) -> str:
    return "x".join("?" if size is None else str(size) for size in dims(value)) or "a shape that is unknown"
