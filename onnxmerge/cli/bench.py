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
    providers: options.Providers = "cpu",
    threads: options.Threads = None,
    seed: options.Seed = 0,
    report: options.Report = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Time models on random inputs, alone or against the originals they replace; also memory and size."""
    from onnxmerge.methods.bench import bench_models

    result = bench_models(models, against, providers=options.provider_list(providers), threads=threads, seed=seed)
    options.show(result, as_json=as_json, report=report)
