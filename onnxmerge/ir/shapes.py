"""Infer the shapes of a graph with onnx, without its weights, in time linear in its nodes."""

import math

import onnx
import onnx_ir as oir

from onnxmerge.ir.infer_node import makes_negative_size
from onnxmerge.ir.labels import dims

_READ_BYTES = 1 << 12
"""Constants up to here go along, since shapes may depend on what they hold (targets of Reshape, bounds of Slice)."""
SAME_SHAPE = {"GroupNormalization", "MeanVarianceNormalization"}
"""Operators for which onnx has no inference and whose output has the shape of their first input."""


def infer_shapes(model: oir.Model) -> oir.Node | None:
    """Infer every shape afresh; stale ones are dropped first.

    Returns:
        The first node that makes a negative size, for which onnx would end the process; then nothing is inferred.

    Where onnx sees a contradiction, what lies behind it stays without a shape, so that its channels keep their order:
    onnxruntime, which is less strict, has the last word on whether such a model runs.
    """
    impossible = _forget(model)
    if impossible is None and not _infer(model, strict=True):
        _infer(model, strict=False)
    return impossible


def shapes_agree(model: oir.Model) -> bool:
    """Infer every shape afresh; False when there is a contradiction, and no shapes when onnx itself sees it."""
    if _forget(model) is not None or not _infer(model, strict=True):
        return False
    return all(keeps_count(node) for node in model.graph if node.op_type == "Reshape")


def _forget(model: oir.Model) -> oir.Node | None:
    """Drop all shapes but those that operators of other domains make, which only the exporter knew.

    Returns:
        The first node that makes a negative size.
    """
    for node in model.graph:
        for value in node.outputs if node.domain == "" else ():
            if not value.is_graph_output():
                value.shape = None
    return makes_negative_size(model.graph)


def keeps_count(node: oir.Node) -> bool:
    """Whether a Reshape keeps the number of elements, which onnx takes on trust."""
    sizes = [
        dims(value) for value in (node.inputs[0], node.outputs[0]) if value is not None and value.shape is not None
    ]
    counts = {math.prod(size or 0 for size in own) for own in sizes if None not in own}
    return len(counts) < 2


def _infer(model: oir.Model, *, strict: bool) -> bool:
    try:
        inferred = onnx.shape_inference.infer_shapes(
            _without_weights(model), check_type=strict, strict_mode=strict, data_prop=True
        )
    except Exception:  # onnx raises several kinds for what it cannot infer
        return False
    values = {value.name: value for node in model.graph for value in node.outputs}
    for info in [*inferred.graph.value_info, *inferred.graph.output]:
        value = values.get(info.name)
        if value is not None and info.HasField("type"):
            value.type = oir.serde.deserialize_type_proto_for_type(info.type)
            value.shape = oir.serde.deserialize_type_proto_for_shape(info.type)
    return True


def _without_weights(model: oir.Model) -> onnx.ModelProto:
    """`model` with large initializers turned into inputs."""
    proto = onnx.ModelProto(ir_version=model.ir_version or 8)
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    for function in model.functions.values():
        proto.functions.append(oir.serde.serialize_function(function))
    graph = proto.graph
    graph.name = model.graph.name or "graph"
    graph.input.extend(oir.serde.serialize_value(value) for value in model.graph.inputs)
    graph.output.extend(oir.serde.serialize_value(value) for value in model.graph.outputs)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes <= _READ_BYTES:
            graph.initializer.append(oir.serde.serialize_tensor(tensor))
            graph.initializer[-1].name = value.name or ""
        elif tensor is not None:
            graph.input.append(
                onnx.helper.make_tensor_value_info(value.name or "", tensor.dtype.value, list(tensor.shape.numpy()))
            )
    for node in model.graph:
        graph.node.append(oir.serde.serialize_node(node))
        if node.op_type in SAME_SHAPE and node.domain == "":
            stand_in = graph.node[-1]
            stand_in.op_type = "Identity"
            del stand_in.input[1:], stand_in.attribute[:]
        for value in node.outputs:
            if value.shape is not None and value.type is not None and not value.is_graph_output():
                graph.value_info.append(oir.serde.serialize_value(value))
    return proto
