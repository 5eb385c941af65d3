"""The Typer application and its entry point."""

import typer

from onnxmerge.cli import align, bench, calibrate, demo, extract, fuse, gate, inspect, pack, validate, zip

app = typer.Typer(
    name="onnxmerge",
    help="Merge trained ONNX networks of different tasks into one that does all their jobs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("inspect")(inspect.inspect)
app.command("align")(align.align)
app.command("pack")(pack.pack)
app.command("zip")(zip.zip)
app.command("fuse")(fuse.fuse)
app.command("gate")(gate.gate)
app.command("calibrate")(calibrate.calibrate)
app.command("validate")(validate.validate)
app.command("extract")(extract.extract)
app.command("bench")(bench.bench)
app.command("demo")(demo.demo)


def main() -> None:
    """Entry point of the `onnxmerge` command."""
    app()
