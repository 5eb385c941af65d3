"""Networks side by side, one node at a time: what mixes channels does so once for each network (exact).

Where channels of several networks lie along one axis, a Split takes them apart, a copy of the node works on each
network's part with that network's constants, and a Concat puts what comes out together again. So a norm over channels,
a softmax over them or a product of them sees one network's channels only, as it always did.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.weights import add_initializer
from onnxmerge.passes.resize import SHARED, AxisMap, Sizes
from onnxmerge.passes.roles import title


class Alone:
    """The nodes of `graph` that stand once for each network.

    Args:
        graph: the widened network's; nodes are put into it.
        arrays: for each constant of a single network its array in every network.
    """

    def __init__(self, graph: oir.Graph, arrays: Mapping[str, Sequence[np.ndarray]]):
        self._graph, self._arrays = graph, arrays
        self._constants: dict[str, list[oir.Value]] = {}
        self.parts: dict[str, list[oir.Value]] = {}
        """By the name of a single network's value the value of each network."""

    def split(self, value: oir.Value, axis: int, joint: AxisMap, networks: int, before: oir.Node) -> list[oir.Value]:
        """Each network's part of a widened value, its channels in their order in that network."""
        name = value.name or ""
        if name not in self.parts:
            runs = _runs(joint)
            pieces = self._cut(value, axis, [len(own) for own in runs], before)
            self.parts[name] = []
            for number in range(networks):
                mine = [n for n, own in enumerate(runs) if joint.parent[own[0]] in (number, SHARED)]
                order = np.concatenate([joint.source[runs[n]] for n in mine])
                if not np.array_equal(order, np.arange(len(order))):
                    raise ModelError(f"{title(before)}: the channels of {name!r} lie in another order side by side")
                self.parts[name].append(self._concat([pieces[n] for n in mine], axis, f"{name}@{number + 1}", before))
        return self.parts[name]

    def join(self, name: str, axis: int, joint: AxisMap, before: oir.Node) -> oir.Value:
        """The values of all networks as one, called `name`."""
        runs, pieces = _runs(joint), []
        cut = []
        for number, value in enumerate(self.parts[name]):
            own = [run for run in runs if joint.parent[run[0]] == number]
            cut.append(iter(self._cut(value, axis, [len(run) for run in own], before)))
        for run in runs:
            pieces.append(next(cut[int(joint.parent[run[0]])]))
        return self._concat(pieces, axis, name, before)

    def copies(self, node: oir.Node, given: Sequence[Sequence[oir.Value | None]], before: oir.Node) -> None:
        """A copy of `node`, one of a single network, for each network.

        Args:
            node: its constants become those of each network.
            given: for each network what the copy reads; constants are looked at no further.
            before: where the copies stand.
        """
        for output in node.outputs:
            self.parts[output.name or ""] = []
        for number, values in enumerate(given):
            inputs = [
                self._constant(own.name or "", number) if own is not None and own.const_value is not None else value
                for own, value in zip(node.inputs, values, strict=True)
            ]
            copy = oir.Node(
                node.domain,
                node.op_type,
                inputs,
                list(node.attributes.values()),
                num_outputs=len(node.outputs),
                name=f"{node.name or node.outputs[0].name}@{number + 1}",
            )
            for ours, output in zip(copy.outputs, node.outputs, strict=True):
                ours.name = f"{output.name}@{number + 1}" if output.name else ""
                ours.type = output.type
                self.parts[output.name or ""].append(ours)
            self._graph.insert_before(before, copy)

    def check_sizes(self, before: Sizes, after: Sizes) -> None:
        """Demand that a network's part is as large as its value was in that network.

        Raises:
            ModelError: it is not, since its size is computed from the channels of all networks.
        """
        for name, values in self.parts.items():
            for value in values:
                own = after.get(value.name or "")
                if own is not None and own != before.get(name, own):
                    raise ModelError(f"{name!r}: its size is computed from the channels of all networks")

    def mean(self, output: oir.Value, weights: Sequence[float]) -> oir.Value:
        """The weighted mean of the networks' values for an output of a single network, called as it is."""
        total: oir.Value | None = None
        for value, weight in zip(self.parts[output.name or ""], weights, strict=True):
            if value.dtype is None or not value.dtype.is_floating_point():
                raise ModelError(f"{output.name!r}: the networks' outputs have no mean, for they are no floats")
            factor = add_initializer(self._graph, f"{value.name}/weight", np.array(weight, value.dtype.numpy()))
            weighed = self._append("Mul", [value, factor], f"{value.name}/weighed")
            total = weighed if total is None else self._append("Add", [total, weighed], f"{weighed.name}/sum")
        assert total is not None
        total.name, total.shape, total.type = output.name, output.shape, output.type
        return total

    def _append(self, op: str, inputs: list[oir.Value], name: str) -> oir.Value:
        node = oir.Node("", op, inputs, name=name)
        node.outputs[0].name = name
        self._graph.append(node)
        return node.outputs[0]

    def _constant(self, name: str, number: int) -> oir.Value:
        """Each network's array; one for all where it holds sizes or a single number, for channels are not alike."""
        if name not in self._constants:
            arrays = self._arrays[name]
            alike = all(np.array_equal(array, arrays[0]) for array in arrays[1:])
            same = alike and (arrays[0].size == 1 or np.issubdtype(arrays[0].dtype, np.integer))
            found = arrays[:1] if same else arrays
            made = [add_initializer(self._graph, f"{name}@{n}", array) for n, array in enumerate(found, start=1)]
            self._constants[name] = made * (len(arrays) if same else 1)
        return self._constants[name][number]

    def _cut(self, value: oir.Value, axis: int, sizes: list[int], before: oir.Node) -> list[oir.Value]:
        if len(sizes) == 1:
            return [value]
        lengths = add_initializer(self._graph, f"{value.name}/parts", np.array(sizes, np.int64))
        node = oir.Node("", "Split", [value, lengths], [oir.AttrInt64("axis", axis)], num_outputs=len(sizes))
        node.name = f"{value.name}/Split"
        for number, output in enumerate(node.outputs):
            output.name, output.type = f"{value.name}/part{number + 1}", value.type
        self._graph.insert_before(before, node)
        return list(node.outputs)

    def _concat(self, values: list[oir.Value], axis: int, name: str, before: oir.Node) -> oir.Value:
        if len(values) == 1:
            return values[0]
        node = oir.Node("", "Concat", values, [oir.AttrInt64("axis", axis)], name=f"{name}/Concat")
        node.outputs[0].name, node.outputs[0].type = name, values[0].type
        self._graph.insert_before(before, node)
        return node.outputs[0]


def original_title(node: oir.Node) -> str:
    """How messages call a node, or the node of a single network that it is a copy of."""
    return re.sub(r"@\d+('?)$", r"\1", title(node))


def _runs(joint: AxisMap) -> list[np.ndarray]:
    """The indices of a joint axis, cut where the next is not the next one of the same network."""
    breaks = (np.diff(joint.parent) != 0) | (np.diff(joint.source) != 1)
    return np.split(np.arange(len(joint)), np.flatnonzero(breaks) + 1)
