"""onnxmerge validate: a merged model against its originals."""

from pathlib import Path
from typing import Annotated

import typer

from onnxmerge.cli import options
from onnxmerge.cli.errors import reports_errors
from onnxmerge.errors import GateFailed


@reports_errors
def validate(
    merged: Annotated[Path, typer.Argument(help="The merged ONNX file.", show_default=False)],
    against: Annotated[
        list[str],
        typer.Option(
            "--against", metavar="TASK=MODEL.onnx", help="An original; repeat for each task.", show_default=False
        ),
    ],
    data: options.Data,
    atol: Annotated[float | None, typer.Option("--atol", min=0.0, help="Absolute tolerance of every output.")] = None,
    rtol: Annotated[float | None, typer.Option("--rtol", min=0.0, help="Relative tolerance of every output.")] = None,
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", min=0.0, help="Largest loss of the worst task.")
    ] = None,
    min_speedup: Annotated[float | None, typer.Option("--min-speedup", min=0.0, help="Least speed-up.")] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Held-out samples at most.")] = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    providers: options.Providers = "cpu",
    report: options.Report = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Compare a merged model with its originals in onnxruntime; exit 1 when a bound is broken."""
    from onnxmerge.data import parse_data_option
    from onnxmerge.methods.validate import Bounds, validate_model

    originals = options.task_models(against)
    result, broken = validate_model(
        merged,
        originals,
        parse_data_option(data, list(originals)),
        bounds=Bounds(atol, rtol, max_drop, min_speedup),
        samples=samples,
        seed=seed,
        threads=threads,
        providers=options.provider_list(providers),
    )
    options.show(result, as_json=as_json, report=report)
    if broken:
        raise GateFailed(f"{merged}: {broken[0]}")
