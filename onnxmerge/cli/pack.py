"""onnxmerge pack: models into one graph, unchanged."""

from pathlib import Path
from typing import Annotated

import typer

from onnxmerge.cli import options
from onnxmerge.cli.errors import reports_errors
from onnxmerge.cli.progress import Bars


@reports_errors
def pack(
    models: options.Models,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.onnx", help="The packed model.")],
    share_input: Annotated[
        list[str],
        typer.Option(
            "--share-input",
            metavar="A:x=B:y[=C:z]",
            help="Inputs that shall be one, as TASK:input; repeat for more. Inputs of equal name, type and shape are "
            "tied anyway.",
            show_default=False,
        ),
    ] = [],  # noqa: B006 (typer reads the default, nobody changes it)
    separate_inputs: Annotated[
        bool, typer.Option("--separate-inputs", help="Tie only what --share-input names; inputs become TASK/input.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Compare with the originals in onnxruntime on made-up inputs before writing; "
            "needs each model in memory.",
        ),
    ] = True,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    report: options.Report = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Pack models into one graph with the same outputs: equal weights are stored and equal sub-graphs computed once.

    The outputs of task T (the file's stem) are called T/output.
    """
    from onnxmerge.methods.pack.pack import pack_models

    with Bars(quiet) as bars:
        result = pack_models(
            models,
            output,
            share_inputs=share_input,
            separate_inputs=separate_inputs,
            check=check,
            seed=seed,
            threads=threads,
            overwrite=overwrite,
            progress=bars,
        )
    options.show(result, as_json=as_json, report=report)
