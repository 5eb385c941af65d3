"""Gates learned one channel space at a time: the networks are never put side by side.

What layers read of a space is told by the covariance of all networks' channels there and by the networks' own weights
(`calibration.local_gates`). The channels that gates select make one network, whose layers are then fitted by least
squares, as in fuse.
"""

import math
from collections.abc import Sequence

import onnx_ir as oir

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.correspond import correspond
from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.space import Space
from onnxmerge.ir.stages import find_steps
from onnxmerge.methods.align import Pair
from onnxmerge.methods.fuse.counterparts import FuseOptions, mapped_spaces
from onnxmerge.methods.fuse.fusing import find_counterparts, fuse_counterparts
from onnxmerge.methods.gate.plan import GatePlan, PlannedSpace, other_architecture
from onnxmerge.methods.gate.settings import GateSettings
from onnxmerge.methods.progress import Progress
from onnxmerge.methods.task import Network, Task
from onnxmerge.passes.select_channels import Reading
from onnxmerge.report.schema import GatedSpace


def make_layerwise_plan(networks: Sequence[Network], settings: GateSettings) -> GatePlan:
    """What will be chosen.

    Raises:
        UsageError: another width is asked for.
        ModelError: the networks are of different architectures, or there is nothing to choose.
    """
    first, *others = networks
    if settings.width is not None:
        raise UsageError("--width: layer by layer the result is as wide as one network; leave out --layerwise")
    for other in others:
        same_ends = len(first.inputs) == len(other.inputs) and len(first.outputs) == len(other.outputs)
        found = correspond(first.model, other.model) if same_ends else None
        if found is None or found.stopped:
            reason = found.stopped[0] if found else "its inputs or outputs differ in number"
            raise ModelError(other_architecture(first, other, reason))
    sizes = {space.name: space.size for space in mapped_spaces(first.model)}
    if not sizes:
        raise ModelError(f"{first.path}: no channels can be chosen (it has no hidden channels)")
    return GatePlan(
        networks=[network.name for network in networks],
        width=1 / len(networks),
        spaces=[PlannedSpace(name=n, channels=size * len(networks), keep=size) for n, size in sizes.items()],
    )


def choose_layerwise(
    tasks: Sequence[Task], settings: GateSettings, progress: Progress
) -> tuple[oir.Model, list[GatedSpace]]:
    """The network made of the channels that gates select, and what they said.

    Args:
        tasks: networks of one architecture, batch norms folded.
        settings: seed and threads.
        progress: told of each layer that is fitted.
    """
    from onnxmerge.calibration.local_gates import learn_local_gates  # torch is loaded only when it is needed

    first, *others = tasks
    gated: list[GatedSpace] = []

    def choose(space: Space, reading: Reading) -> list[int]:
        found = learn_local_gates(reading, space.size / len(reading.covariance), settings.seed)
        kept = (-found.log_alpha).argsort(kind="stable")[: space.size].tolist()
        probability = [round(float(p), 4) for p in found.probability]
        gated.append(GatedSpace(name=space.name, probability=probability, kept=sorted(kept)))
        return kept

    options = FuseOptions(seed=settings.seed, threads=settings.threads)
    progress.stage("gates and layers", len(find_layers(first.model)))
    counterparts = find_counterparts(first, others, [_pairs(first, other) for other in others], options)
    model = fuse_counterparts(first, counterparts, [1.0] * len(tasks), options, progress, choose)
    order = {space.name: number for number, space in enumerate(mapped_spaces(first.model))}
    return model, sorted(gated, key=lambda own: order[own.name])


def _pairs(first: Task, other: Task) -> list[Pair]:
    """Each layer or block with its like."""
    steps = zip(find_steps(first.model), find_steps(other.model), strict=True)
    return [Pair(a, b, (n, n), cka=math.nan, cost=math.nan, correlation=None) for n, (a, b) in enumerate(steps)]
