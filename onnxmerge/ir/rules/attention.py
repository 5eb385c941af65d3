"""LayerNormalization, RMSNormalization and Attention: what transformers are made of, as single operators."""

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.labels import Trace, aligned, carries, dims, no_channels
from onnxmerge.ir.rules.contraction import Factor, contract
from onnxmerge.ir.rules.elementwise import broadcast
from onnxmerge.ir.rules.registry import integer, optional, required, rule


@rule("LayerNormalization", "RMSNormalization")
def layer_norm(node: oir.Node, trace: Trace) -> None:
    """Symmetric in the entries of the normalised axes; scale and shift hold one entry for each."""
    data = required(node, 0)
    label = trace.label(data)
    if not carries(label):
        return
    first = integer(node, "axis", -1) % label.ndim
    statistics = trace.together(label, range(first, label.ndim))
    for output in node.outputs[1:]:
        trace.set_label(output, statistics)
    parameters = [(trace.label(value), value) for value in node.inputs[1:] if value is not None]
    broadcast(node, trace, [(label, data), *parameters], node.outputs[0])


@rule("Attention")
def attention(node: oir.Node, trace: Trace) -> None:
    """softmax(Q K^T + mask) V, with Q, K, V [batch, heads, tokens, width] or [batch, tokens, heads * width].

    Queries and keys are the same channels inside each head, values go straight through, and whole heads move together.
    """
    values = [required(node, index) for index in range(3)]
    labels = [trace.label(value) for value in values]
    if any(value is not None and value.name for value in node.inputs[4:]) or len(node.outputs) > 1:
        trace.freeze(node, "with a cache of past keys and values", *labels)
        return
    flat = len(dims(values[0])) == 3
    readers = integer(node, "q_num_heads", 0) if flat else _sizes(values[0])[1]
    counts = [readers, *[integer(node, "kv_num_heads", 0)] * 2]
    query, key, own = (
        _by_head(value, label, count, readers, indices)
        for value, label, count, indices in zip(values, labels, counts, ("bhqd", "bhkd", "bhkd"), strict=True)
    )
    scores = contract(node, trace, query, key, "bhqk")
    if scores is None:
        return
    sizes = [query.size("b"), readers, query.size("q"), key.size("k")]
    mask = optional(node, 3)
    if mask is not None:
        given = [1] * (4 - len(dims(mask))) + _sizes(mask)
        scores = trace.combine(node, [(scores, sizes), (aligned(trace.label(mask), 4), given)])
    mixed = contract(node, trace, Factor(scores, "bhqk", sizes), own, "bhqd")
    if mixed is None or not carries(mixed):
        return
    if flat:
        mixed = np.broadcast_to(mixed, (1, readers, 1, mixed.shape[3])).reshape(1, 1, -1)
    trace.set_label(node.outputs[0], mixed)


def _by_head(value: oir.Value, label: np.ndarray, heads: int, readers: int, indices: str) -> Factor:
    """[batch, heads, tokens, width]: split into `heads`, each of them once for each of the `readers` that read it."""
    sizes = _sizes(value)
    if len(sizes) == 3:
        batch, tokens, width = sizes
        sizes = [batch, heads, tokens, width // heads]
        if carries(label):
            label = np.broadcast_to(label, (1, 1, width)).reshape(1, heads, 1, width // heads)
        else:
            label = no_channels(4)
    if label.shape[1] not in (1, readers):
        label = np.repeat(label, readers // label.shape[1], axis=1)
    return Factor(label, indices, [sizes[0], 1 if sizes[1] == 1 else readers, *sizes[2:]])


def _sizes(value: oir.Value) -> list[int]:
    return [int(size or 0) for size in dims(value)]
