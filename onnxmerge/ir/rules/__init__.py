"""Label rules: what each operator does to channels, one small file for each operator family.

A rule is a function of a node and the trace. It reads the labels of the node's inputs, sets those of its outputs, and
says which atoms are the same, which slots of which constant belong to them, and which must keep their place. An
operator without a rule freezes the channels that reach it: correct, never clever.
"""

from onnxmerge.ir.rules import combining, convolution, dense, elementwise, moving, norms, pooling, reductions
from onnxmerge.ir.rules.registry import RULES, Rule

__all__ = [
    "RULES",
    "Rule",
    "combining",
    "convolution",
    "dense",
    "elementwise",
    "moving",
    "norms",
    "pooling",
    "reductions",
]
