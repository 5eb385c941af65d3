"""Put a task's name before every name of a model (exact), so that several models fit into one graph.

Nodes, values, initializers and the names of symbolic axes become `TASK/name`, in sub-graphs too: nothing of one task
can clash with, or be tied to, anything of another.
"""

import onnx_ir as oir

from onnxmerge.ir.compose import prefix_names
from onnxmerge.ir.sizes import rename_sizes


class PrefixNames(oir.passes.InPlacePass):
    """Put `prefix` before every name."""

    preserves = "exact"

    def __init__(self, prefix: str):
        self.prefix = prefix

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Rename in place."""
        prefix_names(model.graph, self.prefix)
        rename_sizes(model, lambda name: f"{self.prefix}{name}")
        return oir.passes.PassResult(model, modified=True)
