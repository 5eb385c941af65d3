"""onnxmerge fuse: networks of one task into one."""

from pathlib import Path
from typing import Annotated

import typer

from onnxmerge.cli import options
from onnxmerge.cli.errors import reports_errors
from onnxmerge.cli.progress import Bars
from onnxmerge.errors import GateFailed, UsageError
from onnxmerge.methods.choices import Balance, Rule


@reports_errors
def fuse(
    models: options.Models,
    data: options.Data = [],  # noqa: B006 (typer reads the default, nobody changes it)
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Output folder.", show_default=False)
    ] = None,
    into: Annotated[
        str | None,
        typer.Option("--into", metavar="MODEL", help="Whose architecture the result has; default: the deepest."),
    ] = None,
    rule: Annotated[Rule, typer.Option("--rule", help="How aligned weights become one.")] = Rule.LEAST_SQUARES,
    balance: Annotated[
        Balance, typer.Option("--balance", help="Add identities to the shallower network, or collapse layers.")
    ] = Balance.ADD,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="W,W,...", help="Weight of each network.", show_default=False)
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", min=0.0, help="Largest loss against any original.", show_default=False),
    ] = None,
    steps: options.Steps = 0,
    labels: options.Labels = False,
    samples: options.Samples = 10_000,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    providers: options.Providers = "cpu",
    report: options.Report = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Fuse networks of one task, whatever their depths and widths, into one network of the size of one.

    Writes merged.onnx, report.json and report.html to DIR.
    """
    from onnxmerge.data import parse_data_option
    from onnxmerge.methods.fuse import FuseSettings, fuse_models
    from onnxmerge.methods.task import task_names

    if output is None:
        raise UsageError("give an output folder with -o DIR")
    settings = FuseSettings(
        into=into,
        rule=rule,
        balance=balance,
        weights=_weights(weights),
        max_drop=max_drop,
        steps=steps,
        samples=samples,
        labels=labels,
        seed=seed,
        threads=threads,
        providers=options.provider_list(providers),
    )
    sources = parse_data_option(data, task_names(models))
    with Bars(quiet) as bars:
        result = fuse_models(models, sources, output, settings=settings, overwrite=overwrite, progress=bars)
    options.show(result, as_json=as_json, report=report)
    if result.chosen is None:
        raise GateFailed(f"the fused network does not stay within --max-drop {max_drop:g}; it is in {output}")


def _weights(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--weights {text}: is no list of numbers such as 1,1,0.5") from error
