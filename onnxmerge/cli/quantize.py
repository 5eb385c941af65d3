"""onnxmerge quantize: a model in 8-bit integers or float16."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from onnxmerge.cli import options
from onnxmerge.cli.errors import reports_errors
from onnxmerge.errors import GateFailed


class Precision(StrEnum):
    """What `--to` takes."""

    INT8 = "int8"
    FLOAT16 = "float16"


@reports_errors
def quantize(
    model: Annotated[Path, typer.Argument(help="ONNX file.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.onnx", help="The quantized model.")],
    to: Annotated[Precision, typer.Option("--to", help="The precision.", show_default=False)],
    data: options.Data = [],  # noqa: B006 (typer reads the default, nobody changes it)
    samples: Annotated[
        int, typer.Option("--samples", min=2, help="Samples of each task that the ranges of values are taken from.")
    ] = 256,
    keep: Annotated[
        list[str],
        typer.Option("--keep", metavar="LAYER", help="A layer or node that stays in float32.", show_default=False),
    ] = [],  # noqa: B006
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", min=0.0, help="Largest loss of the worst task.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Measure latency.")] = True,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    providers: options.Providers = "cpu",
    report: options.Report = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Write a model in 8-bit integers (static, QDQ) or float16, and say what each task loses and what is saved."""
    from onnxmerge.methods.quantize import quantize_model

    result, broken = quantize_model(
        model,
        output,
        to.value,
        data,
        samples=samples,
        keep=keep,
        max_drop=max_drop,
        measure=measure,
        seed=seed,
        threads=threads,
        providers=options.provider_list(providers),
        overwrite=overwrite,
    )
    options.show(result, as_json=as_json, report=report)
    if broken:
        raise GateFailed(*(f"{sentence}; nothing was written" for sentence in broken))
