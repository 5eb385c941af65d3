"""Give channel spaces other widths (approximate): the graph of a network with more or fewer channels.

It is widened by copies of itself and pruned, so every constant that holds a size follows. The weights of the result are
nobody's: whoever asks for other widths fills them in (see `map_channels`).
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.compose import cut_out, finish
from onnxmerge.ir.labels import dims, rank
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.ir.weights import add_initializer
from onnxmerge.passes.other_widths import with_widths

_END = "__end"


class SetWidths(oir.passes.FunctionalPass):
    """Set the widths of spaces of a stem, a network whose only output is open.

    Args:
        widths: by the names of its spaces (see `find_spaces` with that output open).
        axis: the channel axis of the output.
    """

    preserves = "approximate"

    def __init__(self, widths: Mapping[str, int], axis: int):
        self.widths = widths
        self.axis = axis

    def requires(self, model: oir.Model) -> None:
        """There is one output, and every width is at least 1."""
        if len(model.graph.outputs) != 1 or min(self.widths.values(), default=1) < 1:
            raise ModelError("widths are at least 1, and a stem has one output")

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """A resized copy.

        Raises:
            ModelError: see `Widen` and `Prune`.
        """
        (output,) = model.graph.outputs
        name = output.name or ""
        spaces = {space.name: space for space in find_spaces(model, frozenset([name])).spaces}
        unknown = sorted(set(self.widths) - set(spaces))
        if unknown:
            raise ModelError(f"there is no channel space {unknown[0]!r} before {name!r}")
        changed = {space: width for space, width in self.widths.items() if width != spaces[space].size}
        if not changed:
            return oir.passes.PassResult(model.clone(), modified=False)
        closed = self._closed(model)
        sizes = {space: own.size for space, own in spaces.items()}
        pruned = with_widths(closed, sizes, changed, closed, (1.0, 1.0))
        return oir.passes.PassResult(cut_out(pruned, [v.name or "" for v in model.graph.inputs], [name]), modified=True)

    def _closed(self, model: oir.Model) -> oir.Model:
        """The stem with a layer behind it, so that its output's channels are those of a hidden space."""
        closed = model.clone()
        (output,) = closed.graph.outputs
        size, count = dims(output)[self.axis] or 1, rank(output)
        if self.axis == 1 and count > 2:
            weight = add_initializer(
                closed.graph, f"{_END}_weight", np.zeros((1, size, *[1] * (count - 2)), np.float32)
            )
            node = oir.node("Conv", [output, weight], name=_END)
        else:
            weight = add_initializer(closed.graph, f"{_END}_weight", np.zeros((size, 1), np.float32))
            node = oir.node("MatMul", [output, weight], name=_END)
        closed.graph.append(node)
        node.outputs[0].name, node.outputs[0].type = _END, output.type
        closed.graph.outputs[0] = node.outputs[0]
        return finish(closed)
