"""Run a method that makes candidates: progress while it runs, its result shown, also when it is interrupted."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from onnxmerge.cli import options
from onnxmerge.cli.progress import shown
from onnxmerge.methods.progress import Progress

if TYPE_CHECKING:
    from onnxmerge.report.schema import Result


def run_and_show(
    make: Callable[[Progress], "Result"], *, quiet: bool, as_json: bool, report: Path | None, log: Path | None = None
) -> "Result":
    """Show what `make` returns, and return it; `log`: where its trainings are logged.

    Raises:
        KeyboardInterrupt: the user stopped it; what was finished has been shown.
    """
    from onnxmerge.methods.candidates import Interrupted

    try:
        with shown(quiet, log) as progress:
            result = make(progress)
    except Interrupted as stopped:
        options.show(stopped.result, as_json=as_json, report=report)
        raise KeyboardInterrupt(f"interrupted; {stopped.result.notes[-1]} --resume goes on from there") from stopped
    options.show(result, as_json=as_json, report=report)
    return result
