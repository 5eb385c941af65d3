"""What a candidate will look like: the merged graph with weights that are nobody's, before anything is fitted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as oir
from pydantic import BaseModel, ConfigDict

from onnxmerge.ir.labels import dims
from onnxmerge.ir.layers import find_layers, parameter_count
from onnxmerge.methods.alignment import Cut, Sharable, stem_spaces
from onnxmerge.methods.tails import Stem, own_tail
from onnxmerge.methods.task import Network
from onnxmerge.passes.attach_tails import unshared
from onnxmerge.passes.fold_adapter import FoldAdapter
from onnxmerge.passes.insert_adapter import InsertAdapter
from onnxmerge.passes.set_widths import SetWidths
from onnxmerge.passes.split_off import SplitOff


class Size(BaseModel):
    """What a model takes. MACs are for one sample, None where a size is unknown."""

    model_config = ConfigDict(extra="forbid")

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
        parameters=sum(parameter_count(model) for model in models),
        bytes=sum(array.nbytes for array in arrays if array is not None),
        macs=None if any(macs is None for macs in layers) else sum(macs or 0 for macs in layers),
    )


def stem_of(sharable: Sharable, cut: Cut, channels: Mapping[str, int]) -> oir.Model:
    """The reference's stem with other numbers of channels in some spaces, whose weights are nobody's.

    Raises:
        ModelError: a space cannot get another width.
    """
    return SetWidths(channels, cut.axis)(sharable.up_to(cut)).model


def merged_structure(sharable: Sharable, tasks: Sequence[Network], cut: Cut | None, widths: Widths) -> oir.Model:
    """A stem up to `cut`, or none, private channels beside it, and every task's tail, behind an adapter if need be."""
    if cut is None:
        return unshared({task.name: task.model for task in tasks})
    stem = stem_of(sharable, cut, widths.shared)
    shared = {space.name: space.size for space in stem_spaces(sharable.up_to(cut))} | dict(widths.shared)
    arriving, sides = stem, {}
    if widths.private:
        arriving = stem_of(sharable, cut, {name: own + widths.private.get(name, 0) for name, own in shared.items()})
        sides = {task.name: SplitOff(shared, stem)(arriving).model for task in tasks}
    size, tails = dims(arriving.graph.outputs[0])[cut.axis] or 0, {}
    for task in tasks:
        tail = own_tail(task, cut).clone()
        own = dims(tail.graph.inputs[0])[cut.axis] or 0
        InsertAdapter(cut.axis, np.zeros((own, size), np.float32), "adapted")(tail)
        if not cut.adapted:
            tail = FoldAdapter("adapted")(tail).model
        tails[task.name] = tail
    return Stem(stem, {}, sides).attach(tails)
