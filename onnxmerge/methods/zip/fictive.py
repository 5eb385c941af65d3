"""Networks of unequal widths with fictive neurons and inputs, so that in weights mode they share like equal ones.

Only the spaces of the layers that are shared get them: what a task keeps for itself stays as large as it was.
Source: He, Zhou and Thiele, Multi-Task Zipping, 2018, section 3.4.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import onnx_ir as oir

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.compose import cut_out, value_names
from onnxmerge.ir.correspond import correspond
from onnxmerge.ir.labels import dims
from onnxmerge.ir.spaces import Space, find_spaces
from onnxmerge.methods.task import Network
from onnxmerge.methods.zip.alignment import Sharable, find_sharable
from onnxmerge.passes.add_fictive import AddFictive
from onnxmerge.passes.pad_inputs import AddFictiveInputs, Padding, PadInputs

AnyNetwork = TypeVar("AnyNetwork", bound=Network)


def with_fictive(networks: Sequence[AnyNetwork], until: str | None = None) -> list[AnyNetwork]:
    """Bring the spaces that all networks have to the width that the widest of them has there.

    Args:
        networks: the reference first.
        until: only the spaces of the layers up to this value of the reference, a cut.

    Returns:
        The networks themselves where no widths differ, or where one of them cannot get more channels.

    Raises:
        UsageError: their inputs differ in more than the number of channels, or what reads these cannot have more.
    """
    networks = _with_fictive_inputs(networks)
    reference, *others = networks
    found = [correspond(reference.model, other.model, same_sizes=False) for other in others]
    scope = reference.model if until is None else cut_out(reference.model, reference.inputs, [until])
    ours, *theirs = (_lying(network.model) for network in networks)
    widths: list[dict[str, int]] = [{} for _ in networks]
    for value in value_names(scope):
        if any(value not in match.values for match in found):
            continue
        own = [ours.get(value, []), *(lying.get(m.values[value], []) for lying, m in zip(theirs, found, strict=True))]
        if len({len(spaces) for spaces in own}) == 1:
            for same in zip(*own, strict=True):
                width = max(space.size for space in same)
                for wanted, space in zip(widths, same, strict=True):
                    wanted.setdefault(space.name, width)
    try:
        return [_padded(network, wanted) for network, wanted in zip(networks, widths, strict=True)]
    except ModelError:
        return list(networks)


def find_sharable_of_any_width(networks: Sequence[Network]) -> Sharable:
    """What networks have in common once they have all fictive neurons that they can."""
    wide = with_fictive(networks)
    sharable = find_sharable(wide)
    sharable.fictive = any(one is not other for one, other in zip(wide, networks, strict=True))
    return sharable


def sized_for(tasks: Sequence[AnyNetwork], sharable: Sharable, units: int) -> tuple[list[AnyNetwork], Sharable]:
    """The networks with the fictive neurons that sharing so many units takes, and what these have in common.

    Args:
        tasks: as they are.
        sharable: from `find_sharable_of_any_width`.
        units: k.
    """
    if units == 0 or not sharable.fictive:
        return list(tasks), sharable
    wide = with_fictive(tasks, sharable.cuts[units - 1].unit.cut)
    return wide, find_sharable(wide)


def with_own_inputs(task: AnyNetwork) -> AnyNetwork:
    """The network that takes its own samples as they are."""
    if not task.paddings:
        return task
    return replace(task, model=PadInputs(task.paddings)(task.model.clone()).model, paddings={})


def _with_fictive_inputs(networks: Sequence[AnyNetwork]) -> list[AnyNetwork]:
    """Bring the inputs of all networks to the size that is largest among them."""
    found = list(networks)
    for number in range(len(networks[0].inputs)):
        shapes = [dims(network.model.graph.inputs[number]) for network in networks]
        axes = [axis for axis in range(len(shapes[0])) if len({shape[axis] for shape in shapes}) > 1]
        if axes:
            sizes = [shape[axes[0]] for shape in shapes]
            if axes == [0] or len(axes) > 1 or None in sizes:
                raise UsageError(f"the networks' inputs differ in more than one number of channels: {_told(networks)}")
            most = max(size or 0 for size in sizes)
            paddings = [Padding(axes[0], most - (size or 0)) for size in sizes]
            found = [_with_fictive_input(one, number, p) for one, p in zip(found, paddings, strict=True)]
    return found


def _with_fictive_input(network: AnyNetwork, number: int, padding: Padding) -> AnyNetwork:
    name = network.inputs[number]
    if not padding.zeros:
        return replace(network, paddings={**network.paddings, name: padding})
    try:
        model = AddFictiveInputs(name, padding)(network.model).model
    except ModelError as error:
        raise UsageError(
            f"{network.path}: its input {name!r} cannot get the channels of the others: {error}"
        ) from error
    return replace(network, model=model, paddings={**network.paddings, name: padding})


def _told(networks: Sequence[Network]) -> str:
    return ", ".join(
        f"{network.name} reads {' and '.join(str(list(dims(value))) for value in network.model.graph.inputs)}"
        for network in networks
    )


def _lying(model: oir.Model) -> dict[str, list[Space]]:
    """By value the spaces that lie in it, in the order of their first channels."""
    found: dict[str, list[tuple[tuple[tuple[int, ...], int], Space]]] = {}
    for space in find_spaces(model).permutable():
        for slots in [] if space.blocks else space.values:
            found.setdefault(slots.name, []).append(((slots.axes, int(slots.index.min())), space))
    return {name: [space for _, space in sorted(own, key=lambda one: one[0])] for name, own in found.items()}


def _padded(network: AnyNetwork, widths: dict[str, int]) -> AnyNetwork:
    result = AddFictive(widths)(network.model)
    return replace(network, model=result.model) if result.modified else network
