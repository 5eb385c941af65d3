"""Store equal initializers once (exact): equal in type, shape and every byte.

The arrays are compared by their SHA-256, which is computed in chunks straight from external data files: no weight is
held in memory. Only arrays whose type and shape occur more than once are read.
"""

import onnx_ir as oir

from onnxmerge.ir.stored import store_once


class DeduplicateInitializers(oir.passes.InPlacePass):
    """Let all readers of equal initializers read the first of them; the others go."""

    preserves = "exact"

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Unite in place.

        Raises:
            ModelError: an external data file is missing or too short.
        """
        return oir.passes.PassResult(model, modified=store_once(model) > 0)
