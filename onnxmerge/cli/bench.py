"""onnxmerge bench: latency, memory and size."""

from typing import Annotated

import typer

from onnxmerge.cli import options
from onnxmerge.cli.errors import reports_errors


@reports_errors
def bench(
    models: options.Models,
    against: Annotated[
        list[str],
        typer.Option("--against", metavar="MODEL.onnx", help="An original; repeat for each.", show_default=False),
    ] = [],  # noqa: B006 (typer reads the default, nobody changes it)
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            metavar="N[,N]",
            help="Samples in one run, e.g. 1,8,32. Default 1, or what a model is fixed to.",
            show_default=False,
        ),
    ] = None,
    max_bytes: options.MaxBytes = None,
    min_speedup: options.MinSpeedup = None,
    providers: options.Providers = "cpu",
    threads: options.Threads = None,
    seed: options.Seed = 0,
    report: options.Report = None,
    junit: options.JUnit = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Time models on random inputs, alone or against the originals they replace; also memory and size.

    Exit 1 when a bound is broken, by any of the models at any batch size.
    """
    from onnxmerge.methods.bench import bench_models
    from onnxmerge.methods.bounds import Bounds

    bounds = Bounds(max_bytes=max_bytes, min_speedup=min_speedup)
    options.need_bounds(junit, bounds)
    result = bench_models(
        models,
        against,
        batches=options.batch_sizes(batch),
        bounds=bounds,
        providers=options.provider_list(providers),
        threads=threads,
        seed=seed,
    )
    options.show_checked(result, as_json=as_json, report=report, junit=junit)
