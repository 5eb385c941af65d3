"""onnxmerge apply: passes and edits on one model."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnxmerge.cli import options
from onnxmerge.cli.errors import reports_errors

if TYPE_CHECKING:
    from onnxmerge.methods.apply import Rewritten


@reports_errors
def apply(
    model: Annotated[Path, typer.Argument(help="ONNX file.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.onnx", help="The rewritten model.")],
    passes: Annotated[
        list[str],
        typer.Option(
            "--pass",
            metavar="NAME",
            help="A pass that `onnxmerge passes` lists, or module:Class; repeat for several, in order.",
            show_default=False,
        ),
    ] = [],  # noqa: B006 (typer reads the default, nobody changes it)
    settings: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="[NAME.]KEY=VALUE",
            help="A setting of the pass; with several passes name it.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    edits: Annotated[
        list[str],
        typer.Option(
            "--edit",
            metavar="module:function",
            help="Your function on an onnx_graphsurgeon.Graph, after the passes; repeat for several.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    exact: Annotated[
        bool, typer.Option("--exact", help="Outputs must stay equal after every step, not only after exact passes.")
    ] = False,
    change_interface: Annotated[
        bool, typer.Option("--change-interface", help="Inputs and outputs may change their names, types or number.")
    ] = False,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Rewrite a model by passes and your own edits; each is checked before and after, exit 1 when outputs change."""
    from onnxmerge.methods.apply import apply_model

    found = apply_model(
        model,
        output,
        passes=passes,
        settings=settings,
        edits=edits,
        exact=exact,
        change_interface=change_interface,
        seed=seed,
        threads=threads,
        overwrite=overwrite,
    )
    if as_json:
        options.print_json({**asdict(found), "path": str(found.path)})
    else:
        _print(found)


def _print(found: "Rewritten") -> None:
    for step in found.steps:
        print(f"{step.kind} {step.name}{' (exact)' if step.exact else ''}: {_told(step.differences)}")
    for name, (before, after) in (("parameters", found.parameters), ("bytes", found.bytes)):
        print(f"{name}: {before:,} -> {after:,}")
    for note in found.notes:
        print(f"note: {note}")
    print(found.path)


def _told(differences: object) -> str:
    if not isinstance(differences, dict):
        return "outputs not compared"
    name = max(differences, key=differences.__getitem__)
    largest = differences[name]
    return "outputs equal bit for bit" if largest == 0 else f"largest relative difference {largest:.1e} ({name})"
