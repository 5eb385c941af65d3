"""The networks of a zip beside each other as one: what they compute for a stem's values, joined space by space."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.compose import cut_out
from onnxmerge.ir.labels import dims
from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.spaces import Space, find_spaces
from onnxmerge.methods.task import Network
from onnxmerge.methods.zip.alignment import Cut, Sharable, stem_spaces
from onnxmerge.passes.channel_map import matching_spaces
from onnxmerge.passes.join_values import Joined, JoinValues


@dataclass(frozen=True)
class Union:
    """The networks up to a cut as one network, named as the reference names its values.

    Attributes:
        model: the joined network; its values are [reference's channels; the next network's; ...].
        names: the networks, in the order in which their channels lie.
        networks: the whole networks.
        whole: their channel spaces.
        stems: each network up to the cut.
        spaces: of the reference's stem, those whose channels can be mapped.
        theirs: by network and by our space, the space that stands for it.
        joined: by value, what it is made of.
    """

    model: oir.Model
    names: tuple[str, ...]
    networks: Mapping[str, oir.Model]
    whole: Mapping[str, Sequence[Space]]
    stems: Mapping[str, oir.Model]
    spaces: Sequence[Space]
    theirs: Mapping[str, Mapping[str, Space]]
    joined: Mapping[str, Joined]

    def columns(self, value: str, space: Space) -> np.ndarray:
        """[n, slots]: where the channels of all networks in a space lie in the joined `value`."""
        found, start = [], 0
        for network in self.names:
            own = self.theirs[network][space.name].value(self.joined[value].parts[network])
            assert own is not None
            found.append(start + own.index)
            start += self.size(network, value)
        return np.concatenate(found)

    def own(self, network: str, space: Space) -> slice:
        """Where one network's channels lie among those of all networks in a space."""
        sizes = [self.theirs[name][space.name].size for name in self.names]
        place = self.names.index(network)
        return slice(sum(sizes[:place]), sum(sizes[: place + 1]))

    def size(self, network: str, value: str) -> int:
        """Channels of one network's part of a joined value."""
        name = self.joined[value].parts[network]
        part = next(o for node in self.stems[network].graph for o in node.outputs if o.name == name)
        return dims(part)[self.joined[value].axis] or 0


def join_networks(sharable: Sharable, tasks: Sequence[Network], cut: Cut) -> Union:
    """Join the networks up to `cut`.

    Raises:
        ModelError: a network has no counterpart of one of the reference's spaces.
    """
    reference = sharable.reference
    stems = {task.name: cut_out(task.model, task.inputs, [cut.names[task.name]]) for task in tasks}
    own = stems[reference.name]
    spaces = stem_spaces(own)
    theirs: dict[str, dict[str, Space]] = {reference.name: {space.name: space for space in spaces}}
    for task in tasks:
        if task is not reference:
            found = find_spaces(stems[task.name], frozenset([cut.names[task.name]])).spaces
            theirs[task.name] = matching_spaces(spaces, found, sharable.partners[task.name].constants)
    axes = _channel_axes(own, spaces, cut.unit.cut)
    values = [Joined(name, _parts(sharable, tasks, name), axis) for name, axis in axes.items()]
    others = {task.name: stems[task.name] for task in tasks if task is not reference}
    model = JoinValues(reference.name, others, values)(own).model
    ordered = (reference.name, *others)
    networks = {task.name: task.model for task in tasks}
    whole = {name: find_spaces(network).spaces for name, network in networks.items()}
    return Union(model, ordered, networks, whole, stems, spaces, theirs, {value.name: value for value in values})


def _parts(sharable: Sharable, tasks: Sequence[Network], name: str) -> dict[str, str]:
    reference = sharable.reference
    ours = {reference.name: name}
    return ours | {t.name: sharable.partners[t.name].values[name] for t in tasks if t is not reference}


def _channel_axes(stem: oir.Model, spaces: Sequence[Space], end: str) -> dict[str, int]:
    """In order, what each layer and each residual sum of the stem computes up to `end`, and its channel axis."""
    made = {layer.linear.name: -1 if layer.op in ("Gemm", "MatMul") else 1 for layer in find_layers(stem)}
    carried = {slots.name: slots.axes[0] for space in spaces for slots in space.values if len(slots.axes) == 1}
    found = {}
    for node in stem.graph:
        for output in node.outputs:
            name = output.name or ""
            if name in made or (name in carried and (name == end or node.op_type in ("Add", "BatchNormalization"))):
                axis = carried.get(name, made.get(name, 1))
                found[name] = axis % len(dims(output))
    return found
