"""What a candidate will look like: the merged graph with weights that are nobody's, before anything is fitted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as oir
from pydantic import BaseModel, ConfigDict

from onnxmerge.ir.labels import dims
from onnxmerge.ir.layers import find_layers, parameter_count
from onnxmerge.methods.task import Network
from onnxmerge.methods.zip.alignment import Cut, Sharable, find_sharable, stem_spaces
from onnxmerge.methods.zip.stems.tails import Stem, adapted_tail
from onnxmerge.methods.zip.stems.tree import Fork, Level
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


class Structure(Level):
    """Stems with private channels beside them, and every task's tail behind an adapter; weights are nobody's.

    Args:
        networks: of the level.
        sharable: what they have in common.
        widths: of this level's stem; below it stems are as wide as their first network.
    """

    def __init__(self, networks: Sequence[Network], sharable: Sharable, widths: Widths | None = None):
        super().__init__(networks, sharable)
        self._widths = widths or Widths()

    def split(self, cut: Cut) -> tuple[Stem, dict[str, oir.Model]]:
        """See `Level`.

        Raises:
            ModelError: a space cannot get another width.
        """
        widths = self._widths
        stem = stem_of(self.sharable, cut, widths.shared)
        shared = {s.name: s.size for s in stem_spaces(self.sharable.up_to(cut))} | dict(widths.shared)
        arriving, sides = stem, {}
        if widths.private:
            wider = {name: own + widths.private.get(name, 0) for name, own in shared.items()}
            arriving = stem_of(self.sharable, cut, wider)
            sides = {network.name: SplitOff(shared, stem)(arriving).model for network in self.networks}
        size, tails = dims(arriving.graph.outputs[0])[cut.axis] or 0, {}
        for network in self.networks:
            tails[network.name] = adapted_tail(network, cut, np.zeros((cut.size, size), np.float32))
        return Stem(stem, {}, sides), tails

    def below(self, group: Fork, stem: Stem | None, cut: Cut | None, tails: Mapping[str, oir.Model]) -> Level:
        """See `Level`."""
        networks = [replace(own, model=tails[own.name]) for own in self.networks if own.name in group.tasks]
        return Structure(networks, find_sharable(networks, group.cut))
