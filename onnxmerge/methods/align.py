"""align: which layer of one network stands for which layer of another, whatever their depths."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from onnxmerge.data import Split
from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.stages import Step, find_steps
from onnxmerge.methods.fuse.choices import LayerCost
from onnxmerge.methods.pairs import pair_statistics
from onnxmerge.methods.progress import Progress, Silent
from onnxmerge.methods.task import Network, Task, load_networks, with_data
from onnxmerge.passes.align_layers import (
    channel_match,
    cka_cost,
    group_steps,
    map_by_groups,
    order_cost,
    stages,
    wasserstein_cost,
    width_cost,
)
from onnxmerge.report.provenance import hardware, library_versions
from onnxmerge.report.recipe import recipe_of_call
from onnxmerge.report.schema import LayerMap, Result, StepPair, StepRecord
from onnxmerge.runtime.layer_grams import channel_means, layer_grams

SAMPLES = 500


@dataclass(frozen=True)
class Pair:
    """A step of the first network and the step of the second that stands for it."""

    first: Step
    second: Step
    place: tuple[int, int]
    """Numbers of the two steps in their networks."""
    cka: float
    cost: float
    correlation: float | None
    """Mean correlation of the channels under their best assignment; None where widths or positions differ."""


@dataclass(frozen=True)
class LayerAlignment:
    """The layer map of two networks.

    Attributes:
        first: the first network, with the samples that both have seen.
        second: the second.
        steps: the hidden layers and blocks of each.
        groups: the group of each step of each; only steps of one group are mapped to each other.
        similarity: [steps of the first, steps of the second] linear CKA of the cuts.
        costs: [steps of the first, steps of the second] what the map minimises.
        pairs: the map, in the order of the networks.
        given: what the map was made with, by the names of options.
        notes: what a reader must know.
    """

    first: Task
    second: Network
    steps: tuple[list[Step], list[Step]]
    groups: tuple[list[str], list[str]]
    similarity: np.ndarray
    costs: np.ndarray
    pairs: list[Pair]
    given: dict[str, str | int | bool | None]
    notes: list[str] = field(default_factory=list)

    def result(self) -> Result:
        """The record that is printed and that a report shows."""
        return Result(
            method="align",
            versions=library_versions(),
            inputs=[self.first.record(), self.second.record()],
            candidates=[],
            chosen=None,
            recipe=recipe_of_call("align", self.given),
            hardware=hardware(),
            notes=self.notes,
            layer_map=LayerMap(
                cost=str(self.given["cost"]),
                ends=not self.given["free_ends"],
                first=_records(self.steps[0], self.groups[0]),
                second=_records(self.steps[1], self.groups[1]),
                similarity=self.similarity.tolist(),
                costs=self.costs.tolist(),
                pairs=[
                    StepPair(
                        first=pair.first.name,
                        second=pair.second.name,
                        place=pair.place,
                        cka=pair.cka,
                        cost=pair.cost,
                        correlation=pair.correlation,
                    )
                    for pair in self.pairs
                ],
            ),
        )


def align_models(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    cost: LayerCost = LayerCost.CKA,
    ends: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> LayerAlignment:
    """Map the hidden layers (residual nets: blocks) of two networks to each other.

    Inside each group of layers (see `group_steps`) the network with fewer of them is mapped to the other.

    Args:
        first: an ONNX file.
        second: another; its inputs are those of the first, by order, type and shape.
        data: samples in the first network's format; both networks see the same ones, of the calibration split.
        samples: how many.
        seed: of the choice of samples and positions, and of the held-out tenth where the data have no test samples.
        cost: what the map minimises.
        ends: tie the first layers of each group to each other, and the last ones; the order of layers ties none.
        threads: for onnxruntime.
        progress: told what is going on.

    Raises:
        UsageError: the inputs differ, the data do not fit or are the same over and over.
        ModelError: a network cannot be read or has no hidden layer, or no layer of one can stand for one of the other.
    """
    ours, theirs = load_networks([first, second])
    (task,) = with_data([ours], {ours.name: data}, seed=seed)
    found = align_layers(
        task, theirs, samples=samples, seed=seed, cost=cost, ends=ends, threads=threads, progress=progress
    )
    return replace(found, given=found.given | {"data": str(data)})


def align_layers(
    first: Task,
    second: Network,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    cost: LayerCost = LayerCost.CKA,
    ends: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> LayerAlignment:
    """`align_models` for networks that are loaded."""
    progress = progress or Silent()
    networks = (first, second)
    steps = (_steps(first), _steps(second))
    groups = group_steps(*steps)
    if not set(groups[0]) & set(groups[1]):
        raise ModelError(
            f"no layer of {second.path} can stand for one of {first.path}: the first network's hidden layers are "
            f"{', '.join(dict.fromkeys(groups[0]))}, the second's {', '.join(dict.fromkeys(groups[1]))}"
        )
    split = first.data.calibration.take(samples, seed)
    if len(split) < 2:
        raise UsageError(f"{first.data.source}: comparing layers takes at least 2 samples, not {len(split)}")
    progress.stage("compare layers", 2)
    grams = []
    notes = _grouping(steps, groups)
    for network, own in zip(networks, steps, strict=True):
        found, constant = _grams(network, first, split, own, threads)
        if len(constant) == len(own):
            raise UsageError(
                f"{network.path}: every layer gives the same values for all {len(split)} samples of "
                f"{first.data.source}, so that nothing can be compared"
            )
        notes += [f"{step.name} of {network.name} is constant on these samples: its CKA is 0." for step in constant]
        grams.append(found)
        progress.advance(network.name)
    similarity = 1 - cka_cost(*grams)
    if cost == LayerCost.CKA:
        costs = 1 - similarity
    elif cost == LayerCost.ORDER:
        costs, ends = order_cost(*groups), False
    elif cost == LayerCost.WIDTH:
        costs = width_cost(*([step.width for step in own] for own in steps))
    else:
        costs = wasserstein_cost(
            *(_means(n, first, split, own, threads) for n, own in zip(networks, steps, strict=True))
        )
    places = map_by_groups(costs, *groups, ends=ends)
    progress.stage("match channels")
    matches = _channel_matches(first, second, split, [(steps[0][i], steps[1][j]) for i, j in places], seed, threads)
    pairs = [
        Pair(steps[0][i], steps[1][j], (i, j), float(similarity[i, j]), float(costs[i, j]), match)
        for (i, j), match in zip(places, matches, strict=True)
    ]
    given: dict[str, str | int | bool | None] = {"first": str(first.path), "second": str(second.path)}
    given |= {"data": first.data.source, "cost": cost, "free_ends": None if ends else True}
    given |= {"samples": samples, "seed": seed}
    return LayerAlignment(first, second, steps, groups, similarity, costs, pairs, given, notes)


def _steps(network: Network) -> list[Step]:
    steps = find_steps(network.model)
    if not steps:
        raise ModelError(f"{network.path}: has no hidden layer through which everything flows, so there is none to map")
    return steps


def _grouping(steps: tuple[list[Step], list[Step]], groups: tuple[list[str], list[str]]) -> list[str]:
    """Which kinds could not be mapped stage by stage."""
    notes = []
    for kind in sorted(set(groups[0]) & set(groups[1]) & {"conv", "dense"}):
        numbers = [len(stages(own, kind)) for own in steps]
        if max(numbers) > 1:
            notes.append(
                f"The stages of {kind} layers do not correspond ({numbers[0]} and {numbers[1]} of them), so all layers "
                "of that kind are one group."
            )
    return notes


def _grams(
    network: Network, owner: Task, split: Split, steps: Sequence[Step], threads: int | None
) -> tuple[list[np.ndarray], list[Step]]:
    """The Gram matrix of each step's cut, and the steps that are constant."""
    try:
        found = layer_grams(network.model, owner.feeds(split, network), [step.cut for step in steps], threads=threads)
    except ModelError as error:
        raise ModelError(f"{network.path}: {error}") from error
    return [found[step.cut] for step in steps], [step for step in steps if not found[step.cut].any()]


