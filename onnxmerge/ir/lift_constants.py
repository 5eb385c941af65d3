"""Make an initializer of every Constant node, whichever attribute holds its value."""

import numpy as np
import onnx_ir as oir


def lift_constants(graph: oir.Graph) -> None:
    """Replace the Constant nodes of `graph` by initializers of the same name, in place.

    Those of sub-graphs stay, and so do strings and a Constant that is an output of the graph.
    """
    for node in list(graph):
        tensor = _tensor(node)
        if tensor is None or node.outputs[0].is_graph_output():
            continue
        made = node.outputs[0]
        name = made.name or ""
        constant = oir.Value(
            name=name,
            shape=oir.Shape(tensor.shape.numpy()),
            type=oir.TensorType(tensor.dtype),
            const_value=tensor,
            metadata_props=dict(made.metadata_props),
        )
        made.name = f"{name}__computed"
        graph.register_initializer(constant)
        made.replace_all_uses_with(constant)
        graph.remove(node, safe=True)


def _tensor(node: oir.Node) -> oir.TensorProtocol | None:
    """The value of a Constant node; None for other nodes and for strings."""
    if node.op_type != "Constant" or node.domain != "" or len(node.attributes) != 1:
        return None
    (attribute,) = node.attributes.values()
    if attribute.name == "value":
        return attribute.as_tensor()
    kinds = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    kind = kinds.get(attribute.name)
    return None if kind is None else oir.tensor(np.array(attribute.value, kind))
