"""Split, Slice, Gather and their like: some indices of a tensor, in an order that is known or found at run time."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.labels import Trace, carries, channel_axes, dims, rank
from onnxmerge.ir.rules.registry import integer, is_constant, optional, required, rule, source_axis


def rearranged(trace: Trace, label: np.ndarray, places: np.ndarray) -> np.ndarray:
    """`label` after a move that fills each index of the result from the flat index `places` of the label.

    Where one channel has several slots, two channels of one space must have theirs picked and ordered alike. All slots
    follow the picked ones in the record, so that their order tells which of its slots a channel kept, and how often.
    """
    flat = label.ravel()
    every = np.arange(flat.size)
    trace.moves.append((np.concatenate([flat[places.ravel()], flat]), np.concatenate([places.ravel(), every])))
    return flat[places]


def _taken(trace: Trace, label: np.ndarray, axis: int, indices: np.ndarray) -> np.ndarray:
    """`label` with `indices`, of any rank, in place of `axis`; what is picked where nothing varies stays alike."""
    if label.shape[axis] == 1:
        return label.reshape(label.shape[:axis] + (1,) * indices.ndim + label.shape[axis + 1 :])
    places = np.arange(label.size).reshape(label.shape)
    return rearranged(trace, label, places.take(indices % label.shape[axis], axis))


@rule("Split")
def split(node: oir.Node, trace: Trace) -> None:
    """Along the channels, each output gets its share of them; along another axis all get the same."""
    data = required(node, 0)
    label = trace.label(data)
    if not carries(label):
        return
    axis = integer(node, "axis", 0) % rank(data)
    sizes = [dims(output)[axis] if output.shape is not None else None for output in node.outputs]
    if label.shape[axis] > 1 and (None in sizes or sum(size or 0 for size in sizes) != label.shape[axis]):
        trace.freeze(node, "the sizes of its parts are computed", label)
        return
    start = 0
    for output, size in zip(node.outputs, sizes, strict=True):
        trace.set_label(output, _taken(trace, label, axis, np.arange(start, start + (size or 0))))
        start += size or 0


@rule("Slice")
def slices(node: oir.Node, trace: Trace) -> None:
    """On a channel axis the same slice of the label; other axes may be cut anywhere, also where a computation says."""
    data = required(node, 0)
    label = trace.label(data)
    if _selects_by_channels(node, trace):
        return
    starts, ends, axes, steps = (_integers(optional(node, index)) for index in range(1, 5))
    if optional(node, 3) is None:
        axes = list(range(int(dims(required(node, 1))[0] or 0)))
    if axes is None:
        trace.freeze(node, "its axes are computed", label)
        return
    for number, axis in enumerate(axes):
        size = label.shape[axis]
        if size == 1:
            continue
        if starts is None or ends is None or (steps is None and optional(node, 4) is not None):
            trace.freeze(node, "it cuts a channel axis at places that are computed", label)
            return
        step = 1 if steps is None else steps[number]
        own = np.arange(size)[slice(starts[number], ends[number], step)]
        label = _taken(trace, label, axis % label.ndim, own)
    trace.set_label(node.outputs[0], label)


@rule("Gather")
def gather(node: oir.Node, trace: Trace) -> None:
    """Constant indices pick channels; on other axes indices may be computed. A weight that is looked up in, such as an
    embedding, makes channels.
    """
    data, indices = required(node, 0), required(node, 1)
    axis = integer(node, "axis", 0) % rank(data)
    label = trace.label(data)
    if _selects_by_channels(node, trace):
        return
    if not carries(label):
        _look_up(node, trace, data, axis)
        return
    if label.shape[axis] > 1 and not is_constant(indices):
        trace.freeze(node, "it picks channels by indices that are computed", label)
        return
    known = None if indices.const_value is None else indices.const_value.numpy()
    places = np.zeros((1,) * rank(indices), np.int64) if known is None or label.shape[axis] == 1 else known
    trace.set_label(node.outputs[0], _taken(trace, label, axis, places))


def _look_up(node: oir.Node, trace: Trace, data: oir.Value, axis: int) -> None:
    """Fresh channels on the last axis of a table of numbers, or on the last but one when that is looked up."""
    others = [other for other in range(rank(data)) if other != axis and dims(data)[other] != 1]
    source = source_axis(data, others[-1]) if others else None
    if source is None or data.dtype is None or not data.dtype.is_floating_point():
        return  # indices and sizes are no channels
    table, own = source
    fresh = trace.fresh(int(dims(table)[own] or 0))
    trace.use(table, (own,), fresh)
    shape = [1] * rank(node.outputs[0])
    shape[others[-1] if others[-1] < axis else others[-1] - rank(data)] = fresh.size
    trace.set_label(node.outputs[0], fresh.reshape(shape))


@rule("GatherElements")
def gather_elements(node: oir.Node, trace: Trace) -> None:
    """Each index picks along one axis without channels; the indices of all channels are alike, or in channel order."""
    data, indices = required(node, 0), required(node, 1)
    label, own = trace.label(data), trace.label(indices)
    axis = integer(node, "axis", 0) % rank(data)
    if not carries(label) and not carries(own):
        return
    varying = channel_axes(label)
    if axis in varying or axis in channel_axes(own) or any(dims(data)[a] != dims(indices)[a] for a in varying):
        trace.freeze(node, "it picks among channels", label, own)
    elif carries(own):
        if carries(label) and channel_axes(own) == varying:
            trace.unite(label, own)
            trace.set_label(node.outputs[0], label)
        else:
            trace.freeze(node, "data and indices carry channels along different axes", label, own)
    else:
        sources = [source_axis(indices, a) for a in varying]
        found = [source for source in sources if source is not None]
        if len(found) == len(varying):
            if varying:
                trace.use(found[0][0], [a for _, a in found], label)
        elif not all(_is_repeated(indices, a) for a in varying):
            trace.freeze(node, "each channel has indices of its own, which are computed", label)
            return
        trace.set_label(node.outputs[0], label)


def _is_repeated(value: oir.Value, axis: int) -> bool:
    """Whether a computed value is the same all along `axis`, because Expand or Tile made it so."""
    while (node := value.producer()) is not None and node.op_type in ("Cast", "Identity", "Expand", "Tile"):
        value, after = required(node, 0), rank(value)
        axis -= after - rank(value)
        if axis < 0 or dims(value)[axis] == 1:
            return True
    return False


@rule("GatherND")
def gather_nd(node: oir.Node, trace: Trace) -> None:
    """Indices address the leading axes; channels on the axes behind pass."""
    data, indices = required(node, 0), required(node, 1)
    label = trace.label(data)
    if _selects_by_channels(node, trace) or not carries(label):
        return
    addressed = integer(node, "batch_dims", 0) + int(dims(indices)[-1] or rank(data))
    if any(axis < addressed for axis in channel_axes(label)):
        trace.freeze(node, "it picks among channels", label)
    else:
        kept = label.shape[addressed:]
        trace.set_label(node.outputs[0], label.reshape((1,) * (rank(indices) - 1) + kept))


@rule("TopK")
def top_k(node: oir.Node, trace: Trace) -> None:
    """Per channel where another axis is sorted. Sorted channels lose their order, so only their places tell of it."""
    data = required(node, 0)
    label = trace.label(data)
    if _selects_by_channels(node, trace) or not carries(label):
        return
    axis = integer(node, "axis", -1) % rank(data)
    values, places = node.outputs
    if label.shape[axis] > 1 and (places.uses() or places.is_graph_output()):
        trace.freeze(node, "it tells the places of channels", label)
        return
    kept = trace.together(label, [axis])
    trace.set_label(values, kept)
    if label.shape[axis] == 1:
        trace.set_label(places, kept)


@rule("ArgMax", "ArgMin")
def arg_max(node: oir.Node, trace: Trace) -> None:
    """Per channel along another axis; along the channels it tells a place."""
    data = required(node, 0)
    label = trace.label(data)
    axis = integer(node, "axis", 0) % rank(data)
    if label.shape[axis] > 1:
        trace.freeze(node, "it tells the place of a channel", label)
    else:
        trace.set_label(node.outputs[0], label if integer(node, "keepdims", 1) else label.squeeze(axis))


@rule("ReverseSequence")
def reverse_sequence(node: oir.Node, trace: Trace) -> None:
    """Reorders time steps in each sequence of the batch; channels on other axes pass."""
    label = trace.label(required(node, 0))
    if _selects_by_channels(node, trace):
        return
    moved = {integer(node, "batch_axis", 1), integer(node, "time_axis", 0)}
    if moved & set(channel_axes(label)):
        trace.freeze(node, "it reorders an axis that carries channels", label)
    else:
        trace.set_label(node.outputs[0], label)


def _selects_by_channels(node: oir.Node, trace: Trace) -> bool:
    """Whether what says which indices to pick carries channels itself; then all is frozen."""
    labels = [trace.label(value) for value in node.inputs if value is not None]
    if any(carries(label) for label in labels[1:]):
        trace.freeze(node, "it picks by values that carry channels", *labels)
        return True
    return False


def _integers(value: oir.Value | None) -> Sequence[int] | None:
    """The entries of a constant, None where there is none."""
    if value is None or value.const_value is None:
        return None
    return [int(entry) for entry in value.const_value.numpy().ravel()]
