"""What zip shares in weights mode: for each channel space how many neurons, and so which part of each weight."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import UsageError
from onnxmerge.ir.layers import Layer, find_layers
from onnxmerge.ir.spaces import Space
from onnxmerge.ir.weights import get_array, is_float
from onnxmerge.methods.task import Network
from onnxmerge.methods.zip.alignment import Cut, Sharable
from onnxmerge.passes.roles import read_axis
from onnxmerge.passes.stack_tasks import by_row
from onnxmerge.passes.weight_parts import Part

Counts = Mapping[str, int]
"""Space name -> number of shared neurons. Spaces that are not mentioned share none; inputs are always shared."""
Share = int | Counts
"""What is shared: the first k units wholly, or so many neurons of each space."""


@dataclass(frozen=True)
class Extent:
    """How far the sharing goes.

    Attributes:
        cut: the last cut of the shared part; None where nothing is shared.
        stem: the reference's network up to there.
        spaces: those of `stem`.
        counts: shared neurons of each space.
        parts: for the weights of `stem` that are shared, the shared neurons when those of each space come first.
    """

    cut: Cut | None
    stem: oir.Model | None
    spaces: list[Space]
    counts: Counts
    parts: dict[str, Part]


def find_extent(sharable: Sharable, share: Share, *, depthwise: bool = False) -> Extent:
    """What a plan means for the networks.

    Args:
        sharable: the networks.
        share: the plan.
        depthwise: share depthwise convolutions too, where their whole space is shared.

    Raises:
        UsageError: there are not so many units, no such space, or fewer neurons in it.
    """
    deepest = len(sharable.cuts)
    if isinstance(share, int):
        if not 0 <= share <= deepest:
            raise UsageError(f"cannot share {share} units: these networks can share at most {deepest}")
        deepest = share
    counts = _count_units(sharable, share) if isinstance(share, int) else _checked(sharable, share)
    for cut in reversed(sharable.cuts[:deepest]):
        stem = sharable.up_to(cut)
        spaces = [_inside(space, stem) for space in sharable.spaces]
        parts = _parts(stem, spaces, counts, depthwise)
        if any(name in parts for name in cut.unit.layers):
            return Extent(cut, stem, spaces, counts, parts)
    return Extent(None, None, [], counts, {})


def with_counts(extent: Extent, counts: Counts, *, depthwise: bool = False) -> Extent:
    """The same stem with other numbers of shared neurons in some spaces."""
    assert extent.stem is not None
    counts = {**extent.counts, **counts}
    return replace(extent, counts=counts, parts=_parts(extent.stem, extent.spaces, counts, depthwise))


def _count_units(sharable: Sharable, k: int) -> Counts:
    """Every neuron that the first k units make."""
    stem = None if k == 0 else sharable.up_to(sharable.cuts[k - 1])
    made = {output.name for node in stem.graph for output in node.outputs} if stem is not None else set()
    return {space.name: space.size for space in sharable.spaces if any(slots.name in made for slots in space.values)}


def _checked(sharable: Sharable, counts: Counts) -> Counts:
    sizes = {space.name: space.size for space in sharable.spaces}
    for name, count in counts.items():
        if not 0 <= count <= sizes.get(name, 0):
            known = f"it has {sizes[name]} neurons" if name in sizes else f"the spaces are {', '.join(sizes)}"
            raise UsageError(f"cannot share {count} neurons of the space {name!r}: {known}")
    return counts


def predicted_bytes(tasks: Sequence[Network], sharable: Sharable, share: Share, *, depthwise: bool = False) -> int:
    """Bytes of the merged model's floating-point arrays when this is shared, biases apart."""
    extent = find_extent(sharable, share, depthwise=depthwise)
    arrays = [v for task in tasks for v in task.model.graph.initializers.values() if is_float(v)]
    total = sum(get_array(value).nbytes for value in arrays)
    for layer in [] if extent.stem is None else find_layers(extent.stem):
        part = extent.parts.get(layer.name)
        if part is not None:
            common = part.reads.mean() * part.makes.mean()
            total -= (len(tasks) - 1) * round(common * get_array(layer.weight).nbytes)
    return total


def is_whole(part: Part) -> bool:
    """Whether the part is all of the weight."""
    return bool(part.reads.all() and part.makes.all())


def is_depthwise(layer: Layer) -> bool:
    """Whether the layer has a group for each channel that it reads."""
    return layer.op == "Conv" and layer.groups > 1 and layer.weight_shape[1] == 1


def shared_rows(layer: Layer, part: Part | None, bias: bool) -> np.ndarray:
    """[fan in + 1] which rows of the layer's weight matrix are shared; the last is the bias."""
    if part is None:
        fan_in = math.prod(layer.weight_shape) // layer.out_channels
        return np.zeros(fan_in + 1, bool)
    kernel = math.prod(layer.weight_shape[2:])
    return np.append(np.repeat(part.reads, kernel), bias)


def _inside(space: Space, stem: oir.Model) -> Space:
    """The space where it lies in a stem."""
    made = {output.name for node in stem.graph for output in node.outputs}
    return replace(
        space,
        weights=tuple(slots for slots in space.weights if slots.name in stem.graph.initializers),
        values=tuple(slots for slots in space.values if slots.name in made),
    )


def _parts(stem: oir.Model, spaces: Sequence[Space], counts: Counts, depthwise: bool) -> dict[str, Part]:
    found = {layer.name: part for layer in find_layers(stem) if (part := _part(layer, spaces, counts)) is not None}
    for layer in find_layers(stem):
        if layer.groups > 1 and layer.name in found:  # the channels of a group keep together
            allowed = depthwise or not is_depthwise(layer)
            if not allowed or not is_whole(found[layer.name]):
                del found[layer.name]
    return found


def _part(layer: Layer, spaces: Sequence[Space], counts: Counts) -> Part | None:
    axis = read_axis(layer.node)
    if axis is None or layer.op == "ConvTranspose" or not by_row(layer.node):
        return None
    sizes = layer.weight_shape
    part = Part(np.ones(sizes[axis], bool), np.ones(sizes[1 - axis], bool))
    for space in spaces:
        for slots in space.weights:
            private = slots.index[counts.get(space.name, 0) :].ravel()
            if slots.name == layer.name and private.size:
                if slots.axes not in ((0,), (1,)):
                    return None
                (part.reads if slots.axes == (axis,) else part.makes)[private] = False
    return part if part.reads.any() and part.makes.any() else None
