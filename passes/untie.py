"""Give each reader of an array its own copy (exact), so that rewriting one layer cannot change another.

Exporters store bit-equal initializers once: a network with tied weights, or one that was never trained, comes with one
array for several layers. The copies become one again when the model is saved.
"""

import onnx_ir as oir

from onnxmerge.ir.normalise import untie


class Untie(oir.passes.InPlacePass):
    """Copy every array of more than one element that several inputs read."""

    preserves = "exact"

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Add the copies."""
        before = len(model.graph.initializers)
        untie(model)
        return oir.passes.PassResult(model, modified=len(model.graph.initializers) > before)

    def ensures(self, model: oir.Model) -> None:
        """No array has two readers."""
        for name, value in model.graph.initializers.items():
            if value.const_value is not None and value.const_value.size > 1 and len(list(value.uses())) > 1:
                raise oir.passes.PostconditionError(f"the array {name!r} still has several readers")
