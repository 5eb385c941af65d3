"""Add fictive channels (exact): neurons without connections, so that networks of other widths get equal ones.

The network is widened by copies of itself whose layers have only zeros, with the weight 0 in the mean of outputs, and
pruned to the wanted widths. So a fictive channel reads only fictive ones, with weight 0, and none of the real ones, nor
an output, reads it with another weight than 0. What a norm or a nonlinearity makes of it, f(0) included, does not
matter as long as it is finite.

Source: the fictive connections of He, Zhou and Thiele, Multi-Task Zipping, 2018, section 3.4.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.ir.weights import get_array, set_array
from onnxmerge.passes.other_widths import with_widths

_UNBOUNDED = frozenset(("Log", "Reciprocal", "Div", "Pow"))
"""What may make something of a fictive channel that times 0 is not 0."""


class AddFictive(oir.passes.FunctionalPass):
    """Give channel spaces more channels; a space's own come first.

    Args:
        widths: by the names of its spaces (see `find_spaces`); no space shrinks.
    """

    preserves = "exact"

    def __init__(self, widths: Mapping[str, int]):
        self.widths = widths

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """A widened copy; it says so where all widths were what they should be.

        Raises:
            ModelError: a space cannot get more channels (see `Widen`), or a fictive channel may become infinite.
        """
        spaces = {space.name: space for space in find_spaces(model).spaces if not space.blocks}
        more = {name: width for name, width in self.widths.items() if width != spaces[name].size}
        if not more:
            return oir.passes.PassResult(model.clone(), modified=False)
        for space in (spaces[name] for name in more):
            self._check_finite(model, {slots.name for slots in space.values})
        sizes = {name: space.size for name, space in spaces.items()}
        return oir.passes.PassResult(with_widths(model, sizes, more, _zero(model), (1.0, 0.0)), modified=True)

    def _check_finite(self, model: oir.Model, carriers: set[str]) -> None:
        for node in model.graph:
            computed = [v.name for v in node.inputs if v is not None and v.const_value is None]
            if node.op_type in _UNBOUNDED and carriers & set(computed[-1:]) and not _by_constant(node):
                raise ModelError(f"{node.op_type} {node.name!r}: what it makes of a channel of zeros may be infinite")


def _by_constant(node: oir.Node) -> bool:
    """Whether the node divides by a constant, or raises to one that is positive."""
    last = node.inputs[-1]
    if node.op_type not in ("Div", "Pow") or last is None or last.const_value is None:
        return False
    return bool((get_array(last) > 0).all()) or node.op_type == "Div"


def _zero(model: oir.Model) -> oir.Model:
    """A copy in which no layer makes anything."""
    copy = model.clone()
    for layer in find_layers(copy):
        for value in (layer.weight, layer.bias):
            if value is not None and value.const_value is not None:
                set_array(value, np.zeros_like(get_array(value)))
    return copy
