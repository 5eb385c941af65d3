"""onnxmerge triton: a model in a Triton model repository."""

from pathlib import Path
from typing import Annotated

import typer

from onnxmerge.cli import options
from onnxmerge.cli.errors import reports_errors


@reports_errors
def triton(
    model: Annotated[Path, typer.Argument(help="ONNX file.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="REPOSITORY", help="The model repository.")],
    name: Annotated[
        str | None, typer.Option("--name", help="The model's name; the file's stem if not given.", show_default=False)
    ] = None,
    version: Annotated[int, typer.Option("--version", min=1, help="The version.")] = 1,
    max_batch: Annotated[
        int | None,
        typer.Option(
            "--max-batch",
            min=0,
            help="Largest batch that Triton makes up of requests; 0: none. Default: 8 where the batch is free, else 0.",
            show_default=False,
        ),
    ] = None,
    threads: options.Threads = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace this version.")] = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Put a model into a Triton model repository, with a config.pbtxt that fits it; other versions stay."""
    from onnxmerge.methods.triton import place_model

    placed = place_model(
        model, output, name=name, version=version, max_batch=max_batch, threads=threads, overwrite=overwrite
    )
    found = {
        "model": str(placed.model),
        "config": str(placed.config),
        "config_kept": placed.kept,
        "max_batch_size": placed.max_batch,
        "versions": list(placed.versions),
    }
    if as_json:
        options.print_json(found)
    else:
        print(f"model: {placed.model}")
        print(f"config: {placed.config}{' (as it was)' if placed.kept else ''}")
        print(f"max_batch_size: {placed.max_batch}")
        print(f"versions: {', '.join(map(str, placed.versions))}")
