"""Learn which channels of a widened network to keep, and train what is left."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir
import torch
from torch import Tensor

from onnxmerge.calibration import ranks
from onnxmerge.calibration.devices import chosen_device, computing
from onnxmerge.calibration.distillation import Distillation, solve
from onnxmerge.calibration.engine import Outcome, Progress
from onnxmerge.calibration.gates import HardConcrete, growing_weight
from onnxmerge.calibration.module import GraphModule
from onnxmerge.calibration.objective import Objective
from onnxmerge.calibration.settings import Checkpoint, Settings
from onnxmerge.calibration.streams import Batches, Stream
from onnxmerge.data import Split
from onnxmerge.passes.gate_places import GatedSpace, GatedValue, GatePlaces
from onnxmerge.passes.insert_gates import InsertGates, gate_input


@dataclass(frozen=True)
class Source:
    """Samples to learn from, and who says what is wanted where no labels do.

    Attributes:
        name: what messages call it.
        teacher: a network whose inputs are called like the arrays of the data.
        calibration: samples to train with.
        held_out: samples to choose the best weights with.
        outputs: what the network that is trained calls each of the teacher's outputs; None: they pair in order, and
            all sources have them in common.
    """

    name: str
    teacher: onnx_ir.Model
    calibration: Split
    held_out: Split
    outputs: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Learned:
    """What learning gates came to.

    Attributes:
        outcome: of training; its held-out losses are those of the network as it would be pruned at that step.
        log_alpha: [gates] the importance of each.
        gates: [gates] as they are where nothing is drawn, those that are not kept not yet closed.
        probability: [gates] P[g > 0].
    """

    outcome: Outcome
    log_alpha: np.ndarray
    gates: np.ndarray
    probability: np.ndarray


def learn_gates(
    widened: onnx_ir.Model,
    places: GatePlaces,
    sources: Sequence[Source],
    settings: Settings,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> Learned:
    """Train the weights of `widened`, which it keeps, together with a gate for each channel.

    The loss is that of `settings`, the mean over the sources, plus lambda times the half loss: the sum over all spaces
    of (wanted share - mean P[g > 0])^2, where lambda grows (see `gates`). Weights between channels of different
    networks, which `widen` sets to zero, are trained like all others. Kept are the weights and gates at which the
    network does best on held-out samples with those channels closed that would be pruned now.

    Raises:
        ModelError, UsageError: see `onnxmerge.calibration.objective.Objective`.
    """
    with computing(settings.threads):
        module = GatedModule(widened, places, settings.seed, settings.batch * _together(sources))
        module.to(chosen_device(settings.device))
        objectives = _objectives(widened, sources, settings)
        outcome = solve(_Gating(module, objectives, sources, settings), settings, progress, checkpoint)
    module.write_back(widened)
    gates = module.gates
    found = (gates.log_alpha, gates.settled(), gates.probability())
    return Learned(outcome, *(tensor.detach().cpu().numpy().astype(np.float64) for tensor in found))


def fine_tune(
    student: onnx_ir.Model,
    sources: Sequence[Source],
    settings: Settings,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> Outcome:
    """Train the weights and norm scales of `student`, which keeps those with the least held-out loss.

    Raises:
        ModelError, UsageError: see `onnxmerge.calibration.objective.Objective`.
    """
    with computing(settings.threads):
        module = GraphModule(student).to(chosen_device(settings.device))
        objectives = _objectives(student, sources, settings)
        outcome = solve(_FineTuning(module, objectives, sources, settings), settings, progress, checkpoint)
    if outcome.best_step > 0:
        module.write_back(student)
    return outcome


class GatedModule(GraphModule):
    """A network with gates (see `InsertGates`): drawn for each sample in training, else settled.

    In evaluation the gates of channels that would not be kept are closed. Where processes share what goes through it
    at once, `batch` samples, all draw gates for the whole of it, and each takes those of its part.
    """

    def __init__(self, widened: onnx_ir.Model, places: GatePlaces, seed: int, batch: int = 1):
        super().__init__(InsertGates(places)(widened).model)
        self.gates, self._places, self._batch = HardConcrete(places.count, seed), places, batch

    def forward(self, inputs: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """See `GraphModule.forward`; the inputs are those of the network without gates."""
        return super().forward({**inputs, **self._feeds(inputs)}, outputs)

    def value_bytes(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> int:
        """See `GraphModule.value_bytes`; the same inputs."""
        return super().value_bytes({**inputs, **self._feeds(inputs)}, outputs)

    def half_loss(self) -> Tensor:
        """Sum over the spaces of (share that stays - mean P[g > 0])^2."""
        probability = self.gates.probability()
        return torch.stack([_half_loss(probability[own.gates], own) for own in self._places.spaces]).sum()

    def _feeds(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.training:
            samples = len(next(iter(inputs.values())))
            drawn = self.gates.draw(max(self._batch, samples))
            start = int(np.array_split(np.arange(len(drawn)), ranks.count())[ranks.rank()][0])
            gates = drawn[start : start + samples]
        else:
            gates = self.gates.settled()[None]
            gates = gates.masked_fill(torch.from_numpy(self._closed()).to(gates.device), 0)
        return {gate_input(own.name): _spread(gates, own) for own in self._places.values}

    def _closed(self) -> np.ndarray:
        return self._places.closed(self._places.kept(self.gates.log_alpha.detach().cpu().numpy()))


class AllTogether(Stream):
    """Tasks whose batches, each of its own samples, are one large batch of the network.

    So batch norms see the samples of all tasks in training as they do afterwards, and not one task's at a time.
    """

    def run(self, merged: GraphModule, batches: Batches, *, taps: bool = True) -> dict[str, Tensor]:
        """See `Stream.run`; of each task's outputs the rows that are its own samples. Nothing is tapped."""
        fed: dict[int, dict[str, Tensor]] = {}
        for own in self.objectives:  # tasks of one source have the very same batch
            fed.setdefault(id(batches[own.task]), own.feed(batches[own.task]))
        rows: dict[int, slice] = {}
        start = 0
        for key, feed in fed.items():
            rows[key] = slice(start, start := start + len(next(iter(feed.values()))))
        joined = {name: torch.cat([feed[name] for feed in fed.values()]) for name in next(iter(fed.values()))}
        values = merged(joined, [name for own in self.objectives for name in own.outputs])
        return {name: values[name][rows[id(batches[o.task])]] for o in self.objectives for name in o.outputs}

    def bytes_of_one(self, merged: GraphModule, splits: Mapping[str, Split]) -> int:
        """See `Stream.bytes_of_one`."""
        return super().bytes_of_one(merged, splits) * len({id(splits[own.task]) for own in self.objectives})