def _means(network: Network, owner: Task, split: Split, steps: Sequence[Step], threads: int | None) -> list[np.ndarray]:
    axes = {step.cut: step.axis for step in steps}
    found = channel_means(network.model, owner.feeds(split, network), axes, threads=threads)
    return [found[step.cut] for step in steps]


def _channel_matches(
    first: Task, second: Network, split: Split, pairs: Sequence[tuple[Step, Step]], seed: int, threads: int | None
) -> list[float | None]:
    """For each pair the mean correlation of its channels under their best assignment, each pair by itself."""
    alike = [(a, b) for a, b in pairs if (a.width, a.axis) == (b.width, b.axis)]
    found = pair_statistics(
        first,
        second,
        second.model,
        [first],
        {a.cut: b.cut for a, b in pairs},
        {a.cut: a.axis for a, _ in alike},
        samples=len(split),
        seed=seed,
        threads=threads,
        within=False,
    )
    return [channel_match(found[a.cut]) if a.cut in found else None for a, _ in pairs]


def _records(steps: Sequence[Step], groups: Sequence[str]) -> list[StepRecord]:
    return [
        StepRecord(
            name=step.name,
            cut=step.cut,
            kind=step.kind,
            block=step.block,
            stage=step.stage,
            width=step.width,
            group=group,
        )
        for step, group in zip(steps, groups, strict=True)
    ]
