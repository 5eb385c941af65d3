"""The table of label rules, filled by the family files beside this one."""

from collections.abc import Callable, Sequence

import onnx_ir as oir

from onnxmerge.ir.labels import Trace

Rule = Callable[[oir.Node, Trace], None]
RULES: dict[str, Rule] = {}


def rule(*op_types: str) -> Callable[[Rule], Rule]:
    """Register a function as the label rule of these operators of the default domain."""

    def register(function: Rule) -> Rule:
        for op_type in op_types:
            RULES[op_type] = function
        return function

    return register


def required(node: oir.Node, index: int) -> oir.Value:
    """The node's input `index`, which the operator requires."""
    value = node.inputs[index]
    assert value is not None, f"{node.op_type} without input {index}"
    return value


def optional(node: oir.Node, index: int) -> oir.Value | None:
    """The node's input `index`, or None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def integer(node: oir.Node, name: str, default: int) -> int:
    """The integer attribute `name`."""
    return node.attributes[name].as_int() if name in node.attributes else default


def axes_of(node: oir.Node, index: int, rank: int) -> list[int] | None:
    """Non-negative axes given as attribute `axes` or constant input `index`; None when absent or not constant."""
    axes: Sequence[int] | None = None
    given = optional(node, index)
    if "axes" in node.attributes:
        axes = node.attributes["axes"].as_ints()
    elif given is not None and given.const_value is not None:
        axes = given.const_value.numpy().ravel().tolist()
    return None if axes is None else [int(axis) % rank for axis in axes]


def is_constant(value: oir.Value | None) -> bool:
    """Whether `value` is an initializer."""
    return value is not None and value.const_value is not None
