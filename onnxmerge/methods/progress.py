"""How a method tells what it is doing; the command line draws it, Python callers hear nothing by default."""

from typing import Protocol


class Progress(Protocol):
    """Told of stages and steps."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A new stage begins; `total` steps where known."""

    def advance(self, note: str = "") -> None:
        """One step of the stage is done."""


class Silent:
    """Says nothing."""

    def stage(self, name: str, total: int | None = None) -> None:
        """See `Progress`."""

    def advance(self, note: str = "") -> None:
        """See `Progress`."""
