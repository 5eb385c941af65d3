"""Widen the body: networks whose bodies are of one architecture side by side, each with a head of its own (exact).

The head of a network is every layer whose outputs keep their place, as classes do, and all that follows; the body is
the rest. Bodies are put side by side as by `widen`. The head of network t reads the channels of all networks, through
weights that are zero but for its own:

    [0, ..., W_t, ..., 0] [f_1; ...; f_N] = W_t f_t

which is the weighted mean of `widen` with all weight on t, taken over networks that all have the head of t. So what
follows the body may differ between the networks in everything but what it reads.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.compose import cut_out
from onnxmerge.ir.correspond import Correspondence, correspond
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.ir.weights import get_array, set_array
from onnxmerge.passes.attach_tails import AttachTails
from onnxmerge.passes.roles import read_axis, title
from onnxmerge.passes.widen import Widen


class WidenBody(oir.passes.FunctionalPass):
    """Put the bodies of the model it is called on and of `others` side by side.

    Args:
        others: normalised models; by task, as the first one.
        task: of the model itself. The outputs of task T are called `T/output`, all names of its head begin with `T/`.
    """

    preserves = "exact"

    def __init__(self, others: Mapping[str, oir.Model], task: str):
        self.others, self.task = dict(others), task

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """The widened body, with the names of the model it is called on, and all heads.

        Raises:
            ModelError: the networks differ before their last layers, or cannot be put side by side.
        """
        networks = {self.task: model, **self.others}
        parts = _matched(model, list(self.others.values()))
        tails, reads = {}, {}
        body: oir.Model | None = None
        for number, (task, network) in enumerate(networks.items()):
            family = [parts[number].with_body_of(network, other) for other in parts]
            wide = Widen(family[1:], np.eye(len(family))[number].tolist())(family[0]).model
            cuts = parts[number].cuts
            reads[task] = [parts[number].of_first[name] for name in cuts]
            tails[task] = cut_out(wide, cuts, [value.name or "" for value in network.graph.outputs])
            if body is None:
                body, first = wide, wide
            _check_equal(first, wide, parts[number])
        assert body is not None
        through = list(dict.fromkeys(name for own in reads.values() for name in own))
        stem = cut_out(body, [value.name or "" for value in model.graph.inputs], through)
        return oir.passes.PassResult(AttachTails(tails, reads, shared="")(stem).model, modified=True)


class _Parts:
    """Body and head of one network, and what stands for what of the first's body.

    Attributes:
        cuts: the values of the body, and the inputs, that the head reads.
        of_first: what the values of the body are called in the first network.
        constants: the first network's constants that its body reads -> this one's.
    """

    def __init__(self, model: oir.Model, head: set[oir.Node], found: Correspondence, shared: set[str]):
        self.model = model
        self.of_first = {theirs: ours for ours, theirs in found.values.items()}
        inside = {value.name for node in head for value in node.outputs}
        arriving = [v for node in model.graph if node in head for v in node.inputs if v is not None]
        self.cuts = list(
            dict.fromkeys(v.name or "" for v in arriving if v.const_value is None and v.name not in inside)
        )
        self.constants = {ours: theirs for ours, theirs in found.constants.items() if ours in shared}

    def with_body_of(self, model: oir.Model, other: "_Parts") -> oir.Model:
        """A copy of this network, which is `model`, with the weights of the other's body."""
        copy = model.clone()
        for ours, theirs in self.constants.items():
            set_array(copy.graph.initializers[theirs], get_array(other.model.graph.initializers[other.constants[ours]]))
        return copy


def head_of(model: oir.Model) -> set[oir.Node]:
    """The layers whose outputs keep their place, and all that reads what they make."""
    carried = {slots.name for space in find_spaces(model).spaces for slots in space.values}
    head: set[oir.Node] = set()
    for node in model.graph:
        last = read_axis(node) is not None and node.outputs[0].name not in carried
        if last or any(value is not None and value.producer() in head for value in node.inputs):
            head.add(node)
    return head


def same_bodies(first: oir.Model, other: oir.Model) -> bool:
    """Whether two networks are of one architecture, whatever their heads are."""
    try:
        _matched(first, [other])
    except ModelError:
        return False
    return True


def _matched(model: oir.Model, others: Sequence[oir.Model]) -> list[_Parts]:
    heads = [head_of(own) for own in (model, *others)]
    body = [node for node in model.graph if node not in heads[0]]
    shared = {v.name or "" for node in body for v in node.inputs if v is not None and v.const_value is not None}
    own_names = {name: name for name in [v.name or "" for v in model.graph.inputs] + _made(body)}
    parts = [_Parts(model, heads[0], Correspondence(own_names, {name: name for name in shared}), shared)]
    for number, (other, head) in enumerate(zip(others, heads[1:], strict=True), start=2):
        start = f"network {number} is not of the same architecture as the first: "
        if len(other.graph.inputs) != len(model.graph.inputs):
            raise ModelError(f"{start}they have other numbers of inputs")
        found = correspond(model, other)
        reasons = {text.partition(": ")[0]: text for text in found.stopped}
        for node in body:
            name = f"{node.op_type} {node.name!r}"
            if any(value.name not in found.values for value in node.outputs) and _reads_values(node):
                raise ModelError(start + reasons.get(name, f"{name}: nothing like it"))
        theirs = {found.values[name] for name in _made(body) if name in found.values}
        for node in other.graph:
            if node not in head and _reads_values(node) and any(v.name not in theirs for v in node.outputs):
                raise ModelError(f"{start}the first has nothing like {title(node)}")
        parts.append(_Parts(other, head, found, shared))
    if any(not part.cuts for part in parts):
        raise ModelError("no layer makes what is a network's output, so there is no head to keep apart")
    return parts


def _made(nodes: Sequence[oir.Node]) -> list[str]:
    return [value.name or "" for node in nodes for value in node.outputs]


def _reads_values(node: oir.Node) -> bool:
    return any(value is not None and value.const_value is None for value in node.inputs)


def _check_equal(first: oir.Model, wide: oir.Model, parts: _Parts) -> None:
    """Demand that the arrays of two bodies are the same, those that stand once for each network too."""
    ours, theirs = first.graph.initializers, wide.graph.initializers
    for name, other in parts.constants.items():
        for made in (own for own in ours if own.partition("@")[0] == name):
            stands = theirs.get(f"{other}{made.removeprefix(name)}")
            if stands is None or not np.array_equal(get_array(ours[made]), get_array(stands)):
                raise ModelError(f"the heads read the channels of {name!r} in orders that do not agree")
