"""The Typer application and its entry point."""

from typing import Annotated

import typer

from onnxmerge.cli import (
    align,
    apply,
    bench,
    calibrate,
    demo,
    extract,
    fuse,
    gate,
    inspect,
    pack,
    passes,
    quantize,
    run,
    triton,
    validate,
    zip,
)
from onnxmerge.cli.errors import Commands
from onnxmerge.cli.recipe import Told


def _print_version(asked: bool) -> None:
    if asked:
        from onnxmerge import __version__

        print(f"onnxmerge {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="onnxmerge",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def onnxmerge(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Print the version and stop.", callback=_print_version)
    ] = False,
) -> None:
    """Merge trained ONNX networks of different tasks into one that does all their jobs."""


app.command("inspect", cls=Told)(inspect.inspect)
app.command("align", cls=Told)(align.align)
app.command("pack", cls=Told)(pack.pack)
app.command("zip", cls=Told)(zip.zip)
app.command("fuse", cls=Told)(fuse.fuse)
app.command("gate", cls=Told)(gate.gate)
app.command("calibrate", cls=Told)(calibrate.calibrate)
app.command("quantize", cls=Told)(quantize.quantize)
app.command("validate", cls=Told)(validate.validate)
app.command("extract", cls=Told)(extract.extract)
app.command("apply", cls=Told)(apply.apply)
app.command("bench", cls=Told)(bench.bench)
app.command("triton", cls=Told)(triton.triton)
app.command("run")(run.run)
app.command("passes")(passes.passes)
app.command("demo")(demo.demo)


def main() -> None:
    """Entry point of the `onnxmerge` command."""
    app(prog_name="onnxmerge")
