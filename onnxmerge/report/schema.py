"""The result of a method: what `report.json` holds (schema 1), what Python callers get back, what the table prints.

A figure that was not measured is None, never 0. The texts under the fields are published: they are the descriptions in
`docs/report.schema.json`.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema


def _open_to_more(schema: dict[str, Any]) -> None:
    """Let a published object have fields that a later version adds."""
    schema.pop("additionalProperties", None)


class _Record(BaseModel):
    model_config = ConfigDict(
        extra="forbid", populate_by_name=True, use_attribute_docstrings=True, json_schema_extra=_open_to_more
    )


def _no_number(value: Any) -> Any:
    return math.nan if value is None else value


Loss = Annotated[float, BeforeValidator(_no_number), WithJsonSchema({"type": ["number", "null"]})]
"""A loss; one that is no finite number is null in JSON."""


class InputRecord(_Record):
    """One original model. `bytes` is the size of the file, external data included."""

    task: str
    path: str
    sha256: str
    parameters: int
    bytes: int


class TaskScore(_Record):
    """How one task fares in a candidate, on held-out data; fractions in 0..1."""

    accuracy: float | None = None
    original_accuracy: float | None = None
    agreement: float | None = None
    """Share of held-out samples on which merged and original name the same class (classifiers only)."""
    relative_error: float | None = None
    """|merged - original| / |original|, Frobenius norms over the held-out samples; of the output that fares worst."""

    @property
    def drop(self) -> float | None:
        """What `--max-drop` bounds: accuracy lost where labels exist, else disagreement, else relative error."""
        if self.accuracy is not None and self.original_accuracy is not None:
            return self.original_accuracy - self.accuracy
        if self.agreement is not None:
            return 1.0 - self.agreement
        return self.relative_error

    @property
    def closeness(self) -> float:
        """How near two models are, larger is nearer: a classifier's agreement, else less relative error."""
        if self.agreement is not None:
            return self.agreement
        return -math.inf if self.relative_error is None else -self.relative_error


class LatencyRecord(_Record):
    """Median milliseconds for one run of the merged model and of all originals one after the other."""

    merged: float | None = None
    separate: float | None = None
    """Originals in one session each, all with `session.force_spinning_stop=1`: the honest baseline."""
    separate_default: float | None = None
    """Originals in one session each, onnxruntime's defaults."""
    speedup: float | None = None
    """separate / merged."""


class Timing(_Record):
    """How long one run takes: percentiles over all timed rounds, in milliseconds."""

    p50: float
    p90: float
    p99: float
    throughput: float
    """Samples for each second, over all timed rounds together."""
    rounds: int
    """Timed rounds; p99 of few of them is close to the slowest."""


class BatchLatency(_Record):
    """A candidate at one batch size, beside the originals used in three other ways."""

    batch: int
    merged: Timing
    separate: Timing | None = None
    """As `LatencyRecord.separate`: the originals in spin-stopped sessions, one after the other."""
    separate_default: Timing | None = None
    """As `LatencyRecord.separate_default`: with onnxruntime's defaults."""
    unshared: Timing | None = None
    """All originals side by side in one graph that shares nothing, spin-stopped."""
    speedup: float | None = None
    """separate / merged, by p50."""
    of_ideal: float | None = None
    """speedup / N for N originals: 1 where the merged model takes one N-th of their time."""


class MemoryRecord(_Record):
    """Unique set size in MB (1e6 bytes) of a fresh process, sessions loaded and warmed up, less the bare process."""

    merged: float | None = None
    separate: float | None = None
    device_merged: float | None = None
    """What the GPU holds more than before, in MB; None on the CPU."""
    device_separate: float | None = None


class GatedSpace(_Record):
    """A channel space of all originals together whose channels were chosen by gates."""

    name: str
    probability: list[float]
    """Of each channel P[g > 0]; a run of the first original's channels comes before that of the second."""
    kept: list[int]
    """The channels that stayed, ascending."""


