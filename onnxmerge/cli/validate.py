"""onnxmerge validate: a merged model against its originals."""

from pathlib import Path
from typing import Annotated

import typer

from onnxmerge.cli import options
from onnxmerge.cli.errors import reports_errors


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
    atol: Annotated[
        list[str],
        typer.Option(
            "--atol",
            metavar="F|TASK/OUTPUT=F",
            help="Absolute tolerance of every output, or of one; repeat for more.",
            show_default=False,
        ),
    ] = [],  # noqa: B006 (typer reads the default, nobody changes it)
    rtol: Annotated[
        list[str],
        typer.Option(
            "--rtol", metavar="F|TASK/OUTPUT=F", help="Relative tolerance, in the same way.", show_default=False
        ),
    ] = [],  # noqa: B006
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", min=0.0, help="Largest loss of the worst task.", show_default=False)
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(
            "--min-agreement",
            min=0.0,
            max=1.0,
            help="Least share of samples on which the worst task agrees with its original.",
            show_default=False,
        ),
    ] = None,
    max_bytes: options.MaxBytes = None,
    min_speedup: options.MinSpeedup = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Held-out samples at most.")] = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    providers: options.Providers = "cpu",
    report: options.Report = None,
    junit: options.JUnit = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Compare a merged model with its originals in onnxruntime; exit 1 when a bound is broken."""
    from onnxmerge.data import parse_data_option
    from onnxmerge.methods.bounds import Bounds
    from onnxmerge.methods.validate import validate_model

    originals = options.task_models(against)
    every_atol, output_atol = options.tolerance(atol, "--atol")
    every_rtol, output_rtol = options.tolerance(rtol, "--rtol")
    bounds = Bounds(
        atol=every_atol,
        rtol=every_rtol,
        max_drop=max_drop,
        min_speedup=min_speedup,
        min_agreement=min_agreement,
        max_bytes=max_bytes,
        output_atol=output_atol,
        output_rtol=output_rtol,
    )
    options.need_bounds(junit, bounds)
    result, _ = validate_model(
        merged,
        originals,
        parse_data_option(data, list(originals)),
        bounds=bounds,
        samples=samples,
        seed=seed,
        threads=threads,
        providers=options.provider_list(providers),
    )
    options.show_checked(result, as_json=as_json, report=report, junit=junit)
