"""fuse: networks of one task become one network of the size of one.

Each network's layers are mapped to the reference's across depth, its channels across width, and a fuse rule makes one
set of weights: CLAFusion (Nguyen et al. 2023) with a least-squares rule, or with the rules it is compared to. Labels
are never needed.
"""

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as oir

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.files import claim_folder
from onnxmerge.ir.labels import dims
from onnxmerge.ir.layers import find_layers, parameter_count
from onnxmerge.ir.save import save, stored_bytes
from onnxmerge.ir.stages import find_steps
from onnxmerge.methods.align import align_layers
from onnxmerge.methods.choices import Balance, Matching, Rule
from onnxmerge.methods.fusing import RIDGE, FuseOptions, fuse_networks
from onnxmerge.methods.measure import Bench, Judge
from onnxmerge.methods.progress import Progress, Silent
from onnxmerge.methods.task import Network, Task, load_networks, with_data
from onnxmerge.report.provenance import hardware, library_versions, sha256
from onnxmerge.report.schema import Candidate, Result
from onnxmerge.report.write import write_report


@dataclass(frozen=True)
class FuseSettings:
    """What can be set; everything here goes into the recipe.

    Attributes:
        into: the network whose architecture the result has, by its name or path; None: the deepest.
        rule: how aligned weights become one (see `Rule`).
        balance: `add` or `collapse` layers without a counterpart, where a rule mixes weights.
        match: compare channels by activations or by weights.
        cost: what layer maps minimise: `cka`, `width` or `wasserstein`.
        weights: of each network, in order; None: all alike.
        max_drop: largest loss of the fused network against the worst original; None: no bound.
        steps: calibration steps afterwards, towards all originals; 0: closed form only.
        rate: highest learning rate, relative to each array's root mean square.
        samples: unlabelled samples of each network's data.
        ridge: lambda of least squares.
        labels: add cross-entropy with the data's labels to the calibration.
        seed: of everything drawn at random.
        threads: for onnxruntime and torch.
        providers: where latency is measured.
        measure: measure latency and memory.
    """

    into: str | None = None
    rule: Rule = Rule.LEAST_SQUARES
    balance: Balance = Balance.ADD
    match: Matching = Matching.ACTIVATIONS
    cost: str = "cka"
    weights: tuple[float, ...] | None = None
    max_drop: float | None = None
    steps: int = 0
    rate: float = 1e-2
    samples: int = 10_000
    ridge: float = RIDGE
    labels: bool = False
    seed: int = 0
    threads: int | None = None
    providers: tuple[str, ...] = ("cpu",)
    measure: bool = True


