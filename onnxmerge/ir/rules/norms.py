"""Normalisations whose statistics belong to one channel or one group of channels, or to all entries along an axis."""

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.labels import Trace, dims, rank
from onnxmerge.ir.rules.registry import integer, required, rule, source_axis


@rule("BatchNormalization", "InstanceNormalization")
def per_channel_norm(node: oir.Node, trace: Trace) -> None:
    """Scale, bias, and for batch norm mean and variance hold one entry for each index of axis 1."""
    label = trace.label(required(node, 0))
    if integer(node, "training_mode", 0):
        trace.freeze(node, "it is in training mode", label)
        return
    if node.op_type == "InstanceNormalization":
        trace.together(label, range(2, label.ndim))
    _scale(node, trace, label)


@rule("GroupNormalization")
def group_norm(node: oir.Node, trace: Trace) -> None:
    """The channels of a group share their statistics. Scale and bias hold one entry for each channel of axis 1, or
    (before opset 21) for each group.
    """
    data, scale = required(node, 0), required(node, 1)
    label = trace.label(data)
    groups, count = integer(node, "num_groups", 1), int(dims(data)[1] or 0)
    if label.shape[1] == 1:
        _scale(node, trace, label)
        return
    full = np.broadcast_to(label, (label.shape[0], count, *label.shape[2:]))
    grouped = full.reshape(label.shape[0], groups, count // groups, *label.shape[2:])
    statistics = trace.together(grouped, range(2, grouped.ndim))
    if dims(scale) == (groups,) and groups < count:
        _scale(node, trace, label, statistics.reshape(statistics.shape[:2]))
    else:
        _scale(node, trace, label)


def _scale(node: oir.Node, trace: Trace, label: np.ndarray, owners: np.ndarray | None = None) -> None:
    """Give the parameters to the channels on axis 1 (of `owners`, where those of the data do not have one each)."""
    parameters = [value for value in node.inputs[1:] if value is not None]
    sources = [source_axis(value, 0) for value in parameters]
    found = [source for source in sources if source is not None]
    whole = label if owners is None else owners
    if len(found) < len(parameters):
        trace.freeze(node, "its parameters are computed", label, *(trace.label(value) for value in parameters))
        return
    for parameter, axis in found:
        if whole.shape[1] > 1:
            trace.use_partly(parameter, (axis,), whole, (1,))
    trace.set_label(node.outputs[0], label)


@rule("LpNormalization")
def lp_norm(node: oir.Node, trace: Trace) -> None:
    """Symmetric in the entries along its axis, as long as they stay together."""
    data = required(node, 0)
    label = trace.label(data)
    trace.together(label, [integer(node, "axis", -1) % rank(data)])
    trace.set_label(node.outputs[0], label)


@rule("MeanVarianceNormalization")
def mean_variance_norm(node: oir.Node, trace: Trace) -> None:
    """Symmetric in the entries that share a mean, as long as they stay together."""
    label = trace.label(required(node, 0))
    axes = node.attributes["axes"].as_ints() if "axes" in node.attributes else (0, 2, 3)
    trace.together(label, [axis % label.ndim for axis in axes])
    trace.set_label(node.outputs[0], label)
