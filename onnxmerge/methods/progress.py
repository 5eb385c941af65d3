"""How a method tells what it is doing; the command line draws it, Python callers hear nothing by default."""

from collections.abc import Mapping
from typing import Protocol

from onnxmerge.calibration.log import Log


class Progress(Protocol):
    """Told of stages and steps."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A new stage begins; `total` steps where known."""

    def advance(self, note: str = "") -> None:
        """One step of the stage is done."""

    def measured(self, step: int, scalars: Mapping[str, float]) -> None:
        """What a step of training came to, by name (see `calibration.engine.Done`)."""


class Silent:
    """Says nothing."""

    def stage(self, name: str, total: int | None = None) -> None:
        """See `Progress`."""

    def advance(self, note: str = "") -> None:
        """See `Progress`."""

    def measured(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Progress`."""


class Logged:
    """Tells `progress`, and writes what trainings come to into `log`, each stage by itself."""

    def __init__(self, progress: Progress, log: Log):
        self._progress, self._log = progress, log

    def stage(self, name: str, total: int | None = None) -> None:
        """See `Progress`."""
        self._log.begin(name)
        self._progress.stage(name, total)

    def advance(self, note: str = "") -> None:
        """See `Progress`."""
        self._progress.advance(note)

    def measured(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Progress`."""
        self._log.write(step, scalars)
        self._progress.measured(step, scalars)
