"""What the tests of gate share: networks side by side, and gates as onnxruntime is fed them."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as oir
from fusing import NETS
from graphs import Array, execute, feeds_for

from onnxmerge.passes.gate_places import OPEN, GatePlaces, find_gate_places
from onnxmerge.passes.insert_gates import InsertGates, gate_input
from onnxmerge.passes.widen import Widen

GATED = [name for name in NETS if name != "groups"]
"""Kinds of networks in which some channels can be gated."""


@dataclass
class Wide:
    networks: list[oir.Model]
    model: oir.Model
    places: GatePlaces


def wide(kind: str, count: int = 2, width: float | None = None) -> Wide:
    networks = [NETS[kind][0](seed) for seed in range(count)]
    model = Widen(networks[1:])(networks[0]).model
    return Wide(networks, model, find_gate_places(model, networks[0], count, width or 1 / count))


def gate_feeds(places: GatePlaces, gates: Array) -> dict[str, Array]:
    """The inputs of the network with gates inserted, for one vector [gates]."""
    feeds = {}
    for value in places.values:
        along = np.where(value.gate == OPEN, 1.0, gates[value.gate]).astype(np.float32)
        shape = [1] * value.rank
        shape[value.axis] = -1
        feeds[gate_input(value.name)] = along.reshape(shape)
    return feeds


def with_gates(own: Wide, gates: Array, batch: int = 3, feeds: dict[str, Array] | None = None) -> dict[str, Array]:
    """What onnxruntime makes of the widened network with these gates, of `feeds` or of random samples."""
    gated = InsertGates(own.places)(own.model).model
    return execute(gated, (feeds or feeds_for(own.model, batch=batch)) | gate_feeds(own.places, gates))
