"""Balance depth: bring two networks whose steps are aligned to the same number of steps.

`pairs` says which step of the shallower network does the job of which step of the deeper one; the steps of the deeper
network that are left over have no counterpart. Either one is *added* for each of them to the shallower network: a copy
of the deeper network's own operators that changes nothing (exact, `InsertLike`); or each is *collapsed* into the layer
behind it (approximate, `Collapse`). Afterwards both networks match node by node; widths may differ.

Where a copy goes: between two steps lie activations, pooling, a flatten. Let A be those before the deeper network's
unmatched step and B those behind the place in the shallower network. B begins with A; the copy goes behind that part of
B, and the activation of A is applied once more behind the copy when the deeper network has one there. So a layer that
stands before a pooling is added before it, and one that stands behind it, behind.

Source: CLAFusion (Nguyen et al.), section 3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import onnx_ir as oir

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.correspond import correspond
from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.stages import Step, find_steps
from onnxmerge.passes.collapse import Collapse, Estimate, find_signs
from onnxmerge.passes.identity_piece import ACTIVATIONS
from onnxmerge.passes.insert_like import InsertLike
from onnxmerge.runtime.activations import Samples


@dataclass(frozen=True)
class Balanced:
    """Two networks that match node by node, and their steps in order, (of the deeper, of the shallower)."""

    deep: oir.Model
    shallow: oir.Model
    pairs: tuple[tuple[Step, Step], ...]


def balance(
    deep: oir.Model,
    shallow: oir.Model,
    pairs: Sequence[tuple[Step, Step]],
    how: Literal["add", "collapse"] = "add",
    *,
    samples: Samples | None = None,
    estimate: Estimate = "sign-of-sum",
    threads: int | None = None,
) -> Balanced:
    """Give both networks the same steps; the arguments stay as they are.

    Args:
        deep, shallow: normalised networks, norms folded where they can be, every layer with a bias.
        pairs: (step of `deep`, step of `shallow`), strictly increasing in both; every step of `shallow` is in one.
        how: add to the shallower network, or collapse in the deeper.
        samples: feeds of `deep`, for the signs that collapsing needs; taken anew after each step that is collapsed.
        estimate: see `Collapse`.
        threads: of onnxruntime.

    Raises:
        UsageError: the pairs are no such map, or samples are missing.
        ModelError: a step can be neither added nor collapsed, or the networks differ in more than their depth.
    """
    steps = find_steps(deep)
    _check_map(steps, find_steps(shallow), pairs)
    deep, shallow = deep.clone(), shallow.clone()
    if how == "add":
        _add(deep, steps, shallow, {a.cut: b for a, b in pairs})
    elif samples is None:
        raise UsageError("collapsing layers needs samples to estimate their signs from")
    else:
        matched = {a.cut for a, _ in pairs}
        _collapse(deep, [step for step in steps if step.cut not in matched], samples, estimate, threads)
    return Balanced(deep, shallow, _match(deep, shallow))


def _check_map(deep: Sequence[Step], shallow: Sequence[Step], pairs: Sequence[tuple[Step, Step]]) -> None:
    places = {step.cut: place for place, step in enumerate(deep)}
    unknown = [a.name for a, _ in pairs if a.cut not in places]
    if unknown:
        raise UsageError(f"the deeper network has no step {unknown[0]!r}")
    if [b.cut for _, b in pairs] != [step.cut for step in shallow]:
        raise UsageError("every step of the shallower network must have its partner, in the order of the network")
    crossed = next((b for a, b in pairwise(a for a, _ in pairs) if places[a.cut] >= places[b.cut]), None)
    if crossed is not None:
        raise UsageError(f"{crossed.name!r} has a partner behind that of a later step: the map must increase")


def _add(deep: oir.Model, steps: Sequence[Step], shallow: oir.Model, partner: dict[str, Step]) -> None:
    """Add to `shallow` a counterpart for each of the `steps` of `deep` that has no partner there."""
    prefix = _free_prefix(shallow)
    cut: str | None = None
    for before, step in zip([None, *steps], steps, strict=False):
        if step.cut in partner:
            cut = partner[step.cut].cut
            continue
        if before is None or cut is None:
            raise ModelError(
                f"no step can be added for {step.name!r}: the first steps of both networks must be partners"
            )
        lead, place = _between(deep, before.cut), _between(shallow, cut)
        if [node.op_type for node in lead] != [node.op_type for node in place[: len(lead)]]:
            raise ModelError(
                f"no step can be added for {step.name!r}: {_list(lead)} lies before it, but {_list(place)} behind "
                f"{cut!r} in the other network"
            )
        entry = lead[-1].outputs[0].name if lead else before.cut
        after = (place[len(lead) - 1].outputs[0].name if lead else None) or cut
        follows = _between(deep, step.cut)[:1]
        again = any(f.op_type in ACTIVATIONS and f.op_type in [node.op_type for node in lead] for f in follows)
        name = f"{prefix}/{step.name}"
        InsertLike(after, _nodes(deep, entry or "", step.cut), again=again, name=name)(shallow)
        cut = f"{name}/end"


def _between(model: oir.Model, cut: str) -> list[oir.Node]:
    """The nodes behind `cut` in a row, up to the first layer or the first value that several nodes read."""
    layers = {layer.node for layer in find_layers(model)}
    value = next(v for node in model.graph for v in node.outputs if v.name == cut)
    found: list[oir.Node] = []
    while len(value.uses()) == 1 and not value.is_graph_output():
        ((node, _),) = value.uses()
        if node in layers or sum(v is not None and v.const_value is None for v in node.inputs) > 1:
            break
        found.append(node)
        value = node.outputs[0]
    return found


def _nodes(model: oir.Model, entry: str, cut: str) -> list[oir.Node]:
    """The nodes that make `cut` from `entry`, in the order of the graph."""
    wanted, found = {cut}, []
    for node in reversed(model.graph):
        if any(value.name in wanted for value in node.outputs):
            found.append(node)
            read = {v.name or "" for v in node.inputs if v is not None and v.const_value is None}
            wanted |= read - {entry}
    return found[::-1]


def _collapse(
    model: oir.Model, steps: Sequence[Step], samples: Samples, estimate: Estimate, threads: int | None
) -> None:
    for step in steps:
        if step.block:
            raise ModelError(f"{step.name!r} is a block of several layers: only single layers can be collapsed")
        (layer,) = step.layers
        Collapse(layer, find_signs(model, layer, samples, threads=threads), estimate)(model)


def _match(deep: oir.Model, shallow: oir.Model) -> tuple[tuple[Step, Step], ...]:
    """The steps of two networks that match node by node, paired.

    Raises:
        ModelError: they do not match; the message names the first node without partner.
    """
    counts = [len(model.graph.inputs) for model in (deep, shallow)]
    if counts[0] != counts[1]:
        raise ModelError(f"one network has {counts[0]} inputs and the other {counts[1]}")
    found = correspond(deep, shallow, same_sizes=False)
    if found.stopped:
        raise ModelError(f"the networks differ in more than their depth: {found.stopped[0]}")
    partners = set(found.values.values())
    extra = next((v for node in shallow.graph for v in node.outputs if v.name and v.name not in partners), None)
    if extra is not None:
        raise ModelError(
            f"the networks differ in more than their depth: nothing in the deeper one matches {extra.name!r}"
        )
    theirs = {step.cut: step for step in find_steps(shallow)}
    return tuple((step, theirs[found.values[step.cut]]) for step in find_steps(deep))


def _free_prefix(model: oir.Model) -> str:
    """A prefix that no name in `model` has, for a network can be balanced more than once."""
    names = {value.name or "" for node in model.graph for value in node.outputs}
    number = 1
    while any(name.startswith(f"added{number}/") for name in names):
        number += 1
    return f"added{number}"


def _list(nodes: Sequence[oir.Node]) -> str:
    return ", ".join(node.op_type for node in nodes) or "nothing"
