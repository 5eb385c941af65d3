"""What onnx says of one node alone: the types and shapes of its outputs."""

from collections.abc import Mapping

import onnx
import onnx_ir as oir

_SHAPE_LIKE = 1024
"""Arrays of up to so many elements may be sizes, bounds or axes, on which the shape of an output depends."""

Types = Mapping[oir.Value, onnx.TypeProto]


def infer_node(node: oir.Node, opset: int, known: Types | None = None) -> list[onnx.TypeProto]:
    """The types of the outputs of a node of the standard.

    Args:
        node: a node, named or not.
        opset: of the standard.
        known: types of computed inputs; those of constants are known.

    Raises:
        Exception: of many kinds, where the node is no valid one.
    """
    proto = with_plain_names(node)
    types, data = {}, {}
    for name, value in zip(proto.input, node.inputs, strict=True):
        tensor = None if value is None else value.const_value
        if tensor is not None:
            types[name] = onnx.helper.make_tensor_type_proto(tensor.dtype.value, list(tensor.shape.numpy()))
            if tensor.size <= _SHAPE_LIKE:
                data[name] = oir.serde.serialize_tensor(tensor)
        elif value is not None:
            types[name] = (known or {}).get(value) or _declared(value)
    schema, imports = onnx.defs.get_schema(node.op_type, opset), [onnx.helper.make_opsetid("", opset)]
    made = onnx.shape_inference.infer_node_outputs(schema, proto, types, data, opset_imports=imports)
    return [made[name] for name in proto.output]


def with_plain_names(node: oir.Node) -> onnx.NodeProto:
    """The node alone; its inputs are called i0, i1, ... and its outputs o0, o1, ..."""
    proto = oir.serde.serialize_node(node)
    proto.ClearField("input")
    proto.ClearField("output")
    proto.input.extend("" if value is None else f"i{index}" for index, value in enumerate(node.inputs))
    proto.output.extend(f"o{index}" for index in range(len(node.outputs)))
    return proto


def _declared(value: oir.Value) -> onnx.TypeProto:
    """What the model says of a value; a tensor of float32 of any shape where it says nothing."""
    if value.type is None:
        return onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
    return oir.serde.serialize_value(value).type


def makes_negative_size(graph: oir.Graph) -> oir.Node | None:
    """The first node that makes a value with a negative size, in a graph that slices anything.

    onnx's inference of a whole graph does not mind negative sizes until it comes to a Slice, and then ends the process.
    """
    if not any(node.op_type == "Slice" for node in graph.all_nodes()):
        return None
    known: dict[oir.Value, onnx.TypeProto] = {}
    for node in graph:
        if node.domain != "":
            continue
        try:
            made = infer_node(node, graph.opset_imports[""], known)
        except Exception:  # what onnx cannot infer it leaves unknown when it infers the whole graph, too
            continue
        for value, kind in zip(node.outputs, made, strict=True):
            if any(dim.dim_value < 0 for dim in kind.tensor_type.shape.dim):
                return node
            known[value] = kind
    return None
