"""Steps and stages: a network as a row of layers and residual blocks, grouped by where they work.

A *step* is a unit between two cuts (see `units`) with what decides which step of another network can stand for it. A
*stage* is a run of steps of one sort: blocks that write to one channel space, layers that keep one spatial resolution
(dense layers have none). So stages come from the graph, not from names.
"""

from dataclasses import dataclass

import onnx_ir as oir

from onnxmerge.ir.concrete import with_sizes
from onnxmerge.ir.labels import dims
from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.spaces import Space, find_spaces
from onnxmerge.ir.units import find_units

CONVOLUTIONS = ("Conv", "ConvTranspose")

_RESAMPLED = 1.6
"""Spatial sizes further apart than this factor were strided, pooled or resized; an unpadded kernel takes off less."""


@dataclass(frozen=True)
class Step:
    """One hidden layer or block of a network."""

    name: str
    kind: str
    """`conv` when it holds a convolution, else `dense`."""
    block: bool
    """Whether it holds several layers that cannot be separated, such as a residual block."""
    cut: str
    """Name of the value that ends it: the pre-activation of a layer, the sum of a residual block."""
    layers: tuple[str, ...]
    stage: int
    """Number of its stage, from 0, in the order of the network."""
    width: int
    """Channels of the cut; 0 where its shape is unknown."""
    axis: int
    """The cut's channel axis, from 0."""


@dataclass(frozen=True)
class _Place:
    """Where a step's cut lies."""

    kind: str
    block: bool
    spaces: tuple[str, ...]
    spatial: tuple[int | None, ...]

    def same_stage(self, before: "_Place") -> bool:
        """Whether it belongs to the stage of the step before it."""
        if (self.kind, self.block) != (before.kind, before.block):
            return False
        if self.block:
            return self.spaces == before.spaces
        return self.kind == "dense" or _same_resolution(self.spatial, before.spatial)


def find_steps(model: oir.Model) -> list[Step]:
    """The steps of a normalised model in order; the head after the last cut is none."""
    convolutions = {layer.name for layer in find_layers(model) if layer.op in CONVOLUTIONS}
    spaces = find_spaces(model).spaces
    values = {o.name or "": o for node in with_sizes(model).graph for o in node.outputs}
    steps: list[Step] = []
    before: _Place | None = None
    for unit in find_units(model):
        kind = "conv" if convolutions.intersection(unit.layers) else "dense"
        block = unit.kind == "block"
        sizes = dims(values[unit.cut])
        axis = _channel_axis(unit.cut, spaces, kind, len(sizes))
        carriers = tuple(space.name for space in spaces if space.value(unit.cut) is not None)
        place = _Place(kind, block, carriers, sizes[2:])
        stage = 0 if before is None else steps[-1].stage + (not place.same_stage(before))
        width = (sizes[axis] if sizes else None) or 0
        steps.append(Step(unit.name, kind, block, unit.cut, unit.layers, stage, width, axis))
        before = place
    return steps


def _channel_axis(value: str, spaces: tuple[Space, ...], kind: str, rank: int) -> int:
    """The axis on which the spaces of `value` lie; where they lie on none or several, the operators' own."""
    axes = {slots.axes for space in spaces if (slots := space.value(value)) is not None}
    if len(axes) == 1 and len(found := axes.pop()) == 1:
        return found[0]
    return 1 if kind == "conv" else max(rank - 1, 0)


def _same_resolution(first: tuple[int | None, ...], second: tuple[int | None, ...]) -> bool:
    """Whether two rows of spatial sizes differ by no more than unpadded kernels make them; unknown sizes agree."""
    if len(first) != len(second):
        return False
    return all(
        a is None or b is None or max(a, b) <= _RESAMPLED * min(a, b) for a, b in zip(first, second, strict=True)
    )
