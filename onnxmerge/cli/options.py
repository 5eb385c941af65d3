"""Options that several commands share."""

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxmerge.calibration import settings
from onnxmerge.errors import GateFailed, UsageError
from onnxmerge.methods.fuse.choices import LayerCost

if TYPE_CHECKING:
    from onnxmerge.methods.bounds import Bounds
    from onnxmerge.report.schema import Result


def _limit_algebra(threads: int | None) -> int | None:
    """Keep numpy's and scipy's linear algebra to so many threads: it reads this when a command loads it."""
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS") if threads else ():
        os.environ.setdefault(name, str(threads))
    return threads


Models = Annotated[list[Path], typer.Argument(help="ONNX files.", show_default=False)]
Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="[TASK=]D",
        help="Samples: an .npz, a folder of images, a YAML data card or module:function; for all tasks or for one; "
        "or noise, a stand-in.",
        show_default=False,
    ),
]
Steps = Annotated[
    int, typer.Option("--steps", min=0, help="Calibration steps for each candidate; 0: closed form only.")
]
Labels = Annotated[bool, typer.Option("--labels/--no-labels", help="Use the data's labels in calibration.")]
Samples = Annotated[int, typer.Option("--samples", min=2, help="Unlabelled samples of each task for the closed form.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything drawn at random.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, callback=_limit_algebra, help="Threads inside one operator."),
]
Device = Annotated[
    settings.Device | None,
    typer.Option("--device", help="Where to train; default: on a GPU if there is one.", show_default=False),
]
Providers = Annotated[str, typer.Option("--providers", metavar="P[,P]", help="Where to run: cpu, cuda, tensorrt.")]
MinSpeedup = Annotated[
    float | None,
    typer.Option("--min-speedup", min=0.0, help="Least speed-up against the originals.", show_default=False),
]
JUnit = Annotated[
    Path | None,
    typer.Option(
        "--junit", metavar="FILE", help="Write each bound as a test case to FILE (JUnit XML).", show_default=False
    ),
]
Report = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Also write the report to FILE (.json or .html).")
]
TensorBoard = Annotated[
    Path | None,
    typer.Option(
        "--tensorboard",
        metavar="DIR",
        help="Write losses, rate, gradient norm and speed of every step to DIR, for TensorBoard.",
        show_default=False,
    ),
]
Cost = Annotated[
    LayerCost,
    typer.Option(
        "--cost",
        help="What the map between layers minimises: 1 - CKA, the difference of widths, the distance between layers, "
        "or the difference of their places (the longest chain).",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the files of an earlier run.")]
Resume = Annotated[bool, typer.Option("--resume", help="Keep the candidates of an interrupted run and go on.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show tracebacks.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")]


def byte_count(text: str) -> int:
    """What `--max-bytes` says: a number of bytes, or of kB, MB or GB (powers of 1000)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(kB|MB|GB)?", text.strip())
    count = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if count < 1:
        raise typer.BadParameter(f"{text!r} is no size such as 800000, 800kB or 1.5MB")
    return count


_UNITS = {None: 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}

MaxBytes = Annotated[
    int | None,
    typer.Option(
        "--max-bytes",
        metavar="N[kB|MB|GB]",
        parser=byte_count,
        help="Largest file of the merged model.",
        show_default=False,
    ),
]


def batch_sizes(text: str | None) -> list[int] | None:
    """The batch sizes in `--batch`, e.g. "1,8,32".

    Raises:
        UsageError: the text is no list of positive integers.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--batch {text}: is no list of batch sizes such as 1,8,32")
    return [int(part) for part in parts]


def tolerance(values: list[str], option: str) -> tuple[float | None, dict[str, float]]:
    """What `--atol` or `--rtol` says: of all outputs, and of single ones, as in TASK/OUTPUT=0.01.

    Raises:
        UsageError: a value is no number of 0 or more, or is given twice for the same.
    """
    found: dict[str | None, float] = {}
    for value in values:
        output, separator, text = value.rpartition("=")
        name = output if separator else None
        if name in found:
            raise UsageError(f"{option} {value}: is the second of {name or 'all outputs'}")
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf:
            raise UsageError(f"{option} {value}: {text!r} is no number of 0 or more")
        found[name] = number
    return found.pop(None, None), {name: number for name, number in found.items() if name is not None}


def provider_list(text: str) -> tuple[str, ...]:
    """The providers in `--providers`, e.g. "tensorrt,cuda"."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def task_models(values: list[str], option: str = "--against") -> dict[str, Path]:
    """What `--against TASK=MODEL.onnx ...` names, or another option; the task defaults to the file's stem.

    Raises:
        UsageError: a task is named twice.
    """
    found: dict[str, Path] = {}
    for value in values:
        task, separator, path = value.partition("=")
        if not separator or Path(value).exists():
            task, path = Path(value).stem, value
        if task in found:
            raise UsageError(f"{option}: the task {task!r} is named twice")
        found[task] = Path(path)
    return found


def weight_list(text: str | None) -> tuple[float, ...] | None:
    """The numbers of `--weights`.

    Raises:
        UsageError: the text is no list of numbers.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--weights {text}: is no list of numbers such as 1,1,0.5") from error


def show(result: "Result", *, as_json: bool, report: Path | None) -> None:
    """Print the result on stdout and write it to `report` when asked."""
    from onnxmerge.files import write_text

    if as_json:
        print(result.to_json(), end="")
    else:
        from rich.console import Console

        from onnxmerge.report.tables import print_result

        print_result(result, Console())
    if report is not None:
        from onnxmerge.report.page import render_page

        write_text(report, result.to_json() if report.suffix == ".json" else render_page(result))


def need_bounds(junit: Path | None, bounds: "Bounds") -> None:
    """See that a list of test cases will not be empty.

    Raises:
        UsageError: `junit` is asked for and no bound is.
    """
    if junit is not None and not bounds:
        raise UsageError(f"--junit {junit}: lists bounds, and none was given")


def show_checked(result: "Result", *, as_json: bool, report: Path | None, junit: Path | None) -> None:
    """The same of a result with bounds, which also go to `junit`.

    Raises:
        GateFailed: a bound is broken; all has been shown and written.
    """
    from onnxmerge.files import write_text
    from onnxmerge.report.junit import junit_xml

    show(result, as_json=as_json, report=report)
    if junit is not None:
        write_text(junit, junit_xml(result))
    if result.broken:
        raise GateFailed(*result.broken)


def print_json(data: Any) -> None:
    """Print plain data as JSON on stdout."""
    import json

    print(json.dumps(data, indent=2))
