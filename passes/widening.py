"""Widening under way: what every node of a network becomes when networks stand side by side (see `widen`)."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.labels import rank
from onnxmerge.ir.normalise import infer_shapes
from onnxmerge.ir.rules.registry import integer, optional, required
from onnxmerge.ir.spaces import Spaces, find_spaces
from onnxmerge.ir.weights import is_float
from onnxmerge.passes.beside_alone import Alone
from onnxmerge.passes.resize import (
    AxisMap,
    Key,
    numbered,
    replace_constant,
    resize_constants,
    sizes_of,
    unchanged,
    verify,
)
from onnxmerge.passes.roles import MOVES, read_axis, title, why_not_alone
from onnxmerge.passes.side_by_side import beside, joined, joined_groups, on_one_axis, side_by_side

_NORMS = frozenset(("BatchNormalization", "InstanceNormalization"))
_LINEAR = MOVES | {
    "Neg",
    "Dropout",
    "AveragePool",
    "GlobalAveragePool",
    "ReduceMean",
    "ReduceSum",
    "Resize",
    "Upsample",
}
_SUMS = frozenset(("Add", "Sub", "Sum", "Mean"))
_PER_CHANNEL = frozenset(("Add", "Sub", "Mul", "Div", "Pow", "PRelu", "Max", "Min"))
"""Operators whose scalar constant may become one number for each channel."""


class Kind(IntEnum):
    """What a value of the widened network is."""

    SAME = 0
    """The same in all networks, such as the input."""
    WIDE = 1
    """The channels of all networks."""
    MEAN = 2
    """The weighted mean of the networks' values."""
    AFTER = 3
    """Computed from a mean by what is not linear."""
    ALONE = 4
    """One value for each network, which no layer can read as one."""


@dataclass(frozen=True)
class _Role:
    kind: Kind
    axis: int | None = None
    """Of a wide value: its channel axis, when it has one."""
    sources: frozenset[str] = frozenset()
    """The means that a mean or what comes after it is made of."""


class NoMean(ModelError):
    """What the networks' layers `layers`, by the names of their outputs, make cannot be averaged."""

    def __init__(self, reason: str, layers: frozenset[str]):
        super().__init__(reason)
        self.layers = layers


