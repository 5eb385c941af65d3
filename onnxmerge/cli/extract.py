"""onnxmerge extract: one task back out of a merged model."""

from pathlib import Path
from typing import Annotated

import typer

from onnxmerge.cli import options
from onnxmerge.cli.errors import reports_errors


@reports_errors
def extract(
    merged: Annotated[Path, typer.Argument(help="What pack or zip wrote.", show_default=False)],
    task: Annotated[str, typer.Option("--task", metavar="TASK", help="The task to take out.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.onnx", help="The extracted model.")],
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Take one task out of a merged model; inputs and outputs get the names they had in the original."""
    from onnxmerge.ir.layers import parameter_count
    from onnxmerge.ir.save import stored_bytes
    from onnxmerge.methods.extract import extract_task

    model = extract_task(merged, task, output, overwrite=overwrite)
    found = {
        "path": str(output),
        "task": task,
        "inputs": [value.name for value in model.graph.inputs],
        "outputs": [value.name for value in model.graph.outputs],
        "parameters": parameter_count(model),
        "bytes": stored_bytes(output),
    }
    if as_json:
        options.print_json(found)
    else:
        for name, value in found.items():
            print(f"{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
