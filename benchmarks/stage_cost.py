"""Seconds and peak memory of stages inside one process, without changing what is measured."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """Of all calls of one stage together; a stage inside another counts for itself alone."""

    seconds: float = 0.0
    processor: float = 0.0
    """Processor seconds of all threads."""
    peak: float = 0.0
    """MB of resident memory at the peak, above what the process had when counting began."""
    statistics: float = 0.0
    """MB of the largest statistics that were alive at once."""


class Stages:
    """What each stage costs. Peaks are the kernel's high-water mark of the resident set, reset at each change."""

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = {}
        self._open: list[str] = []
        self._baseline = _megabytes("VmRSS")
        self._begun = (time.perf_counter(), time.process_time())
        CLEAR.write_text("5")

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Cost]:
        """Count the block to `name`."""
        cost = self.costs.setdefault(name, Cost())
        self._close_count()
        self._open.append(name)
        try:
            yield cost
        finally:
            self._close_count()
            self._open.pop()

    def _close_count(self) -> None:
        """Give what happened since the last change to the innermost open stage."""
        peak, now = _megabytes("VmHWM") - self._baseline, (time.perf_counter(), time.process_time())
        if self._open:
            cost = self.costs[self._open[-1]]
            cost.seconds += now[0] - self._begun[0]
            cost.processor += now[1] - self._begun[1]
            cost.peak = max(cost.peak, peak)
        self._begun = now
        CLEAR.write_text("5")

    def watch(self, module: ModuleType, name: str, stage: str) -> None:
        """Count every call of what `module` calls `name` to `stage`; statistics that come in or out are measured."""
        inner: Callable[..., Any] = getattr(module, name)

        @functools.wraps(inner)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.stage(stage) as cost:
                before = array_bytes(args)
                result = inner(*args, **kwargs)
                cost.statistics = max(cost.statistics, before / 1e6, array_bytes([args, result]) / 1e6)
            return result

        setattr(module, name, watched)

    def watch_method(self, owner: type, name: str, stage: str) -> None:
        """The same for a method; statistics are not measured."""
        inner: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(inner)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.stage(stage):
                return inner(*args, **kwargs)

        setattr(owner, name, watched)


def array_bytes(value: object) -> int:
    """Bytes of the matrices in sequences, mappings and objects that hold statistics; shared memory counts once."""
    found: dict[int, int] = {}
    _collect(value, found)
    return sum(found.values())


def _collect(value: object, found: dict[int, int]) -> None:
    if isinstance(value, np.ndarray):
        owner = value
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        if value.ndim > 1:
            found[id(owner)] = owner.nbytes
    elif isinstance(value, dict):
        _collect(list(value.values()), found)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, found)
    elif type(value).__module__.endswith(("statistics", "selecting", "stage_cost")) and hasattr(value, "__dict__"):
        _collect(vars(value), found)


def _megabytes(entry: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) * 1024 / 1e6
