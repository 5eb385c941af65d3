"""The table of label rules, filled by the family files beside this one."""

from collections.abc import Callable, Sequence

import onnx_ir as oir

from onnxmerge.ir.labels import Trace, dims

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


def source_axis(value: oir.Value, axis: int) -> tuple[oir.Value, int] | None:
    """The initializer, and its axis, that axis `axis` of `value` copies index by index; None where there is none.

    Looks through operators that only move or repeat a whole initializer, such as a class token that is expanded to the
    batch, as long as nobody else reads what they make.
    """
    while not is_constant(value):
        node = value.producer()
        if len(value.uses()) > 1 or value.is_graph_output():
            return None
        if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in _STEPS_BACK:
            return None
        back = _STEPS_BACK[node.op_type](node, axis)
        if back is None:
            return None
        value, axis = required(node, 0), back
    return value, axis


def _unchanged(node: oir.Node, axis: int) -> int | None:
    return axis


def _before_expand(node: oir.Node, axis: int) -> int | None:
    before, after = dims(required(node, 0)), dims(node.outputs[0])
    own = axis - (len(after) - len(before))
    return own if own >= 0 and before[own] == after[axis] else None


def _before_same_size(node: oir.Node, axis: int) -> int | None:
    steps = optional(node, 4)
    forward = steps is None or (steps.const_value is not None and (steps.const_value.numpy() > 0).all())
    return axis if forward and dims(required(node, 0))[axis] == dims(node.outputs[0])[axis] else None


def _before_unsqueeze(node: oir.Node, axis: int) -> int | None:
    axes = axes_of(node, 1, len(dims(node.outputs[0])))
    return None if axes is None or axis in axes else axis - sum(new < axis for new in axes)


def _before_transpose(node: oir.Node, axis: int) -> int | None:
    count = len(dims(node.outputs[0]))
    return node.attributes["perm"].as_ints()[axis] if "perm" in node.attributes else count - 1 - axis


_STEPS_BACK: dict[str, Callable[[oir.Node, int], int | None]] = {
    "Cast": _unchanged,
    "Identity": _unchanged,
    "Expand": _before_expand,
    "Slice": _before_same_size,
    "Tile": _before_same_size,
    "Unsqueeze": _before_unsqueeze,
    "Transpose": _before_transpose,
}
"""For each operator the axis of its first input that an axis of its output copies."""
