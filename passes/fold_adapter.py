"""Fold an adapter into the layers that read it (exact), where only linear operators within channels stand between.

The adapter A (see `insert_adapter`) is a map on the channel space that it makes: a layer that reads this space with W
reads what arrives with W A.
"""

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.compose import cut_out, finish
from onnxmerge.ir.labels import rank
from onnxmerge.ir.rules.registry import integer
from onnxmerge.ir.spaces import Slots, find_spaces
from onnxmerge.ir.weights import get_array, set_array
from onnxmerge.passes.channel_map import Place, carry
from onnxmerge.passes.insert_adapter import NAME
from onnxmerge.passes.roles import LAYERS, read_axis, title, why_not_alone

_LINEAR = frozenset(
    (
        *("AveragePool", "GlobalAveragePool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity"),
        *("Dropout", "Resize"),
    )
)
"""Operators that sum or move elements within a channel."""
_SIZED = frozenset(("Reshape", "Resize"))
"""Those of them that may be told how many channels there are."""


def reading_place(model: oir.Model, name: str, axis: int) -> str | None:
    """The first value, from `name` on along operators on single channels, whose channels only layers read.

    An adapter there can be folded. None where something else reads the channels, or a channel has its own constants.

    Args:
        model: a network.
        name: one of its values.
        axis: its channel axis.
    """
    value = next(o for node in model.graph for o in node.outputs if o.name == name)
    while not _only_layers_read(value):
        uses = list(value.uses())
        if len(uses) != 1 or value.is_graph_output():
            return None
        ((node, index),) = uses
        others = [v for place, v in enumerate(node.inputs) if v is not None and place != index]
        plain = all(v.const_value is not None and v.const_value.size == 1 for v in others) and len(node.outputs) == 1
        if not plain or node.op_type in LAYERS or why_not_alone(node, index, [axis]):
            return None
        if rank(node.outputs[0]) != rank(value):
            return None
        value = node.outputs[0]
    return value.name


def _only_layers_read(value: oir.Value) -> bool:
    uses = list(value.uses())
    if not uses or value.is_graph_output():
        return False
    for node, index in uses:
        layer = index == 0 and read_axis(node) is not None and integer(node, "group", 1) == 1
        moved = index == 0 and node.op_type in _LINEAR
        if not layer and not (moved and _only_layers_read(node.outputs[0])):
            return False
    return True


class FoldAdapter(oir.passes.FunctionalPass):
    """Fold the adapter of a network whose only input it reads.

    Args:
        adapted: the name of what the adapter computes; the input is called so afterwards.
    """

    preserves = "exact"

    def __init__(self, adapted: str):
        self.adapted = adapted

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """A copy without the adapter.

        Raises:
            ModelError: not only layers read the adapter's channels, or a constant holds their number.
        """
        folded = model.clone()
        (source,) = folded.graph.inputs
        array = get_array(folded.graph.initializers[f"{NAME}_weight"])
        convolution = next(node for node, _ in source.uses()).op_type == "Conv"
        matrix = array.reshape(array.shape[:2]) if convolution else array.T
        value = next(o for node in folded.graph for o in node.outputs if o.name == self.adapted)
        if not _only_layers_read(value):
            raise ModelError(f"{self.adapted!r}: not only layers read it, so its adapter cannot be folded into them")
        if matrix.shape[0] != matrix.shape[1]:
            _check_sizes(value)
        for slots in _readings(folded, self.adapted):
            weight = folded.graph.initializers[slots.name]
            set_array(weight, _folded(get_array(weight), slots, matrix))
        rest = cut_out(folded, [self.adapted], [v.name or "" for v in folded.graph.outputs])
        (arriving,) = rest.graph.inputs
        arriving.name, arriving.shape = source.name, source.shape
        return oir.passes.PassResult(finish(rest), modified=True)


def _readings(model: oir.Model, name: str) -> list[Slots]:
    """Where the space of a value is read."""
    space = next(space for space in find_spaces(model).spaces if space.value(name) is not None)
    return [slots for slots in space.weights if not slots.name.startswith(f"{NAME}_")]


def _folded(weight: np.ndarray, slots: Slots, matrix: np.ndarray) -> np.ndarray:
    """W A along the axis that reads the space."""
    (axis,) = slots.axes
    own, arriving = matrix.shape
    index = slots.index if own == arriving else _spread(slots, arriving)
    shape = tuple(
        size + index.size - slots.index.size if place == axis else size for place, size in enumerate(weight.shape)
    )
    place = Place(Slots(slots.name, slots.axes, index), slots, matrix.T, None)
    return carry(weight, shape, [place], slots.name).astype(weight.dtype)


def _spread(slots: Slots, channels: int) -> np.ndarray:
    """[channels, slots]: where another number of channels lies, in the same order.

    Raises:
        ModelError: the channels lie in no simple order.
    """
    count, size = slots.index.shape[1], slots.index.size
    if np.array_equal(slots.index, np.arange(size).reshape(-1, count)):
        return np.arange(channels * count).reshape(-1, count)
    if np.array_equal(slots.index, np.arange(size).reshape(count, -1).T):
        return np.arange(channels * count).reshape(count, -1).T
    raise ModelError(f"{slots.name!r}: other channels than its own cannot be read there")


def _check_sizes(value: oir.Value) -> None:
    for node, _ in value.uses():
        if node.op_type in _SIZED:
            raise ModelError(f"{title(node)} holds the number of channels, so it cannot read a stem of another width")
        if node.op_type in _LINEAR:
            _check_sizes(node.outputs[0])
