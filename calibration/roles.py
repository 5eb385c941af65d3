"""What an initializer is for, told by the slot it feeds: a scalar can be a weight, and a large tensor a constant."""

from enum import StrEnum

import onnx_ir


class Role(StrEnum):
    """`WEIGHT` and `NORM` are learnt; everything else (shapes, pads, running statistics, scalars) is a `CONSTANT`."""

    WEIGHT = "weight"
    NORM = "norm"
    CONSTANT = "constant"


_SLOTS = {
    "Conv": (Role.WEIGHT, (1, 2)),
    "ConvTranspose": (Role.WEIGHT, (1, 2)),
    "Gemm": (Role.WEIGHT, (0, 1, 2)),
    "MatMul": (Role.WEIGHT, (0, 1)),
    "BatchNormalization": (Role.NORM, (1, 2)),
    "InstanceNormalization": (Role.NORM, (1, 2)),
    "LayerNormalization": (Role.NORM, (1, 2)),
    "GroupNormalization": (Role.NORM, (1, 2)),
}
_TAKES_ADDED_BIAS = ("MatMul", "Conv", "ConvTranspose")


def roles(graph: onnx_ir.Graph) -> dict[str, Role]:
    """The role of every initializer of `graph`; one that feeds several slots is a weight before it is a norm."""
    found = dict.fromkeys(graph.initializers, Role.CONSTANT)
    for name, value in graph.initializers.items():
        if value.const_value is not None and value.const_value.dtype.is_floating_point():
            uses = {_role_at(node, slot) for node, slot in value.uses()}
            found[name] = next((role for role in Role if role in uses), Role.CONSTANT)
    return found


def _role_at(node: onnx_ir.Node, slot: int) -> Role:
    if node.op_type == "Add" and _adds_bias(node, slot):
        return Role.WEIGHT
    role, slots = _SLOTS.get(node.op_type, (Role.CONSTANT, ()))
    return role if slot in slots else Role.CONSTANT


def _adds_bias(node: onnx_ir.Node, slot: int) -> bool:
    """Whether the Add's other operand is a layer without bias, and this one varies along its channel axis only."""
    bias, other = node.inputs[slot], node.inputs[1 - slot]
    layer = other.producer() if other is not None else None
    if layer is not None and layer.op_type == "Split" and layer.inputs[0] is not None:  # stacked streams
        layer = layer.inputs[0].producer()
    if bias is None or bias.const_value is None or layer is None or layer.op_type not in _TAKES_ADDED_BIAS:
        return False
    if not any(operand is not None and operand.is_initializer() for operand in layer.inputs):
        return False
    shape = [int(size) for size in bias.const_value.shape.numpy()]
    if layer.op_type == "MatMul":
        return bool(shape) and all(size == 1 for size in shape[:-1])
    weight = layer.inputs[1]
    spatial = len(weight.shape) - 2 if weight is not None and weight.shape is not None else 0
    return len(shape) > spatial and all(size == 1 for size in shape[-spatial:] + shape[: -spatial - 1])
