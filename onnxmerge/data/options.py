"""The command line's `--data`."""

from collections.abc import Sequence
from pathlib import Path

from onnxmerge.errors import UsageError


def parse_data_option(values: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """Which data source each task uses.

    Args:
        values: What `--data` was given: `D` for all tasks, or `TASK=D` for one, which goes before. A value with
            an `=` that is the path of something that exists is a path.
        tasks: The names of all tasks.

    Returns:
        One source for each task, in the order of `tasks`.

    Raises:
        UsageError: a task is unknown, has no source, or has two.
    """
    for_all: str | None = None
    for_one: dict[str, str] = {}
    for value in values:
        task, separator, source = value.partition("=")
        if not separator or Path(value).exists():
            if for_all is not None:
                raise UsageError(f"--data: both {for_all} and {value} are given for all tasks")
            for_all = value
        elif task not in tasks:
            raise UsageError(f"--data {value}: there is no task {task!r}; the tasks are {', '.join(tasks)}")
        elif task in for_one:
            raise UsageError(f"--data: both {for_one[task]} and {source} are given for the task {task!r}")
        else:
            for_one[task] = source
    sources = {task: for_one.get(task, for_all or "") for task in tasks}
    for task, source in sources.items():
        if not source:
            raise UsageError(f"--data: the task {task!r} has no data; give --data D for all tasks or --data {task}=D")
    return sources
