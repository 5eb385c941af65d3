"""Operators that only move elements: the same move on the label array tells where each channel went."""

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.labels import Trace, carries, channel_axes, dims, rank
from onnxmerge.ir.rules.registry import axes_of, required, rule


@rule("Transpose")
def transpose(node: oir.Node, trace: Trace) -> None:
    """Transpose the label. Where several axes carry channels, the slots of one channel may change places."""
    label = trace.label(required(node, 0))
    perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else tuple(range(label.ndim))[::-1]
    trace.set_label(node.outputs[0], label.transpose(perm))
    if len(channel_axes(label)) > 1:
        places = np.arange(label.size).reshape(label.shape)
        trace.moves.append((label.transpose(perm).ravel(), places.transpose(perm).ravel()))


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

    A run without channels stays without; in a run with channels every size must be known, and each index of the result
    gets the atom that stood there: a flatten gives a channel its block of columns.
    """
    data, output = required(node, 0), node.outputs[0]
    label = trace.label(data)
    if not carries(label):
        return
    runs = _runs(dims(data), dims(output))
    moved = None if runs is None else _reshape(label, dims(data), dims(output), runs)
    if moved is None:
        trace.freeze(node, f"cannot tell where channels go from {_text(data)} to {_text(output)}", label)
    else:
        trace.set_label(output, moved)


Runs = list[tuple[range, range]]


def _runs(before: tuple[int | None, ...], after: tuple[int | None, ...]) -> Runs | None:
    """Pairs of axis ranges that hold the same elements; None when the sizes do not tell.

    An unknown leading size pairs with an unknown leading size: the batch, which reshapes of exported graphs keep.
    """
    runs: Runs = []
    i = j = 0
    while i < len(before) and j < len(after):
        if before[i] is None or after[j] is None:
            if before[i] is not after[j] or i != j:
                return None
            runs.append((range(i, i + 1), range(j, j + 1)))
            i, j = i + 1, j + 1
            continue
        start = (i, j)
        left, right = int(before[i] or 0), int(after[j] or 0)
        i, j = i + 1, j + 1
        while left != right:
            if left < right and i < len(before) and before[i] is not None:
                left, i = left * int(before[i] or 0), i + 1
            elif right < left and j < len(after) and after[j] is not None:
                right, j = right * int(after[j] or 0), j + 1
            else:
                return None
        runs.append((range(start[0], i), range(start[1], j)))
    if any(size != 1 for size in before[i:] + after[j:]):
        return None
    runs.append((range(i, len(before)), range(j, len(after))))
    return runs


def _reshape(
    label: np.ndarray, before: tuple[int | None, ...], after: tuple[int | None, ...], runs: Runs
) -> np.ndarray | None:
    whole: list[int] = []
    target: list[int] = []
    for source, result in runs:
        if any(label.shape[axis] > 1 for axis in source):
            sizes = [before[axis] for axis in source]
            if any(size is None for size in sizes):
                return None
            whole += [int(size or 0) for size in sizes]
            target += [int(after[axis] or 0) for axis in result]
        else:
            whole += [1] * len(source)
            target += [1] * len(result)
    return np.broadcast_to(label, whole).reshape(target)


def _text(value: oir.Value) -> str:
    return "x".join("?" if size is None else str(size) for size in dims(value)) or "a shape that is unknown"