class Candidate(_Record):
    """One merged model. `share` is the number k of stem units (layers or blocks) computed once."""

    name: str
    share: int
    path: str | None
    parameters: int
    bytes: int
    macs: int | None = None
    """Multiply-accumulates of all tasks together for one sample."""
    tasks: dict[str, TaskScore]
    ensemble: TaskScore | None = None
    """How it fares against the originals' mean prediction, where they have one task."""
    latency_ms: LatencyRecord = Field(default_factory=LatencyRecord)
    memory_mb: MemoryRecord = Field(default_factory=MemoryRecord)
    steps: int
    seconds: float
    start: str | None = None
    """Where the stem's weights came from, e.g. "least-squares", "average", or a task whose stem was kept as it is."""
    shared_layers: int | None = None
    """Layers inside the stem of all tasks, of `total_layers` per network."""
    total_layers: int | None = None
    branches: dict[str, int] = Field(default_factory=dict)
    """By group of tasks, joined by `+`, how many units it shares, where that is more than all tasks do."""
    channels: dict[str, int] = Field(default_factory=dict)
    """How many neurons of each channel space are shared, where that was decided while the candidate was made."""
    losses: list[tuple[int, Loss]] = Field(default_factory=list)
    """Held-out calibration loss: (step, loss), step 0 being the closed form."""
    gates: list[GatedSpace] = Field(default_factory=list)
    """What gates said of each channel space, in `gate`; left out of other methods' `report.json`."""
    batches: list[BatchLatency] = Field(default_factory=list)
    """Latency at each batch size, ascending, in `bench`; left out of other methods' `report.json`."""
    nodes: dict[str, dict[str, int]] = Field(default_factory=dict)
    """By provider, how many nodes of each operator it ran, in `bench` and `validate`; left out of others'."""

    @property
    def worst_drop(self) -> float | None:
        """The largest `TaskScore.drop` of all tasks; None when no task was scored."""
        return worst_drop(self.tasks)

    def within(self, drop: float) -> frozenset[str]:
        """The tasks that lose at most `drop`."""
        return frozenset(task for task, score in self.tasks.items() if (score.drop or 0.0) <= drop)


def worst_drop(tasks: Mapping[str, TaskScore]) -> float | None:
    """The largest `TaskScore.drop`; None when no task was scored."""
    return max((score.drop for score in tasks.values() if score.drop is not None), default=None)


class LayerSimilarity(_Record):
    """How alike the originals are at one stem layer, after alignment."""

    unit: int
    """Stem unit (1-based) the layer belongs to."""
    layer: str
    channels: int
    correlation: float
    """Mean correlation of matched channels' pre-activations on the same inputs."""
    correlation_unaligned: float
    """The same before alignment: channel i with channel i."""
    cka: float
    """Linear CKA of the centred pre-activations; needs no alignment."""


class StepRecord(_Record):
    """A hidden layer or block of an original, in `align`."""

    name: str
    cut: str
    """The value that ends it."""
    kind: str
    """`conv` or `dense`."""
    block: bool
    stage: int
    width: int
    """Channels of the cut."""
    group: str
    """Only steps of one group are mapped to each other."""


class StepPair(_Record):
    """A step of the first network and the step of the second that stands for it."""

    first: str
    second: str
    place: tuple[int, int]
    """Where the pair stands in the matrices: numbers of the two steps, from 0."""
    cka: float
    """Linear CKA of the centred pre-activations."""
    cost: float
    correlation: float | None = None
    """Mean correlation of the channels under their best assignment; None where widths or positions differ."""


class LayerMap(_Record):
    """Which layers of two networks stand for each other."""

    cost: str
    """What the map minimises: `cka` (1 - CKA), `width` or `wasserstein`."""
    ends: bool
    """Whether first steps were tied to each other, and last ones, in each group."""
    first: list[StepRecord]
    second: list[StepRecord]
    similarity: list[list[float]]
    """[steps of the first, steps of the second] linear CKA."""
    costs: list[list[float]]
    """[steps of the first, steps of the second] what the map minimises."""
    pairs: list[StepPair]


