"""onnxmerge zip: networks of different tasks into one."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from onnxmerge.cli import options
from onnxmerge.cli.errors import reports_errors
from onnxmerge.cli.progress import Bars
from onnxmerge.errors import GateFailed, UsageError


class Mode(StrEnum):
    """What sharing means."""

    COMPUTE = "compute"


@reports_errors
def zip(
    models: options.Models,
    data: options.Data = [],  # noqa: B006 (typer reads the default, nobody changes it)
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Output folder.", show_default=False)
    ] = None,
    share: Annotated[
        str,
        typer.Option("--share", metavar="auto|K|FRACTION|plan.json", help="How many units to share; auto tries all."),
    ] = "auto",
    mode: Annotated[Mode, typer.Option("--mode", help="compute: shared channels are computed once.")] = Mode.COMPUTE,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            min=0.0,
            help="Largest loss of the worst task: accuracy where labels exist, else agreement, else relative error. "
            "Default 0.01 with --share auto; with an explicit --share it is a bound only when given.",
            show_default=False,
        ),
    ] = None,
    steps: options.Steps = 300,
    labels: options.Labels = False,
    samples: options.Samples = 2000,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    providers: options.Providers = "cpu",
    report: options.Report = None,
    dry_run: options.DryRun = False,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Zip networks of different tasks into one multi-task network that computes their first layers once.

    Writes merged.onnx (the chosen one), one model for each candidate, plan.json, report.json and report.html to DIR.
    """
    from onnxmerge.data import parse_data_option
    from onnxmerge.methods.candidates import Interrupted
    from onnxmerge.methods.task import task_names
    from onnxmerge.methods.zip import ZipSettings, plan_zip, zip_models

    names = task_names(models)
    if dry_run:
        _print_plan(plan_zip(models, share), as_json)
        return
    if output is None:
        raise UsageError("give an output folder with -o DIR (or --dry-run to see the plan only)")
    explicit = share != "auto"
    settings = ZipSettings(
        share=share,
        max_drop=max_drop if explicit or max_drop is not None else ZipSettings.max_drop,
        steps=steps,
        samples=samples,
        labels=labels,
        seed=seed,
        threads=threads,
        providers=options.provider_list(providers),
    )
    sources = parse_data_option(data, names)
    try:
        with Bars(quiet) as bars:
            result = zip_models(
                models, sources, output, settings=settings, overwrite=overwrite, resume=resume, progress=bars
            )
    except Interrupted as stopped:
        options.show(stopped.result, as_json=as_json, report=report)
        raise KeyboardInterrupt(f"interrupted; {stopped.result.notes[-1]} --resume goes on from there") from stopped
    options.show(result, as_json=as_json, report=report)
    if result.chosen is None:
        raise GateFailed(f"no candidate stays within --max-drop {settings.max_drop:g}; see {output / 'report.html'}")


def _print_plan(plan: object, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from onnxmerge.methods.plan import Plan

    assert isinstance(plan, Plan)
    if as_json:
        print(plan.to_json(), end="")
        return
    table = Table("k", "unit", "kind", "layers", "parameters", "MACs", "MACs of all tasks with k shared")
    for k in range(len(plan.units) + 1):
        unit = plan.units[k - 1] if k else None
        predicted = plan.predicted_macs.get(k)
        cells = ["nothing shared", "", "", "", ""]
        if unit is not None:
            macs = "" if unit.macs is None else f"{unit.macs:,}"
            cells = [unit.name, unit.kind, str(len(unit.layers)), f"{unit.parameters:,}", macs]
        share = "" if predicted is None or not plan.original_macs else f" ({predicted / plan.original_macs:.0%})"
        table.add_row(str(k), *cells, "" if predicted is None else f"{predicted:,}{share}")
    console = Console()
    console.print(table)
    console.print(
        f"k to try: {', '.join(map(str, plan.share))}. At most {len(plan.units)} can be shared: {plan.limit}."
    )
