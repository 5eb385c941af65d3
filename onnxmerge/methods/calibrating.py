"""Calibrate a zipped model with its originals as teachers: which outputs, inputs and feature taps belong together."""

from collections.abc import Mapping, Sequence

import onnx_ir as oir

from onnxmerge.calibration.objective import FeatureTap
from onnxmerge.calibration.trainer import Settings, calibrate
from onnxmerge.ir.units import find_units
from onnxmerge.methods.progress import Progress
from onnxmerge.methods.task import Task


def calibrate_zip(
    merged: oir.Model,
    tasks: Sequence[Task],
    *,
    steps: int,
    rate: float,
    labels: bool,
    seed: int,
    threads: int | None,
    progress: Progress,
) -> list[tuple[int, float]]:
    """Train `merged` in place; it keeps the weights with the least held-out loss, the start included.

    Returns:
        (step, held-out loss), step 0 first.

    Raises:
        KeyboardInterrupt: the user stopped it.
    """
    outputs = {task.name: {f"{task.name}/{output}": output for output in task.outputs} for task in tasks}
    settings = Settings(steps=steps, rate=rate, use_labels=labels, seed=seed, threads=threads)
    return _train(merged, tasks, outputs, feature_taps(merged, tasks), settings, progress)


def calibrate_fused(
    merged: oir.Model,
    tasks: Sequence[Task],
    *,
    steps: int,
    rate: float,
    labels: bool,
    seed: int,
    threads: int | None,
    progress: Progress,
) -> list[tuple[int, float]]:
    """`calibrate_zip` for one network whose outputs are those of all `tasks`, by order."""
    ours = [value.name or "" for value in merged.graph.outputs]
    outputs = {task.name: dict(zip(ours, task.outputs, strict=True)) for task in tasks}
    settings = Settings(steps=steps, rate=rate, use_labels=labels, seed=seed, threads=threads)
    return _train(merged, tasks, outputs, [], settings, progress)


def _train(
    merged: oir.Model,
    tasks: Sequence[Task],
    outputs: Mapping[str, Mapping[str, str]],
    taps: Sequence[FeatureTap],
    settings: Settings,
    progress: Progress,
) -> list[tuple[int, float]]:
    names = [value.name or "" for value in merged.graph.inputs]

    def advance(_step: int, _total: int, loss: float | None) -> None:
        progress.advance("" if loss is None else f"held-out loss {loss:.4f}")

    outcome = calibrate(
        merged,
        {task.name: task.model for task in tasks},
        outputs,
        {task.name: dict(zip(names, task.inputs, strict=True)) for task in tasks},
        taps,
        {task.name: task.data.calibration for task in tasks},
        {task.name: task.data.held_out for task in tasks},
        settings,
        advance,
    )
    if outcome.interrupted:
        raise KeyboardInterrupt
    return outcome.losses


def feature_taps(merged: oir.Model, tasks: Sequence[Task]) -> list[FeatureTap]:
    """Every cut that a task's tail still has: the adapter's output, then the end of each unit behind it."""
    computed = {value.name for node in merged.graph for value in node.outputs}
    return [
        FeatureTap(task.name, f"{task.name}/{unit.cut}", unit.cut)
        for task in tasks
        for unit in find_units(task.model)
        if f"{task.name}/{unit.cut}" in computed
    ]
