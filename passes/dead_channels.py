"""Find channels that provably contribute nothing, so that pruning them is exact.

A channel is dead when, wherever something other than itself is computed from it, either the weights that read it are
all zero or its value there is exactly zero. Zeros are followed forward from layers whose weights and bias for the
channel are zero, through norms whose shift is zero, and operators that map 0 to 0. In doubt a channel is alive.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.rules.registry import integer, optional, required
from onnxmerge.ir.space import Slots, Space
from onnxmerge.ir.weights import get_array
from onnxmerge.passes.permute import slot_rows
from onnxmerge.passes.prune import Prune, outer, per_axis
from onnxmerge.passes.resize import Sizes, sizes_of
from onnxmerge.passes.roles import MOVES, read_axis, sums_over, why_not_alone

_ZERO_TO_ZERO = frozenset(
    (
        *("Abs", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Celu", "Elu", "Erf", "Floor", "Gelu", "HardSwish"),
        *("Identity", "LeakyRelu", "Mish", "Neg", "PRelu", "Relu", "Round", "Selu", "Shrink", "Sign", "Sin", "Sinh"),
        *("Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Cast", "Dropout"),
        *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare"),
        *("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"),
    )
)
_ALL_ZERO = frozenset(("Add", "Sub", "Sum", "Mean", "Max", "Min"))
_NORMS = frozenset(("BatchNormalization", "InstanceNormalization"))

Flags = dict[str, np.ndarray]
"""For each space, one truth value for each channel."""


def dead_channels(model: oir.Model, spaces: Mapping[str, Space]) -> dict[str, np.ndarray]:
    """The dead channels of each space that has some, in ascending order; `Prune` can drop them all at once.

    At least one channel of a space stays, and as many in each group of a grouped convolution.

    Args:
        model: a normalised model.
        spaces: its channel spaces by name.
    """
    search = _Search(model, spaces)
    flags = search.dead()
    while search.spare(flags):
        pass
    dead = {name: np.flatnonzero(own) for name, own in flags.items() if own.any()}
    if _can_drop(model, spaces, dead):
        return dead
    chosen: dict[str, np.ndarray] = {}
    for name, own in dead.items():
        if _can_drop(model, spaces, chosen | {name: own}):
            chosen[name] = own
    return chosen


def _can_drop(model: oir.Model, spaces: Mapping[str, Space], dead: Mapping[str, np.ndarray]) -> bool:
    """Whether the network can follow, say where it cuts channels at places that it computes."""
    try:
        Prune({name: np.setdiff1d(np.arange(spaces[name].size), own) for name, own in dead.items()}, spaces)(model)
    except ModelError:
        return False
    return True


class _Search:
    """The network with its spaces by value and by array."""

    def __init__(self, model: oir.Model, spaces: Mapping[str, Space]):
        self.model = model
        self.spaces = {name: space for name, space in spaces.items() if not space.blocks}
        self.sizes: Sizes = sizes_of(model)
        self.carried: dict[str, list[tuple[str, Slots]]] = {}
        self.touched: dict[str, list[tuple[str, Slots]]] = {}
        for name, space in self.spaces.items():
            for slots in space.values:
                self.carried.setdefault(slots.name, []).append((name, slots))
            for slots in space.weights:
                self.touched.setdefault(slots.name, []).append((name, slots))
        self.zero: dict[str, Flags] = {}
        for node in model.graph:
            for output in node.outputs:
                name = output.name or ""
                self.zero[name] = {space: self._zeros(node, space, s) for space, s in self.carried.get(name, [])}

    # --- zeros ---

    def _known(self, value: oir.Value | None, space: str) -> np.ndarray:
        """Which channels of `space` are zero wherever they lie in `value`."""
        size = self.spaces[space].size
        if value is None:
            return np.zeros(size, bool)
        if value.const_value is None:
            return self.zero.get(value.name or "", {}).get(space, np.zeros(size, bool))
        own = [slots for name, slots in self.touched.get(value.name or "", []) if name == space]
        if not own:
            return np.full(size, not get_array(value).any())
        return np.all([_slots_zero(get_array(value), slots) for slots in own], axis=0)

    def _zeros(self, node: oir.Node, space: str, slots: Slots) -> np.ndarray:
        """Which channels of `space` are zero in the output of `node`, where they lie in `slots`."""
        nothing = np.zeros(self.spaces[space].size, bool)
        op, inputs = node.op_type, [value for value in node.inputs if value is not None]
        if node.domain not in ("", "ai.onnx") or not inputs:
            return nothing
        if read_axis(node) is not None:
            return self._made_zero(node, space)
        known = self._known(inputs[0], space)
        if op in _ZERO_TO_ZERO or (op == "Clip" and _clips_around_zero(node)):
            return known
        if op in _NORMS:
            scale, shift, *moments = [self._known(value, space) for value in node.inputs[1:]]
            centred = known & moments[0] if moments else known
            return shift & (scale | centred)
        if op in _ALL_ZERO:
            return np.all([self._known(value, space) for value in inputs], axis=0)
        if op == "Mul":
            return np.any([self._known(value, space) for value in inputs], axis=0)
        if op == "Div":
            divisor = inputs[1].const_value
            return known if divisor is not None and divisor.numpy().all() else nothing
        if op in ("Resize", "Upsample"):
            mode = node.attributes.get("coordinate_transformation_mode")
            return nothing if mode is not None and mode.as_string() == "tf_crop_and_resize" else known
        if op == "Pad" and not _pads_with_zero(node):
            return nothing
        if op in MOVES:
            carriers = [v for v in inputs if any(own == space for own, _ in self.carried.get(v.name or "", []))]
            constants = [v for v in inputs if any(own == space for own, _ in self.touched.get(v.name or "", []))]
            padded = np.full(len(nothing), op == "Pad" or bool(carriers or constants))
            return np.all([padded, *(self._known(v, space) for v in (*carriers, *constants))], axis=0)
        return nothing

    def _made_zero(self, node: oir.Node, space: str) -> np.ndarray:
        """Channels of a layer's output whose weights are zero, save those that meet zeros, and whose bias is."""
        data, weight, bias = required(node, 0), required(node, 1), optional(node, 2)
        array = np.array(get_array(weight))
        reads = read_axis(node)
        assert reads is not None
        touched = self.touched.get(weight.name or "", [])
        for name, slots in touched:
            if slots.axes == (reads,) and slots.rows is None:
                unread = slots.index[self._known(data, name)].ravel()
                array[(slice(None),) * reads + (unread,)] = 0
        made = [slots for name, slots in touched if name == space and slots.axes == (1 - reads,)]
        if not made:
            return np.zeros(self.spaces[space].size, bool)
        zero = np.all([_slots_zero(array, slots) for slots in made], axis=0)
        if self._is_depthwise(node):
            zero |= self._known(data, space)
        return zero if bias is None else zero & self._known(bias, space)

    def _is_depthwise(self, node: oir.Node) -> bool:
        return integer(node, "group", 1) > 1 and node.op_type == "Conv" and get_array(required(node, 1)).shape[1] == 1

    # --- reads ---

    def dead(self) -> dict[str, np.ndarray]:
        """Which channels are dead, each by itself."""
        dead = {name: np.ones(space.size, bool) for name, space in self.spaces.items()}
        for output in self.model.graph.outputs:
            for name, _ in self.carried.get(output.name or "", []):
                dead[name][:] = False
        for node in self.model.graph:
            for index, value in enumerate(node.inputs):
                if value is None:
                    continue
                for name, slots in self.carried.get(value.name or "", []):
                    reason = why_not_alone(node, index, slots.axes)
                    if reason is not None:
                        dead[name] &= self._known(value, name) if sums_over(node, index, slots.axes) else False
                for name, slots in self.touched.get(value.name or "", []):
                    dead[name] &= self._unread(node, index, name, slots)
        return dead

    def _unread(self, node: oir.Node, index: int, space: str, slots: Slots) -> np.ndarray | bool:
        """Whether each channel's slots in the constant that is input `index` read nothing of it."""
        if read_axis(node) is not None and index > 0:
            if index == 1 and slots.axes == (read_axis(node),):
                if node.op_type == "ConvTranspose" and integer(node, "group", 1) > 1:
                    return False
                return _slots_zero(get_array(required(node, 1)), slots) | self._known(node.inputs[0], space)
            return index == 2 or slots.axes == (1 - (read_axis(node) or 0),)
        return why_not_alone(node, 0, (1,)) is None and node.op_type not in MOVES

    # --- what must stay ---

    def spare(self, dead: dict[str, np.ndarray]) -> bool:
        """Take off the list, in place, what pruning could not drop; whether there was any."""
        before = sum(int(flags.sum()) for flags in dead.values())
        for flags in dead.values():
            flags[0] &= not flags.all()
        for node in self.model.graph:
            if node.op_type in ("Conv", "ConvTranspose") and integer(node, "group", 1) > 1:
                self._spare_groups(node, dead)
        for name, own in self.carried.items():
            if len(own[0][1].axes) > 1:
                self._spare_rows(name, dead)
        return sum(int(flags.sum()) for flags in dead.values()) < before

    def _positions(self, value: str, dead: Mapping[str, np.ndarray]) -> np.ndarray:
        """Which positions of the axes that carry channels are dead; of the shape of these axes."""
        slots = self.carried[value][0][1]
        mask = np.zeros([self.sizes[value][axis] for axis in slots.axes], bool)
        for name, own in self.carried[value]:
            mask.ravel()[own.index[dead[name]]] = True
        return mask

    def _revive(self, value: str, alive: np.ndarray, dead: dict[str, np.ndarray]) -> None:
        for name, own in self.carried[value]:
            dead[name] &= ~alive.ravel()[own.index].any(1)

    def _spare_groups(self, node: oir.Node, dead: dict[str, np.ndarray]) -> None:
        groups = integer(node, "group", 1)
        sides = [v.name or "" for v in (required(node, 0), node.outputs[0])]
        flags = {}
        for name in sides:
            known = self._positions(name, dead) if name in self.carried else np.zeros(self.sizes[name][1], bool)
            flags[name] = np.broadcast_to(known.ravel(), self.sizes[name][1]).reshape(groups, -1)
        alive = ~np.all(np.concatenate([flags[name] for name in sides], axis=1), axis=1)
        for name, own in flags.items():
            if name not in self.carried or not alive.any():
                continue
            count = min(int(np.min(np.sum(own[alive], axis=1))), own.shape[1] - 1)
            extra = own & (np.cumsum(own, axis=1) > count) & alive[:, None]
            if self._positions(name, dead).size == extra.size:
                self._revive(name, extra, dead)

    def _spare_rows(self, name: str, dead: dict[str, np.ndarray]) -> None:
        """Where channels lie on several axes only whole rows and columns can go."""
        kept = ~self._positions(name, dead)
        self._revive(name, outer(per_axis(kept)) & ~kept, dead)


def _slots_zero(array: np.ndarray, slots: Slots) -> np.ndarray:
    """For each channel whether all its slots are zero."""
    rows = slot_rows(array, slots)
    return (rows[slots.index] == 0).reshape(len(slots.index), -1).all(1)


def _clips_around_zero(node: oir.Node) -> bool:
    bounds = [optional(node, 1), optional(node, 2)]
    if any(bound is not None and bound.const_value is None for bound in bounds):
        return False
    low, high = (None if bound is None else float(get_array(bound).item()) for bound in bounds)
    return (low is None or low <= 0) and (high is None or high >= 0)


def _pads_with_zero(node: oir.Node) -> bool:
    constant = "mode" not in node.attributes or node.attributes["mode"].as_string() == "constant"
    value = optional(node, 2)
    return not constant or value is None or (value.const_value is not None and not get_array(value).any())