class LayerLink(_Record):
    """A layer of the fused network and the layer of an original that stands for it."""

    fused: str
    original: str
    cka: float | None = None
    """Linear CKA of the centred pre-activations; None where the map was given, not found."""


class LayerLinks(_Record):
    """Which hidden layers or blocks of an original stand for which of the fused network's."""

    fused: dict[str, int]
    """The fused network's layers in order, each with its channels."""
    original: dict[str, int]
    """The original's."""
    links: list[LayerLink]


class TaskPictures(_Record):
    """What one task makes of a sample, as PNG files: the original and the chosen candidate's file, in one scale."""

    task: str
    original: bytes
    merged: bytes
    relative_error: float | None
    """|merged - original| / |original| over this image; None where the original is zero."""


class Pictures(_Record):
    """A held-out sample of networks that make images."""

    title: str
    sample: bytes | None
    """The input as a PNG file; None where it is no image."""
    tasks: list[TaskPictures]


class BoundCheck(_Record):
    """A bound that was asked for, held against what was measured."""

    bound: str
    """The option that asks for it, without dashes; `atol+rtol` where an output has both."""
    of: str
    """What it bounds: an output `TASK/output`, a task, or a model file."""
    limit: float
    """What was asked; of `atol+rtol`, which has no single number, 1."""
    measured: float | None
    """In the terms of the limit; of `atol+rtol` the largest |merged - original| / (atol + rtol |original|)."""
    passed: bool | None
    """None where the bound does not apply, e.g. agreement where there are no classes."""
    told: str
    """A sentence."""
    seconds: float
    """How long measuring took; what one measurement answers together has equal parts of its time."""


class Result(_Record):
    """What a method returns and `report.json` stores."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    method: str
    versions: dict[str, str]
    inputs: list[InputRecord]
    candidates: list[Candidate]
    chosen: str | None
    """Name of the chosen candidate; None when none met `--max-drop`."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    hardware: dict[str, Any] = Field(default_factory=dict)
    similarity: list[LayerSimilarity] = Field(default_factory=list)
    units: list[str] = Field(default_factory=list)
    """The stem's units in order; candidate k shares the first k."""
    notes: list[str] = Field(default_factory=list)
    """Sentences a reader must know: what stopped early, what was not shared and why."""
    layer_map: LayerMap | None = None
    """What `align` found; left out of other methods' `report.json`."""
    originals: dict[str, TaskScore] = Field(default_factory=dict)
    """Each original against the ensemble of all, in `fuse` and `gate`; left out of other methods' `report.json`."""
    layer_maps: dict[str, LayerLinks] = Field(default_factory=dict)
    """For each original but the reference its layer map, in `fuse`; left out of other methods' `report.json`."""
    checks: list[BoundCheck] = Field(default_factory=list)
    """Every bound that was asked for, in `validate` and `bench`; left out where there are none."""
    pictures: list[Pictures] = Field(default_factory=list, exclude=True)
    """The chosen candidate's images for `report.html`; never in `report.json`."""

    @property
    def broken(self) -> list[str]:
        """A sentence for each bound that was broken."""
        return [check.told for check in self.checks if check.passed is False]

    def to_json(self) -> str:
        """The text of `report.json`."""
        absent: dict[str, Any] = {
            name: True for name in ("layer_map", "originals", "layer_maps", "checks") if not getattr(self, name)
        }
        unused = {name for name in ("gates", "batches", "nodes") if not any(getattr(c, name) for c in self.candidates)}
        if unused:
            absent["candidates"] = {"__all__": unused}
        return self.model_dump_json(by_alias=True, indent=2, exclude=absent) + "\n"

    def candidate(self, name: str) -> Candidate:
        """The candidate called `name`; KeyError when there is none."""
        for candidate in self.candidates:
            if candidate.name == name:
                return candidate
        raise KeyError(name)
