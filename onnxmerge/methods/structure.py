"""What a candidate will look like: the merged graph with weights that are nobody's, before anything is fitted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.compose import cut_out
from onnxmerge.ir.labels import dims
from onnxmerge.ir.layers import find_layers, parameter_count
from onnxmerge.ir.space import Space
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.methods.alignment import Cut, Sharable
from onnxmerge.methods.tails import Stem, own_tail
from onnxmerge.methods.task import Network
from onnxmerge.passes.attach_tails import AttachTails, bare_stem
from onnxmerge.passes.insert_adapter import InsertAdapter
from onnxmerge.passes.set_widths import SetWidths
from onnxmerge.passes.split_off import SplitOff


@dataclass(frozen=True)
class Size:
    """What a model takes. MACs are for one sample, None where a size is unknown."""

    parameters: int
    bytes: int
    """Of its arrays, each counted once."""
    macs: int | None


@dataclass(frozen=True)
class Widths:
    """Channels of a stem, by space."""

    shared: Mapping[str, int] = field(default_factory=dict)
    """How many are shared, where not as many as the reference has."""
    private: Mapping[str, int] = field(default_factory=dict)
    """How many more each task has for itself; none where nothing is said."""


def size_of(models: Sequence[oir.Model]) -> Size:
    """That of several models together."""
    layers = [layer.macs for model in models for layer in find_layers(model)]
    arrays = [value.const_value for model in models for value in model.graph.initializers.values()]
    return Size(
        sum(parameter_count(model) for model in models),
        sum(array.nbytes for array in arrays if array is not None),
        None if any(macs is None for macs in layers) else sum(macs or 0 for macs in layers),
    )


def stem_spaces(sharable: Sharable, cut: Cut) -> list[Space]:
    """The channel spaces of the stem up to `cut`, in the reference; whole blocks keep their place."""
    stem = cut_out(sharable.reference.model, sharable.reference.inputs, [cut.unit.cut])
    return [space for space in find_spaces(stem, frozenset([cut.unit.cut])).permutable() if not space.blocks]


def stem_of(sharable: Sharable, cut: Cut, channels: Mapping[str, int]) -> oir.Model:
    """The reference's stem with other numbers of channels in some spaces, whose weights are nobody's.

    Raises:
        ModelError: a space cannot get another width.
    """
    stem = cut_out(sharable.reference.model, sharable.reference.inputs, [cut.unit.cut])
    return SetWidths(channels, cut.axis)(stem).model


def merged_structure(sharable: Sharable, tasks: Sequence[Network], cut: Cut | None, widths: Widths) -> oir.Model:
    """A stem up to `cut`, or none, private channels beside it, and every task's tail behind an adapter."""
    if cut is None:
        return AttachTails({task.name: task.model for task in tasks})(bare_stem(tasks[0].model)).model
    stem = stem_of(sharable, cut, widths.shared)
    shared = {space.name: space.size for space in stem_spaces(sharable, cut)} | dict(widths.shared)
    arriving, sides = stem, {}
    if widths.private:
        arriving = stem_of(sharable, cut, {name: own + widths.private.get(name, 0) for name, own in shared.items()})
        sides = {task.name: SplitOff(shared, stem)(arriving).model for task in tasks}
    size, tails = dims(arriving.graph.outputs[0])[cut.axis] or 0, {}
    for task in tasks:
        tail = own_tail(task, cut).clone()
        own = dims(tail.graph.inputs[0])[cut.axis] or 0
        InsertAdapter(cut.axis, np.zeros((own, size), np.float32), "adapted")(tail)
        tails[task.name] = tail
    return Stem(stem, {}, sides).attach(tails)
