"""What a network's output stands for, as far as its shape and the operators that end it tell."""

from collections.abc import Sequence

import onnx_ir as oir

_PASSED = frozenset(
    {"Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Dropout"}
    | {"Add", "Sub", "Mul", "Div"}
)
"""Operators that leave the meaning of the one value that they read beside constants."""
_SQUASHED = frozenset({"Sigmoid", "HardSigmoid", "Tanh", "Clip", "Relu", "Softplus", "Softsign", "LpNormalization"})
"""What ends independent labels, coordinates and embeddings, but not the choice of one class out of many."""


def is_class_shape(shape: Sequence[int]) -> bool:
    """Whether an output [N, classes] or [N, classes, 1, 1] may hold a number for each of several classes."""
    return len(shape) in (2, 4) and shape[1] > 1 and all(size == 1 for size in shape[2:])


def same_but_for_ones(ours: Sequence[int], theirs: Sequence[int]) -> bool:
    """Whether two shapes differ in axes of size 1 at most."""
    return [size for size in ours if size != 1] == [size for size in theirs if size != 1]


def may_name_classes(model: oir.Model, output: str) -> bool:
    """Whether `output` may hold logits or probabilities of classes, by the operators that end it.

    Its shape (`is_class_shape`), which is often known only when the network has run, is to be judged apart.
    """
    node = next((value.producer() for value in model.graph.outputs if value.name == output), None)
    while node is not None:
        computed = [v for v in node.inputs if v is not None and v.const_value is None]
        if node.op_type in _SQUASHED:
            return False
        if node.op_type == "Div" and len(computed) == 2:  # by a norm; or by the sum of what a softmax is made of
            numerator = computed[0].producer()
            return numerator is not None and numerator.op_type == "Exp"
        node = computed[0].producer() if node.op_type in _PASSED and len(computed) == 1 else None
    return True
