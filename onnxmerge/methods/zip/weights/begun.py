"""Go on from a merged model of weights mode: what it holds of each task, read back from its arrays.

Zippering (Chou et al. 2019, section 3.2) takes turns: one more layer is shared, the whole model is calibrated, and the
next round starts from there. So the model that shares the first k units is all that is needed for those behind, and a
run that was stopped goes on from the last one on disk.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.load import read
from onnxmerge.ir.space import Space
from onnxmerge.ir.stored import store_once
from onnxmerge.ir.weights import add_initializer, get_array, set_array
from onnxmerge.methods.task import Task
from onnxmerge.methods.zip.alignment import Cut, Sharable
from onnxmerge.methods.zip.fictive import with_fictive
from onnxmerge.methods.zip.stems.tails import own_tail
from onnxmerge.methods.zip.weights.plan import Counts, find_extent, is_whole, with_counts
from onnxmerge.passes.stack_tasks import read_streams

LOST_NAMES = "onnxmerge.lost_names"
"""Metadata property: a JSON object of the names of initializers that are stored under another one's, as equals."""
ORDER = "__order"
"""How the name of the indices ends by which a task's tail picks its channels."""


@dataclass(frozen=True)
class Begun:
    """A merged model whose first `units` units are shared.

    Attributes:
        units: k.
        counts: how many neurons of their spaces are shared; of those not mentioned all are.
        model: the model.
        tasks: the originals, with the fictive neurons that they have in it.
        sharable: what these have in common.
    """

    units: int
    counts: Counts
    model: oir.Model
    tasks: Sequence[Task]
    sharable: Sharable


@dataclass(frozen=True)
class SoFar:
    """One task in a merged model: the original with the arrays it has there.

    Attributes:
        stem: its layers up to the cut, with the reference's graph and names and in the merged channel order.
        task: the original; behind the cut its arrays are those of the merged model.
        order: [channels of the cut]: the task's own channel at each place.
    """

    stem: oir.Model
    task: Task
    order: np.ndarray


def lost_names(model: oir.Model) -> dict[str, str]:
    """For each initializer that `save` will not store, as it equals an earlier one, that one's name."""
    stored = model.clone()
    store_once(stored)
    return {
        value.name or "": kept.name or ""
        for node, other in zip(model.graph, stored.graph, strict=True)
        for value, kept in zip(node.inputs, other.inputs, strict=True)
        if value is not None and kept is not None and value.name != kept.name
    }


def read_candidate(path: str | os.PathLike[str]) -> oir.Model:
    """A candidate on disk, its initializers under all their names.

    Raises:
        UsageError, ModelError: it cannot be read.
    """
    model = read(path)
    for name, kept in json.loads(model.metadata_props.get(LOST_NAMES, "{}")).items():
        add_initializer(model.graph, name, get_array(model.graph.initializers[kept]))
    return model


def read_tasks(begun: Begun, until: str, *, depthwise: bool) -> tuple[Cut | None, dict[str, SoFar]]:
    """What a merged model holds of each task, and where its shared part ends; nothing where it shares none.

    Args:
        begun: the model.
        until: the tasks get the fictive neurons that sharing up to this cut takes.
        depthwise: see `WeightSharing`.
    """
    extent = find_extent(begun.sharable, begun.units, depthwise=depthwise)
    if extent.cut is None or extent.stem is None:
        return None, {}
    stem, cut = extent.stem, extent.cut
    extent = with_counts(extent, begun.counts, depthwise=depthwise)
    stems = {task.name: stem.clone() for task in begun.tasks}
    read_streams(begun.model, stems, {name: part for name, part in extent.parts.items() if not is_whole(part)})
    found = [_own(begun.model, task, cut) for task in begun.tasks]
    wide = with_fictive([task for task, _ in found], until)
    return cut, {task.name: SoFar(stems[task.name], task, order) for task, (_, order) in zip(wide, found, strict=True)}


def _own(merged: oir.Model, task: Task, cut: Cut) -> tuple[Task, np.ndarray]:
    model, arrays = task.model.clone(), merged.graph.initializers
    for name in own_tail(task, cut).graph.initializers:
        set_array(model.graph.initializers[name], get_array(arrays[f"{task.name}/{name}"]))
    picked = arrays.get(f"{task.name}/{cut.names[task.name]}{ORDER}")
    order = np.arange(cut.size) if picked is None else np.argsort(get_array(picked))
    return replace(task, model=model), order


def orders_of(spaces: Sequence[Space], cut: Cut, order: np.ndarray) -> dict[str, np.ndarray]:
    """The order of the channels of each space that lies in the value of a cut."""
    found = {}
    for space in spaces:
        slots = space.value(cut.unit.cut)
        if slots is not None and slots.axes == (cut.axis,):
            places = slots.index[:, 0]
            channels = np.empty(cut.size, int)
            channels[places] = np.arange(space.size)
            found[space.name] = channels[order[places]]
    return found
