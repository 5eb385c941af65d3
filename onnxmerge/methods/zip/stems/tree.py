"""A tree of stems: what all tasks share, and groups of them that share further.

Behind a stem each task's tail is a network again, and what arrives there is its data. So a group of tasks is zipped
behind the stem as all tasks are behind the inputs, to any depth; its merged model stands where one tail would.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as oir
from pydantic import BaseModel, ConfigDict

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.methods.task import Network, task_outputs
from onnxmerge.methods.zip.alignment import Cut, Sharable, find_sharable
from onnxmerge.methods.zip.stems.tails import Stem
from onnxmerge.passes.attach_tails import SHARED, AttachTails, bare_stem


class Branch(BaseModel):
    """A group of tasks that share further than all do. Groups are nested or have no task in common."""

    model_config = ConfigDict(extra="forbid")

    tasks: list[str]
    units: int
    """How many units the group shares, counted from the inputs."""

    @property
    def name(self) -> str:
        """What reports call the group."""
        return "+".join(self.tasks)


@dataclass(frozen=True)
class Fork:
    """Tasks that share what lies before a value, and the groups of them that share further."""

    tasks: tuple[str, ...]
    cut: str | None
    """What the first task's network calls the value; None: these tasks share nothing."""
    groups: tuple["Fork", ...]
    adapters: bool
    """Whether tasks read the stem through adapters even where their next layers can do without."""

    @property
    def prefix(self) -> str:
        """What the names of the group's shared part begin with in the merged model."""
        return f"{SHARED}{'+'.join(self.tasks)}/"


class Forest:
    """The trees that some networks can be merged into; what a group can share is found once.

    Args:
        networks: the originals.
        sharable: what all of them have in common.
    """

    def __init__(self, networks: Sequence[Network], sharable: Sharable):
        self._networks = {network.name: network for network in networks}
        self._sharable = {tuple(self._networks): sharable}

    def sharable(self, group: Sequence[str]) -> Sharable:
        """What the tasks of a group, in the networks' order, have in common."""
        names = tuple(group)
        if names not in self._sharable:
            self._sharable[names] = find_sharable([self._networks[name] for name in names])
        return self._sharable[names]

    def tree(self, units: int, branches: Sequence[Branch] = (), adapters: bool = False) -> Fork:
        """All tasks share `units`, and the branches more; for `adapters` see `Fork`.

        Raises:
            UsageError: a branch names an unknown task, has fewer than two tasks or all, overlaps another without
                nesting, is not deeper than what it branches off, or deeper than its tasks can share.
        """
        for branch in branches:
            self._check(branch)
        groups = sorted(((self._ordered(branch.tasks), branch.units) for branch in branches), key=lambda g: -len(g[0]))
        for number, (group, _) in enumerate(groups):
            for other, _ in groups[:number]:
                common = set(group) & set(other)
                if common and (common != set(group) or len(group) == len(other)):
                    raise UsageError(f"the groups {_listed(other)} and {_listed(group)} overlap, but are not nested")
                if "+".join(group) == "+".join(other):
                    raise UsageError(f"the groups {_listed(other)} and {_listed(group)} would have one name")
        return self._fork(tuple(self._networks), units, groups, adapters)

    def _fork(
        self, tasks: tuple[str, ...], units: int, inner: Sequence[tuple[tuple[str, ...], int]], adapters: bool
    ) -> Fork:
        found = []
        left = list(inner)
        while left:
            (group, depth), *rest = left
            if depth <= units:
                raise UsageError(f"{_listed(group)} must share more than the {units} units that {_listed(tasks)} share")
            inside = [other for other in rest if set(other[0]) < set(group)]
            found.append(self._fork(group, depth, inside, adapters))
            left = [other for other in rest if not set(other[0]) < set(group)]
        shared = self.sharable(tasks)
        if units > len(shared.cuts):
            raise UsageError(f"{_listed(tasks)} can share at most {len(shared.cuts)} units: {shared.limit}")
        return Fork(tasks, shared.cuts[units - 1].unit.cut if units else None, tuple(found), adapters)

    def _check(self, branch: Branch) -> None:
        for task in branch.tasks:
            if task not in self._networks:
                raise UsageError(f"a group names the task {task!r}; the tasks are {_listed(list(self._networks))}")
        if len(set(branch.tasks)) < max(2, len(branch.tasks)):
            raise UsageError(f"a group takes at least two tasks, each once, not {_listed(branch.tasks) or 'none'}")
        if len(branch.tasks) == len(self._networks):
            raise UsageError(f"a group of all tasks ({_listed(branch.tasks)}) is no branch: give more units instead")

    def _ordered(self, tasks: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in self._networks if name in tasks)


def _listed(tasks: Sequence[str]) -> str:
    return ", ".join(tasks)


class Level(ABC):
    """Networks that read the same values: the originals, or the tails of a group behind a stem.

    Args:
        networks: by their names the pieces of the merged model are called.
        sharable: what they have in common.
    """

    def __init__(self, networks: Sequence[Network], sharable: Sharable):
        self.networks, self.sharable = networks, sharable

    @abstractmethod
    def split(self, cut: Cut) -> tuple[Stem, dict[str, oir.Model]]:
        """A stem up to the cut, and behind it each network's tail."""

    @abstractmethod
    def below(self, group: Fork, stem: Stem | None, cut: Cut | None, tails: Mapping[str, oir.Model]) -> "Level":
        """The level of a group behind the stem; without one its tails are these networks."""

    def merged(self, fork: Fork, prefix: str = SHARED) -> oir.Model:
        """The networks as one model.

        Raises:
            ModelError: a group cannot be split there once its networks are tails.
        """
        cut, stem = self._cut(fork), None
        tails = {network.name: network.model for network in self.networks}
        if cut is not None:
            stem, tails = self.split(cut)
        pieces = {}
        for task, tail in tails.items():
            group = next((group for group in fork.groups if task in group.tasks), None)
            if group is None:
                pieces[task] = tail
            elif task == group.tasks[0]:
                pieces[group.prefix] = self.below(group, stem, cut, tails).merged(group, group.prefix)
        groups = [group.prefix for group in fork.groups]
        if stem is None:
            model: oir.Model = AttachTails(pieces, merged=groups)(bare_stem(self.sharable.reference.model)).model
        else:
            model = stem.attach(pieces, merged=groups, shared=prefix)
        outputs = {value.name: value for value in model.graph.outputs}
        model.graph.outputs[:] = [outputs[name] for own in task_outputs(self.networks).values() for name in own]
        return model

    def _cut(self, fork: Fork) -> Cut | None:
        if fork.cut is None:
            return None
        for cut in self.sharable.cuts:
            if cut.unit.cut == fork.cut:
                return cut if fork.adapters else cut.direct or cut
        raise ModelError(
            f"{_listed(fork.tasks)} cannot share the layers up to {fork.cut!r} behind a stem: {self.sharable.limit}"
        )
