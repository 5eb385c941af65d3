"""Label rules: what each operator does to channels, one small file for each operator family.

A rule is a function of a node and the trace. It reads the labels of the node's inputs, sets those of its outputs, and
says which atoms are the same, which slots of which constant belong to them, and which must keep their place. An
operator without a rule freezes the channels that reach it: correct, never clever.

Every module of this folder is imported, so that a rule counts by being there.
"""

from importlib import import_module
from pkgutil import iter_modules

from onnxmerge.ir.rules.registry import RULES, Rule

for _module in iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)

__all__ = ["RULES", "Rule"]