class _FineTuning(Distillation):
    """The problem (`engine.Problem`) of doing what labels or teachers say; no zeros have to stay."""

    def __init__(
        self, module: GraphModule, objectives: Sequence[Objective], sources: Sequence[Source], settings: Settings
    ):
        data = {source.name: source.calibration for source in sources}
        held_out = {source.name: source.held_out for source in sources}
        together = AllTogether(tuple(objectives))
        streams = [together] if _are_apart(sources) else [Stream((own,)) for own in objectives]
        super().__init__(module, streams, data, held_out, settings)

    def settle(self, step: int) -> None:
        """Nothing has to hold."""


class _Gating(_FineTuning):
    """The same, with gates."""

    def __init__(
        self, module: GatedModule, objectives: Sequence[Objective], sources: Sequence[Source], settings: Settings
    ):
        self._gated, self._steps, self._half = module, settings.steps, 0.0
        super().__init__(module, objectives, sources, settings)

    @property
    def trained(self) -> Mapping[str, Tensor]:
        """The weights, the norm scales and the gates."""
        return {**super().trained, "gates": self._gated.gates.scaled}

    def losses(self) -> Iterator[Tensor]:
        """A batch of every source, and the half loss."""
        self._gated.train()
        yield from super().losses()
        half = self._weight * self._gated.half_loss()
        self._half = half.item()
        yield half

    @property
    def terms(self) -> Mapping[str, float]:
        """The losses by task and name, and the half loss as it weighs now."""
        return {**super().terms, "half": self._half}

    def skip(self, rounds: int) -> None:
        """Start behind so many steps."""
        super().skip(rounds)
        self.settle(rounds)

    def judge(self) -> float:
        """The held-out loss of what would be kept now."""
        self._gated.eval()
        return super().judge()

    def settle(self, step: int) -> None:
        """The half loss gains weight."""
        self._weight = growing_weight(step / self._steps)


def _objectives(student: onnx_ir.Model, sources: Sequence[Source], settings: Settings) -> list[Objective]:
    own = [value.name or "" for value in student.graph.inputs]
    outputs = [value.name or "" for value in student.graph.outputs]
    objectives = []
    for source in sources:
        names = [value.name or "" for value in source.teacher.graph.inputs]
        theirs = [value.name or "" for value in source.teacher.graph.outputs]
        pairs = source.outputs or dict(zip(outputs, theirs, strict=True))
        fed = dict(zip(own, names, strict=True))
        objectives.append(Objective(source.name, student, source.teacher, pairs, fed, (), settings, 1 / len(sources)))
    return objectives


def _together(sources: Sequence[Source]) -> int:
    """How many batches go through the network at once."""
    return len({id(source.calibration) for source in sources}) if _are_apart(sources) else 1


def _are_apart(sources: Sequence[Source]) -> bool:
    """Whether each source has outputs of its own."""
    return all(source.outputs is not None for source in sources)


def _spread(gates: Tensor, value: GatedValue) -> Tensor:
    """[samples, gates] as the value's gates: [samples, 1, ..., positions, ..., 1]."""
    index = torch.from_numpy(value.gate).to(gates.device)
    along = torch.cat([gates, gates.new_ones(len(gates), 1)], dim=1)[:, index]  # the last, at -1, is open
    return along.reshape(len(gates), *[1] * (value.axis - 1), len(index), *[1] * (value.rank - value.axis - 1))


def _half_loss(probability: Tensor, space: GatedSpace) -> Tensor:
    return (space.keep / space.space.size - probability.mean()).square()
