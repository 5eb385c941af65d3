"""Operators whose outputs carry no channels, whatever they read."""

import onnx_ir as oir

from onnxmerge.ir.labels import Trace
from onnxmerge.ir.rules.registry import rule


@rule("Shape", "Size", "Constant", "ConstantOfShape", "EyeLike", "Range")
def source(node: oir.Node, trace: Trace) -> None:
    """Only sizes are read: no channel goes in or out."""
