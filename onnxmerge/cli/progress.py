"""Progress bars on stderr; silent when stderr is not a terminal or --quiet is given."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from onnxmerge.calibration.log import Log
from onnxmerge.methods.progress import Logged, Progress


@contextlib.contextmanager
def shown(quiet: bool, log: Path | None) -> Iterator[Progress]:
    """Bars, and a log in the folder `log` where one is wanted.

    Raises:
        UsageError: the log cannot be written.
    """
    with contextlib.ExitStack() as stack:
        written = None if log is None else stack.enter_context(contextlib.closing(Log(log)))
        bars = stack.enter_context(Bars(quiet))
        yield bars if written is None else Logged(bars, written)


class Bars:
    """Draws `onnxmerge.methods.progress.Progress` with rich: one line for the stage under way."""

    def __init__(self, quiet: bool):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Drawn
        from rich.progress import TimeRemainingColumn as Remaining

        self._bars = Drawn(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            Remaining(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
            disable=quiet or not sys.stderr.isatty(),
        )
        self._task = self._bars.add_task("", total=None, note="", visible=False)

    def __enter__(self) -> "Bars":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def stage(self, name: str, total: int | None = None) -> None:
        """A new stage begins; `total` steps where known."""
        self._bars.reset(self._task, total=total, description=name, note="", visible=True)

    def advance(self, note: str = "") -> None:
        """One step of the stage is done."""
        if note:
            self._bars.update(self._task, advance=1, note=note)
        else:
            self._bars.update(self._task, advance=1)

    def measured(self, step: int, scalars: Mapping[str, float]) -> None:
        """Bars show what `advance` notes."""
