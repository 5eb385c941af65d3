"""What a merged file makes of a few held-out samples, beside its originals, where their outputs are images."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onnxmerge.data import Batch
from onnxmerge.ir.load import read
from onnxmerge.methods.task import Task, task_outputs
from onnxmerge.report.panels import black_and_white, is_image, to_png
from onnxmerge.report.schema import Pictures, TaskPictures
from onnxmerge.runtime.session import open_session, run

SAMPLES = 3
"""How many samples of each data source are shown."""


def held_out_pictures(tasks: Sequence[Task], merged: Path, *, threads: int | None = None) -> list[Pictures]:
    """The first held-out samples as the originals' files and the file `merged` see them; onnxruntime runs both.

    Of each task the first output that is an image is shown; tasks without any are left out. Tasks that read the same
    data share their rows.

    Args:
        tasks: the originals.
        merged: a multi-task model, whose outputs are called `TASK/output`.
        threads: for onnxruntime.

    Raises:
        ModelError, UsageError: see `onnxmerge.runtime.session`.
    """
    sources: dict[int, list[Task]] = {}
    for task in tasks:
        sources.setdefault(id(task.data), []).append(task)
    return [row for shown in sources.values() for row in _of_source(shown, merged, len(sources) > 1, threads)]


def _of_source(tasks: Sequence[Task], merged: Path, several: bool, threads: int | None) -> list[Pictures]:
    batches = [batch for _, batch in zip(range(SAMPLES), tasks[0].data.held_out.batches(1), strict=False)]
    found = {task.name: pair for task in tasks if (pair := _images(task, merged, batches, threads)) is not None}
    if not found:
        return []
    seen = next((array for array in _joined([batch.inputs for batch in batches]).values() if is_image(array)), None)
    inputs = None if seen is None else _pngs(seen, seen)
    rows = []
    drawn = {task: (_pngs(ours, theirs), _pngs(theirs, theirs)) for task, (ours, theirs) in found.items()}
    for number in range(len(batches)):
        pictures = [
            TaskPictures(
                task=task,
                original=drawn[task][1][number],
                merged=drawn[task][0][number],
                relative_error=_relative_error(ours[number], theirs[number]),
            )
            for task, (ours, theirs) in found.items()
        ]
        of = f" of {tasks[0].name}" if several else ""
        sample = None if inputs is None else inputs[number]
        rows.append(Pictures(title=f"Held-out sample {number + 1}{of}", sample=sample, tasks=pictures))
    return rows


def _images(
    task: Task, merged: Path, batches: Sequence[Batch], threads: int | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """[samples, channels, height, width] of the merged file and of the original; None where no output is an image."""
    names = task_outputs([task])[task.name]
    original = open_session(task.path, threads=threads)
    theirs = _joined([run(original, batch.inputs) for batch in batches])
    place = next((n for n, array in enumerate(theirs.values()) if is_image(array)), None)
    if place is None:
        return None
    whole = open_session(merged, threads=threads)
    feeds = task.merged_feeds(task.data.held_out, read(merged)).batches(1)
    ours = _joined([run(whole, feed, [names[place]]) for feed in itertools.islice(feeds, len(batches))])
    return ours[names[place]], list(theirs.values())[place]


def _joined(batches: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def _pngs(images: np.ndarray, like: np.ndarray) -> list[bytes]:
    black, white = black_and_white(like)
    return [to_png(image, black, white) for image in images]


def _relative_error(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    size = float(np.linalg.norm(theirs.astype(np.float64)))
    return float(np.linalg.norm(ours.astype(np.float64) - theirs)) / size if size > 0 else None
