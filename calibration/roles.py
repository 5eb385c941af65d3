"""What an initializer is for, told by the slot it feeds: a scalar can be a weight, and a large tensor a constant."""

from enum import StrEnum

import onnx_ir


class Role(StrEnum):
    """`WEIGHT` and `NORM` are learnt, a `STATISTIC` may follow them; all else (shapes, scalars) is a `CONSTANT`."""

    WEIGHT = "weight"
    NORM = "norm"
    STATISTIC = "statistic"
    CONSTANT = "constant"


_SLOTS = {
    "Conv": {1: Role.WEIGHT, 2: Role.WEIGHT},
    "ConvTranspose": {1: Role.WEIGHT, 2: Role.WEIGHT},
    "Gemm": {0: Role.WEIGHT, 1: Role.WEIGHT, 2: Role.WEIGHT},
    "MatMul": {0: Role.WEIGHT, 1: Role.WEIGHT},
    "BatchNormalization": {1: Role.NORM, 2: Role.NORM, 3: Role.STATISTIC, 4: Role.STATISTIC},
    "InstanceNormalization": {1: Role.NORM, 2: Role.NORM},
    "LayerNormalization": {1: Role.NORM, 2: Role.NORM},
    "GroupNormalization": {1: Role.NORM, 2: Role.NORM},
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
    return _SLOTS.get(node.op_type, {}).get(slot, Role.CONSTANT)


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
