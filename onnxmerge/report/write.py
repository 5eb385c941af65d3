"""Write a result beside its models."""

from pathlib import Path

from onnxmerge.files import write_text
from onnxmerge.report.page import render_page
from onnxmerge.report.schema import Result


def write_report(result: Result, folder: Path) -> None:
    """Write `report.json` and `report.html` into `folder`, each whole or not at all.

    Raises:
        UsageError: the folder cannot be written.
    """
    page = render_page(result)  # before the first file, so that a failure leaves neither
    write_text(folder / "report.json", result.to_json())
    write_text(folder / "report.html", page)
