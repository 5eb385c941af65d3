"""Stem units: the places where a network can be cut in two, and the layers or blocks between them.

A *cut* is a pre-activation (a layer's output before its nonlinearity, or the sum that ends a residual block) through
which everything flows: no other computed value crosses from the nodes before it to the nodes after it.
"""

from dataclasses import dataclass

import onnx_ir as oir

from onnxmerge.ir.layers import Layer, find_layers


@dataclass(frozen=True)
class Unit:
    """What lies between one cut and the next: a single layer, or a block whose layers cannot be separated."""

    name: str
    kind: str
    """`layer` or `block`."""
    cut: str
    """Name of the value that ends the unit."""
    layers: tuple[str, ...]


def find_units(model: oir.Model) -> list[Unit]:
    """The units of a normalised model in order; what follows the last cut is the head and belongs to no unit."""
    layers = find_layers(model)
    narrow = _narrow_values(model)
    ends = {_linear_end(layer).name for layer in layers} | _sums(model)
    layer_of = {node.name: layer.name for layer in layers for node in [layer.node]}
    units: list[Unit] = []
    inside: list[str] = []
    remaining = len(layers)
    for node in model.graph:
        if node.name in layer_of:
            inside.append(layer_of[node.name])
            remaining -= 1
        ended = next((o.name for o in node.outputs if o.name in narrow and o.name in ends), None)
        if ended is not None and inside and remaining:
            kind = "layer" if len(inside) == 1 else "block"
            units.append(Unit(_common_name(inside), kind, ended, tuple(inside)))
            inside = []
    return units


def _linear_end(layer: Layer) -> oir.Value:
    """Where a layer's linear part ends: behind a batch norm, but before a norm that measures each sample."""
    measured = layer.norm is not None and layer.norm.op_type != "BatchNormalization"
    return layer.linear if measured else layer.pre_activation


def _narrow_values(model: oir.Model) -> set[str]:
    """Computed values that alone are alive right after they are made: everything later depends on them only.

    One sweep over the nodes in topological order, keeping how many live values there are.
    """
    last_use: dict[oir.Value, int] = {}
    nodes = list(model.graph)
    for position, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None and value.const_value is None:
                last_use[value] = position
    for output in model.graph.outputs:
        last_use[output] = len(nodes)
    alive = {value for value in model.graph.inputs if value in last_use}
    narrow = set()
    for position, node in enumerate(nodes):
        alive |= {value for value in node.outputs if value in last_use}
        alive -= {v for v in node.inputs if v is not None and last_use.get(v) == position}
        if len(alive) == 1 and node.outputs[0] in alive and node.outputs[0] not in model.graph.outputs:
            narrow.add(node.outputs[0].name or "")
    return narrow


def _sums(model: oir.Model) -> set[str | None]:
    """Outputs of every Add of two computed values."""
    return {
        node.outputs[0].name
        for node in model.graph
        if node.op_type == "Add" and all(v is not None and v.const_value is None for v in node.inputs)
    }


def _common_name(names: list[str]) -> str:
    """What the names of a unit's layers have in common, e.g. "layer1.0"."""
    if len(names) == 1:
        return names[0]
    parts = [name.replace("/", ".").split(".") for name in names]
    common = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return ".".join(common) or f"{names[0]}..{names[-1]}"