def fuse_models(
    models: Sequence[str | os.PathLike[str]],
    data: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    settings: FuseSettings | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Fuse networks of one task into one and write everything to the folder `output`.

    Args:
        models: the ONNX files, at least two.
        data: one source for all networks, or one for each (see `onnxmerge.data`); labels are optional.
        output: gets merged.onnx, report.json and report.html.
        settings: see `FuseSettings`.
        overwrite: replace the files of an earlier run.
        progress: told what is going on.

    Returns:
        What report.json holds; nothing is chosen when the fused network breaks `max_drop`.

    Raises:
        UsageError: settings, data or the output folder do not fit.
        ModelError: the networks do not have one task, or cannot be brought to one architecture.
    """
    settings = settings or FuseSettings()
    progress = progress or Silent()
    begun = time.perf_counter()
    progress.stage("load")
    networks = load_networks(models)
    _check_task(networks)
    reference = _reference(networks, settings.into)
    sources = data if isinstance(data, Mapping) else {network.name: data for network in networks}
    weights = _weights(networks, settings.weights)
    tasks = with_data(networks, sources, seed=settings.seed)
    order = [reference, *(number for number in range(len(tasks)) if number != reference)]
    tasks, weights = [tasks[number] for number in order], [weights[number] for number in order]
    folder = claim_folder(output, overwrite=overwrite)
    recipe = _recipe(tasks, settings)
    with tempfile.TemporaryDirectory(prefix="onnxmerge-") as temporary:
        fused, notes = _fuse(tasks, weights, settings, progress)
        losses = _calibrate(fused, tasks, settings, progress) if settings.steps else []
        path = folder / "merged.onnx"
        save(fused, path, {"onnxmerge.method": "fuse", "onnxmerge.recipe": json.dumps(recipe, sort_keys=True)})
        progress.stage("measure")
        judge = Judge(tasks, Path(temporary), settings.threads, outputs=_outputs(fused, tasks))
        candidate = Candidate(
            name=settings.rule.value,
            share=len(find_layers(fused)),
            path=str(path),
            parameters=parameter_count(fused),
            bytes=stored_bytes(path),
            tasks=judge.score(fused),
            steps=settings.steps if losses else 0,
            seconds=time.perf_counter() - begun,
            start=settings.rule.value,
            total_layers=len(find_layers(fused)),
            losses=losses,
        )
        if settings.measure:
            bench = Bench(tasks, tasks[0].inputs, settings.threads, settings.providers)
            candidate.latency_ms, reliable = bench.latency(path)
            candidate.memory_mb = bench.memory(path)
            if not reliable:
                notes.append("The latency was measured on a busy machine and is not reliable.")
    worst = candidate.worst_drop
    within = settings.max_drop is None or worst is None or worst <= settings.max_drop
    result = Result(
        method="fuse",
        versions=library_versions(),
        inputs=[task.record() for task in tasks],
        candidates=[candidate],
        chosen=candidate.name if within else None,
        recipe=recipe,
        hardware=hardware(),
        notes=notes,
    )
    write_report(result, folder)
    return result


def _check_task(networks: Sequence[Network]) -> None:
    """The outputs of all networks agree in number and size."""
    first = networks[0]
    wanted = _heads(first)
    for other in networks[1:]:
        if _heads(other) != wanted:
            raise ModelError(
                f"{other.path}: its outputs are {_heads(other)}, those of {first.path} {wanted}: networks of one task "
                "have the same outputs; for different tasks use zip"
            )


def _heads(network: Network) -> list[list[int | None]]:
    return [list(dims(value))[1:] for value in network.model.graph.outputs]


def _reference(networks: Sequence[Network], into: str | None) -> int:
    """Number of the network whose architecture the result has."""
    if into is None:
        depths = [len(find_steps(network.model)) for network in networks]
        return depths.index(max(depths))
    for number, network in enumerate(networks):
        if into in (network.name, str(network.path)):
            return number
    raise UsageError(f"--into {into}: is none of the networks {', '.join(network.name for network in networks)}")


def _weights(networks: Sequence[Network], given: Sequence[float] | None) -> list[float]:
    weights = [1.0] * len(networks) if given is None else list(given)
    if len(weights) != len(networks) or any(weight < 0 for weight in weights) or not any(weights):
        raise UsageError(f"--weights: give a weight that is not negative for each of the {len(networks)} networks")
    return weights


def _fuse(
    tasks: Sequence[Task], weights: Sequence[float], settings: FuseSettings, progress: Progress
) -> tuple[oir.Model, list[str]]:
    """The fused network, and what a reader must know."""
    reference, *others = tasks
    notes = [f"The fused network has the architecture of {reference.name}."]
    maps = []
    for task in others:
        aligned = align_layers(
            reference, task, cost=settings.cost, seed=settings.seed, threads=settings.threads, progress=progress
        )
        maps.append(aligned.pairs)
        row = ", ".join(f"{pair.second.name} -> {pair.first.name}" for pair in aligned.pairs)
        notes += [f"Layer map of {task.name}: {row}.", *aligned.notes]
    options = FuseOptions(
        rule=settings.rule,
        balance=settings.balance,
        match=settings.match,
        ridge=settings.ridge,
        samples=settings.samples,
        seed=settings.seed,
        threads=settings.threads,
    )
    progress.stage("fuse", len(find_layers(reference.model)))
    return fuse_networks(reference, others, maps, weights, options, progress), notes


def _outputs(fused: oir.Model, tasks: Sequence[Task]) -> dict[str, list[str]]:
    """Every task has the fused network's outputs."""
    return {task.name: [value.name or "" for value in fused.graph.outputs] for task in tasks}


def _calibrate(
    fused: oir.Model, tasks: Sequence[Task], settings: FuseSettings, progress: Progress
) -> list[tuple[int, float]]:
    """Train `fused` in place towards all originals; the held-out losses."""
    from onnxmerge.methods.calibrating import calibrate_merged  # torch is loaded only when it is needed

    progress.stage("calibrate", settings.steps)
    return calibrate_merged(
        fused,
        tasks,
        _outputs(fused, tasks),
        steps=settings.steps,
        rate=settings.rate,
        labels=settings.labels,
        seed=settings.seed,
        threads=settings.threads,
        progress=progress,
    )


def _recipe(tasks: Sequence[Task], settings: FuseSettings) -> dict[str, Any]:
    """Everything that decides what the output is, as plain JSON; the reference first."""
    return json.loads(
        json.dumps(
            {
                "method": "fuse",
                "models": {task.name: sha256(task.path) for task in tasks},
                "data": {task.name: task.data.source for task in tasks},
                "settings": asdict(settings),
            }
        )
    )