class Widening:
    """One run: the roles of values so far, and the network under construction."""

    def __init__(
        self,
        model: oir.Model,
        arrays: dict[str, list[np.ndarray]],
        weights: list[float],
        alone: frozenset[str],
        in_blocks: bool,
    ):
        """`alone`: layers that stand once for each network. Without `in_blocks` so does what makes blocks of channels,
        such as heads: a value with channels along several axes.
        """
        self.model, self.arrays, self.weights, self.stay_alone = model, arrays, weights, alone
        self.in_blocks = in_blocks
        self.result = model.clone()
        self.alone = Alone(self.result.graph, arrays)
        self.replaced: dict[str, oir.Node] = {}
        """By value that is made once for each network the node of the result that would have made it."""
        self.joined: set[str] = set()
        """Which of these are put together again."""
        self.sizes = sizes_of(model)
        self.spaces: Spaces = find_spaces(model)
        own = [space for space in self.spaces.spaces if not space.blocks]
        self.space_of = np.repeat(np.arange(len(own)), [space.size for space in own])
        self.numbers = numbered(own, self.sizes)
        self.axes = {slots.name: slots.axes for space in own for slots in space.values}
        self.constant_axes = {slots.name: slots.axes for space in own for slots in space.weights if slots.rows is None}
        self.roles: dict[str, _Role] = {value.name or "": _Role(Kind.SAME) for value in model.graph.inputs}
        self.maps: dict[str, dict[int, AxisMap]] = {}

    def finish(self) -> oir.Model:
        """Sizes, shapes and the proof."""
        for node in reversed(list(dict.fromkeys(self.replaced.values()))):
            self.result.graph.remove(node, safe=True)
        resize_constants(self.result, self.maps, self.sizes)
        for name, value in list(self.result.graph.initializers.items()):
            if self.replaced and not value.uses() and not value.is_graph_output():
                del self.result.graph.initializers[name]
        infer_shapes(self.result)
        self.alone.check_sizes(self.sizes, sizes_of(self.result))
        total = len(self.space_of)
        wanted: dict[Key, np.ndarray] = {}
        constants, separate = self.model.graph.initializers, self.replaced.keys() - self.joined
        for key, numbers in self.numbers.items():
            if key[0] in separate or (key[0] in constants and key[0] not in self.result.graph.initializers):
                continue
            joint = self._joint(key)
            own = numbers[joint.source]
            wanted[key] = np.where(joint.parent < 0, -1, joint.parent * total + own)
        verify(self.result, wanted, frozenset())
        return self.result

    def visit(self, node: oir.Node, target: oir.Node) -> None:
        """Widen one node: `target` stands for `node` in the result."""
        kinds = {self._role(value).kind for value in node.inputs if value is not None}
        made = {output.name or "" for output in node.outputs}
        try:
            if Kind.ALONE in kinds or made & self.stay_alone:
                raise ModelError(f"{title(node)}: it works on the channels of each network alone")
            self._visit_together(node, target, kinds)
        except ModelError as error:
            if kinds & {Kind.MEAN, Kind.AFTER}:
                sources = frozenset().union(*(self._role(v).sources for v in node.inputs if v is not None))
                raise NoMean(str(error), sources) from error
            self._visit_alone(node, target)
            return
        for value in node.inputs:
            self._join(value, target)

    def _visit_together(self, node: oir.Node, target: oir.Node, kinds: set[Kind]) -> None:
        """Let one node work on all networks."""
        carried = any((output.name or "", None) in self.numbers for output in node.outputs)
        if (Kind.WIDE in kinds or carried) and kinds & {Kind.MEAN, Kind.AFTER}:
            raise ModelError(f"{title(node)}: what is averaged over the networks meets what is not{self._frozen()}")
        if Kind.WIDE in kinds or carried:
            self._visit_wide(node, target)
        elif node.op_type == "Shape":
            self._set(node, _Role(Kind.SAME))
        elif kinds <= {Kind.SAME}:
            self._visit_same(node, target)
        else:
            self._visit_mean(node, target)

    # --- nodes that stand once for each network ---

    def _visit_alone(self, node: oir.Node, target: oir.Node) -> None:
        """Let a copy of the node work on each network's part."""
        given = [self._parts(value, own, target) for value, own in zip(node.inputs, target.inputs, strict=True)]
        self.alone.copies(node, list(zip(*given, strict=True)), target)
        for output, own in zip(node.outputs, target.outputs, strict=True):
            name = output.name or ""
            self.roles[name] = self._as_wide(output) or _Role(Kind.ALONE)
            self.replaced[name] = target
            own.name = f"{name}/replaced"
            if output.is_graph_output():
                place = list(self.model.graph.outputs).index(output)
                self.result.graph.outputs[place] = self.alone.mean(output, self.weights)

    def _parts(self, value: oir.Value | None, own: oir.Value | None, before: oir.Node) -> list[oir.Value | None]:
        """What each network has in place of a value; `own` stands for it in the result."""
        networks, name = len(self.weights), "" if value is None else value.name or ""
        if value is None or own is None or (value.const_value is None and self._role(value).kind == Kind.SAME):
            return [own] * networks
        if value.const_value is not None or name in self.alone.parts:
            return list(self.alone.parts.get(name, [own] * networks))
        on_axes = self.maps[name]
        if len(on_axes) != 1:
            raise ModelError(f"{title(before)}: what it reads of each network cannot be told apart")
        ((axis, joint),) = on_axes.items()
        return list(self.alone.split(own, axis, joint, networks, before))

    def _as_wide(self, output: oir.Value) -> _Role | None:
        """The role of a value of each network that can be put side by side with the others; None where it cannot."""
        name = output.name or ""
        if (name, None) not in self.numbers:
            return None
        try:
            self._set_wide(output, None)
        except ModelError:
            return None
        sizes, on_axes = self.sizes[name], self.maps[name]
        fits = len(on_axes) == 1 and all(
            (joint.parent >= 0).all() and len(joint) == sizes[axis] * len(self.weights)
            for axis, joint in on_axes.items()
        )
        return self.roles[name] if fits else None

    def _join(self, value: oir.Value | None, before: oir.Node) -> None:
        """Put a value of each network that `before` reads as one together, if it is not yet."""
        name = "" if value is None else value.name or ""
        if name not in self.replaced or name in self.joined or self.roles[name].kind != Kind.WIDE:
            return
        ((axis, joint),) = self.maps[name].items()
        replaced = self.replaced[name]
        (old,) = [output for output in replaced.outputs if output.name == f"{name}/replaced"]
        joined = self.alone.join(name, axis, joint, before)
        if old.shape is not None:
            joined.shape = oir.Shape([len(joint) if place == axis else size for place, size in enumerate(old.shape)])
        old.replace_all_uses_with(joined)
        self.joined.add(name)

    # --- roles ---

    def _role(self, value: oir.Value) -> _Role:
        return self.roles.get(value.name or "", _Role(Kind.SAME))

    def _differing(self, node: oir.Node) -> list[int]:
        """The inputs that are constants and not the same in all networks."""
        found = []
        for index, value in enumerate(node.inputs):
            if value is not None and value.const_value is not None and is_float(value):
                first, *rest = self.arrays[value.name or ""]
                if any(not np.array_equal(first, array) for array in rest):
                    found.append(index)
        return found

    def _frozen(self) -> str:
        """Why channels that one would expect to be wide may not be."""
        nodes = [f"{node.op} {node.node!r}: {node.reason}" for node in self.spaces.frozen]
        return f" (channels keep their place because of {nodes[0]})" if nodes else ""

    def _set(self, node: oir.Node, role: _Role) -> None:
        for output in node.outputs:
            self.roles[output.name or ""] = role

    # --- nodes that read or make wide values ---

    def _visit_wide(self, node: oir.Node, target: oir.Node) -> None:
        wide = [(i, v) for i, v in enumerate(node.inputs) if v is not None and self._role(v).kind == Kind.WIDE]
        for index, value in wide:
            axis = self._role(value).axis
            axes = self.axes.get(value.name or "", ()) or (() if axis is None else (axis,))
            reason = why_not_alone(node, index, axes)
            if reason is not None:
                raise ModelError(f"{title(node)}: {reason}, so networks side by side would mix")
        if node.op_type == "Shape" and self.in_blocks:  # sizes follow by themselves
            self._set(node, _Role(Kind.SAME))
            return
        if read_axis(node) is not None:
            self._visit_layer(node, target)
            return
        counts = {len(self.numbers[value.name or "", None]) for _, value in wide}
        if node.op_type not in MOVES and len(counts) > 1:
            raise ModelError(f"{title(node)}: one channel of each network meets many, so networks would mix")
        places = [self._role(value).axis for _, value in wide if rank(value) == rank(node.outputs[0])]
        for output in node.outputs:
            if not output.uses() and not output.is_graph_output():
                continue
            if (output.name or "", None) not in self.numbers:
                raise ModelError(f"{title(node)}: it mixes the channels of the networks{self._frozen()}")
            self._set_wide(output, places[0] if places else None)
        self._check_same(node)
        for index, constant in enumerate(node.inputs):
            if constant is not None and constant.const_value is not None:
                self._widen_constant(node, target, index)

    def _check_same(self, node: oir.Node) -> None:
        """Refuse what is computed, the same in all networks, and as wide as one network's channels, such as a token.

        Raises:
            ModelError: there is such an input.
        """
        output = node.outputs[0]
        if node.op_type not in _PER_CHANNEL | _SUMS | {"Where", "Concat"}:
            return
        along = {integer(node, "axis", 0) % rank(output)} if node.op_type == "Concat" else set()
        for value in node.inputs:
            if value is None or value.const_value is not None or self._role(value).kind != Kind.SAME:
                continue
            sizes, behind = self.sizes.get(value.name or "", ()), rank(output) - rank(value)
            if any(axis >= behind and sizes[axis - behind] > 1 for axis in set(self.maps[output.name or ""]) - along):
                raise ModelError(f"{title(node)}: {value.name!r} is the same in all networks, beside their channels")

    def _set_wide(self, output: oir.Value, axis: int | None) -> None:
        """Note that a value is wide; `axis` is where its channels lie if the analysis sees only one of them."""
        name = output.name or ""
        axes = self.axes[name]
        joint = self._joint((name, None))
        if len(axes) > 1:
            fits = on_one_axis(joint, [self.sizes[name][a] for a in axes], len(self.weights))
            if fits is None or not self.in_blocks:
                raise ModelError(f"{name!r}: the networks' channels fit side by side on no axis")
            self.maps[name] = {axes[fits[0]]: fits[1]}
            self.roles[name] = _Role(Kind.WIDE)
            return
        own = axes[0] if axes else axis
        self.maps[name] = {} if own is None else {own: joint}
        self.roles[name] = _Role(Kind.WIDE, own)

    def _joint(self, key: Key) -> AxisMap:
        return side_by_side(self.numbers[key], self.space_of, len(self.weights))

    def _visit_layer(self, node: oir.Node, target: oir.Node) -> None:
        data, weight, bias, output = required(node, 0), required(node, 1), optional(node, 2), node.outputs[0]
        arrays, groups, reads = self.arrays[weight.name or ""], integer(node, "group", 1), read_axis(node)
        assert reads is not None
        shape = arrays[0].shape
        made = self._side(output, (weight.name or "", (1 - reads,)), shape[1 - reads] * (1 if reads else groups))
        read = self._side(data, (weight.name or "", (reads,)), shape[reads] * (groups if reads else 1))
        carried = (output.name or "", None) in self.numbers
        if made is None or (carried and (made.parent < 0).any()):
            raise ModelError(f"{title(node)}: some of its channels keep their place and some do not{self._frozen()}")
        if read is None:
            raise ModelError(f"{title(node)}: one channel of each network is read as many, so networks would mix")
        if groups == 1:
            ordered = [np.moveaxis(array, 1 - reads, 0) for array in arrays]
            kernel = np.moveaxis(joined(ordered, made, read, self.weights), 0, 1 - reads)
        else:
            rows, columns = (made, read) if reads == 1 else (read, made)
            found = joined_groups(arrays, rows, columns, groups, self.weights, rows_are_made=reads == 1)
            if found is None:
                raise ModelError(f"{title(node)}: its groups cannot be put side by side")
            kernel, count = found
            target.attributes["group"] = oir.AttrInt64("group", count)
        replace_constant(self.result.graph, target, 1, kernel)
        if bias is not None and bias.const_value is not None:
            channels = int(made.source.max()) + 1
            vectors = [np.broadcast_to(own, (*own.shape[:-1], channels)) for own in self.arrays[bias.name or ""]]
            joint = beside(vectors, vectors[0].ndim - 1, made, self.weights)
            assert joint is not None
            replace_constant(self.result.graph, target, 2, joint)
        if carried:
            self._set_wide(output, 1 if node.op_type.startswith("Conv") else rank(output) - 1)
        else:
            self._set(node, _Role(Kind.MEAN, sources=frozenset([output.name or ""])))

    def _side(self, value: oir.Value, key: Key, size: int) -> AxisMap | None:
        """The joint order of the channels that a layer makes or reads; None where one channel stands for many."""
        if (value.name or "", None) not in self.numbers:
            return unchanged(size)
        own = key if key in self.numbers else (value.name or "", None)  # groups of a kernel have no order of their own
        return self._joint(own) if len(self.numbers[own]) == size else None

    def _widen_constant(self, node: oir.Node, target: oir.Node, index: int) -> None:
        """Put a constant that meets wide values side by side with those of the other networks."""
        name = required(node, index).name or ""
        arrays, axes = self.arrays[name], self.constant_axes.get(name)
        joint: np.ndarray | None = None
        if axes is not None:
            shape = [arrays[0].shape[axis] for axis in axes]
            fits = (0, self._joint((name, axes))) if len(axes) == 1 else None
            fits = fits or on_one_axis(self._joint((name, axes)), shape, len(self.weights))
            joint = None if fits is None else beside(arrays, axes[fits[0]], fits[1])
        elif node.op_type in _NORMS or (index in self._differing(node) and node.op_type in _PER_CHANNEL):
            role = self.roles[node.outputs[0].name or ""]
            if arrays[0].size == 1 and role.axis is not None:  # one number for all channels
                order = self._joint((node.outputs[0].name or "", None))
                behind = 0 if node.op_type in _NORMS else rank(node.outputs[0]) - 1 - role.axis
                joint = beside([a.reshape(-1) for a in arrays], 0, AxisMap(np.zeros_like(order.source), order.parent))
                joint = None if joint is None else joint.reshape(-1, *[1] * behind)
        elif index not in self._differing(node):
            return
        if joint is None:
            raise ModelError(f"{title(node)}: {name!r} differs between the networks where they have no channels")
        replace_constant(self.result.graph, target, index, joint)

    # --- nodes before and after ---

    def _visit_same(self, node: oir.Node, target: oir.Node) -> None:
        differing = self._differing(node)
        named = [value.name or "" for value in node.inputs if value is not None]
        own = [named[index] for index in differing] or [name for name in named if name in self.constant_axes]
        if differing and read_axis(node) is not None:
            self._visit_layer(node, target)
        elif own:
            raise ModelError(f"{title(node)}: {own[0]!r} differs between the networks before their first layers")
        else:
            self._set(node, _Role(Kind.SAME))

    def _visit_mean(self, node: oir.Node, target: oir.Node) -> None:
        """What a mean goes through must be the same in all networks, but for what is added to it."""
        roles = {i: self._role(v) for i, v in enumerate(node.inputs) if v is not None}
        averaged = {i: role for i, role in roles.items() if role.kind >= Kind.MEAN}
        is_mean = all(role.kind == Kind.MEAN for role in averaged.values())
        for index in self._differing(node):
            value = required(node, index)
            if not is_mean or node.op_type not in ("Add", "Sub"):
                raise ModelError(
                    f"{title(node)}: {value.name!r} differs between the networks, but what it meets is averaged over "
                    f"them{self._frozen()}"
                )
            mean = sum(
                w * a.astype(np.float64) for w, a in zip(self.weights, self.arrays[value.name or ""], strict=True)
            )
            replace_constant(self.result.graph, target, index, np.asarray(mean))
        sources = frozenset().union(*(role.sources for role in averaged.values()))
        if _is_linear(node, set(averaged)):
            if is_mean and len(sources) > 1:
                sources = frozenset([node.outputs[0].name or ""])
            self._set(node, _Role(Kind.MEAN if is_mean else Kind.AFTER, sources=sources))
        elif len(sources) > 1:
            raise ModelError(f"{title(node)}: it combines outputs whose mean over the networks does not tell its own")
        else:
            self._set(node, _Role(Kind.AFTER, sources=sources))


def _is_linear(node: oir.Node, averaged: set[int]) -> bool:
    """Whether a weighted mean passes through `node`, up to a constant, when its other inputs are the same."""
    if node.op_type in _LINEAR or node.op_type == "BatchNormalization" or read_axis(node) is not None:
        return averaged == {0} or node.op_type == "Concat"
    if node.op_type in ("Mul", "MatMul"):
        return len(averaged) == 1
    return node.op_type in _SUMS or (node.op_type == "Div" and averaged == {0})
