"""LayerNormalization, RMSNormalization and Attention: what transformers are made of, as single operators."""

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.labels import Trace, aligned, carries, dims
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
    counts = [integer(node, name, 0) for name in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
    heads = [_by_head(x, label, n) if flat else label for x, label, n in zip(values, labels, counts, strict=True)]
    readers = counts[0] if flat else int(dims(values[0])[1] or 0)
    keys, own = (_repeated(label, readers) for label in heads[1:])
    scores = contract(node, trace, Factor(heads[0], "bhqd"), Factor(keys, "bhkd"), "bhqk")
    mask = optional(node, 3)
    if scores is None:
        return
    if mask is not None:
        scores = trace.combine(node, [scores, aligned(trace.label(mask), 4)])
    mixed = contract(node, trace, Factor(scores, "bhqk"), Factor(own, "bhkd"), "bhqd")
    if mixed is not None and carries(mixed):
        trace.set_label(node.outputs[0], _side_by_side(mixed, readers) if flat else mixed)


def _by_head(value: oir.Value, label: np.ndarray, heads: int) -> np.ndarray:
    """[1, heads, 1, width] from a label of the last axis."""
    if not carries(label):
        return np.full((1, 1, 1, 1), -1)
    width = int(dims(value)[2] or 0)
    return np.broadcast_to(label, (1, 1, width)).reshape(1, heads, 1, width // heads)


def _repeated(label: np.ndarray, heads: int) -> np.ndarray:
    """Keys or values that several heads of queries read, once for each."""
    count = label.shape[1]
    return label if count in (1, heads) else np.repeat(label, heads // count, axis=1)


def _side_by_side(label: np.ndarray, heads: int) -> np.ndarray:
    """[1, 1, heads * width] from [1, heads, 1, width]."""
    return np.broadcast_to(label, (1, heads, 1, label.shape[3])).reshape(1, 1, -1)
