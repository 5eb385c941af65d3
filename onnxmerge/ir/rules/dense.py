"""Gemm, MatMul and Einsum: products, of data with a weight or of two computed values."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.labels import Trace, dims
from onnxmerge.ir.rules.contraction import Factor, Index, contract, contract_weight
from onnxmerge.ir.rules.elementwise import broadcast
from onnxmerge.ir.rules.registry import integer, optional, required, rule


@rule("MatMul")
def matmul(node: oir.Node, trace: Trace) -> None:
    """[..., M, K] times [..., K, N]; an operand of rank 1 is a vector of length K."""
    left, right = required(node, 0), required(node, 1)
    batch = [f"batch{number}" for number in range(max(len(dims(left)), len(dims(right))) - 2)]
    rows, columns = ["m"] * (len(dims(left)) > 1), ["n"] * (len(dims(right)) > 1)
    left_batch = batch[len(batch) - max(len(dims(left)) - 2, 0) :]
    right_batch = batch[len(batch) - max(len(dims(right)) - 2, 0) :]
    label = _product(node, trace, left, [*left_batch, *rows, "k"], right, [*right_batch, "k", *columns],
                     [*batch, *rows, *columns])  # fmt: skip
    if label is not None:
        trace.set_label(node.outputs[0], label)


@rule("Gemm")
def gemm(node: oir.Node, trace: Trace) -> None:
    """Y = X W + b, either factor transposed or not, b broadcast."""
    left, right, bias = required(node, 0), required(node, 1), optional(node, 2)
    of_left = ["k", "m"] if integer(node, "transA", 0) else ["m", "k"]
    of_right = ["n", "k"] if integer(node, "transB", 0) else ["k", "n"]
    label = _product(node, trace, left, of_left, right, of_right, ["m", "n"])
    if label is None:
        return
    output = node.outputs[0]
    if bias is None:
        trace.set_label(output, label)
    else:
        broadcast(node, trace, [(label, output), (trace.label(bias), bias)], output)


@rule("Einsum")
def einsum(node: oir.Node, trace: Trace) -> None:
    """One or two operands, each index at most once in an operand."""
    operands = [value for value in node.inputs if value is not None]
    labels = [trace.label(value) for value in operands]
    terms, result = _terms(node.attributes["equation"].as_string(), [len(dims(value)) for value in operands])
    if len(operands) > 2 or any(len(set(term)) < len(term) for term in [*terms, result]):
        trace.freeze(node, "only equations of one or two operands without repeated indices are read", *labels)
    elif len(operands) == 1:
        summed = [axis for axis, index in enumerate(terms[0]) if index not in result]
        kept = Factor.of(operands[0], trace.together(labels[0], summed), terms[0])
        trace.set_label(node.outputs[0], kept.arranged(result, trace))
    else:
        label = _product(node, trace, operands[0], terms[0], operands[1], terms[1], result)
        if label is not None:
            trace.set_label(node.outputs[0], label)


def _product(
    node: oir.Node,
    trace: Trace,
    left: oir.Value,
    of_left: Sequence[Index],
    right: oir.Value,
    of_right: Sequence[Index],
    result: Sequence[Index],
) -> np.ndarray | None:
    a = Factor.of(left, trace.label(left), of_left)
    b = Factor.of(right, trace.label(right), of_right)
    if trace.is_weight(left) == trace.is_weight(right):
        return contract(node, trace, a, b, result)
    data, weight, own = (b, left, of_left) if trace.is_weight(left) else (a, right, of_right)
    if any(index not in data.indices and index not in result for index in own):
        trace.freeze(node, "its weight is summed over an index that the data do not have", data.label)
        return None
    return contract_weight(node, trace, data, weight, own, result)


def _terms(equation: str, ranks: Sequence[int]) -> tuple[list[list[Index]], list[Index]]:
    """The indices of each operand and of the result; an ellipsis becomes one index for each axis it stands for."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    longest = max(rank - len(part.replace("...", "")) for part, rank in zip(parts, ranks, strict=True))
    terms = [
        _expanded(part, rank - len(part.replace("...", "")), longest) for part, rank in zip(parts, ranks, strict=True)
    ]
    if "->" in equation:
        return terms, _expanded(output, longest, longest)
    letters = [index for index in inputs if index.isalpha()]
    implied = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    return terms, _expanded("..." * ("..." in inputs) + implied, longest, longest)


def _expanded(term: str, count: int, longest: int) -> list[Index]:
    """`term` with its ellipsis as the last `count` of the `longest` indices that it may stand for."""
    before, dots, after = term.partition("...")
    return [*before, *([f"batch{number}" for number in range(longest - count, longest)] if dots else []), *after]
