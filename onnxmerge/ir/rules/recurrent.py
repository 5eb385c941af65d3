"""LSTM, GRU and RNN: each direction makes its own hidden channels, which every gate shares."""

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.labels import Rows, Trace, carries, channel_axes, dims, no_channels
from onnxmerge.ir.rules.registry import integer, is_constant, optional, required, rule, source_axis

_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_PEEPHOLES = 3


@rule("LSTM", "GRU", "RNN")
def recurrent(node: oir.Node, trace: Trace) -> None:
    """X [T, N, I], W [D, G H, I], R [D, G H, H], B [D, 2 G H], peepholes [D, 3 H]; states are [D, N, H].

    The H hidden channels of a direction are rows of each of the G gates and columns of R.
    """
    gates = _GATES[node.op_type]
    data, weight, recurrence = (required(node, index) for index in range(3))
    bias, lengths, peepholes = optional(node, 3), optional(node, 4), optional(node, 7)
    label = trace.label(data)
    arrays = [value for value in (weight, recurrence, bias, peepholes) if value is not None]
    reached = [trace.label(value) for value in node.inputs if value is not None]
    if not all(is_constant(value) for value in arrays):
        trace.freeze(node, "its weights are computed", *reached)
        return
    if integer(node, "layout", 0) or (lengths is not None and carries(trace.label(lengths))):
        trace.freeze(node, "the batch comes first (layout 1), or lengths are computed from channels", *reached)
        return
    if channel_axes(label) not in ((), (2,)):
        trace.freeze(node, "channels lie on the axis of time or of the batch", label)
        label = no_channels(3)
    if carries(label):
        trace.use(weight, (2,), np.broadcast_to(label.ravel(), int(dims(weight)[2] or 0)))
    directions, _, size = (int(count or 0) for count in dims(recurrence))
    made = trace.fresh(directions * size).reshape(directions, size)
    for direction, own in enumerate(made):
        rows = Rows(0, direction, direction + 1)
        trace.use(weight, (1,), np.tile(own, gates), rows)
        trace.use(recurrence, (1,), np.tile(own, gates), rows)
        trace.use(recurrence, (2,), own, rows)
        if bias is not None:
            trace.use(bias, (1,), np.tile(own, 2 * gates), rows)
        if peepholes is not None:
            trace.use(peepholes, (1,), np.tile(own, _PEEPHOLES), rows)
    for state in (optional(node, 5), optional(node, 6)):
        if state is not None:
            _begin(node, trace, state, made)
    sequence, *last = node.outputs
    if sequence.name:
        trace.set_label(sequence, made.reshape(1, directions, 1, size))
    for output in last:
        if output.name:
            trace.set_label(output, made.reshape(directions, 1, size))


def _begin(node: oir.Node, trace: Trace, state: oir.Value, made: np.ndarray) -> None:
    """The initial state [D, N, H] has the hidden channels too."""
    label = trace.label(state)
    directions, size = made.shape
    source = source_axis(state, 2)
    by_direction = source_axis(state, 0)
    if carries(label):
        if channel_axes(label) not in ((), (2,), (0, 2)):
            trace.freeze(node, "its initial state carries channels on another axis", label, made)
        else:
            trace.unite(label, made.reshape(directions, 1, size))
    elif source is None or (by_direction is None and directions > 1):
        trace.freeze(node, "its initial state is computed", made)
    else:
        for direction, own in enumerate(made):
            rows = None if by_direction is None else Rows(by_direction[1], direction, direction + 1)
            trace.use(source[0], (source[1],), own, rows)
