"""onnxmerge gate: networks of one task and architecture into one of the same size."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnxmerge.cli import options
from onnxmerge.cli.errors import reports_errors
from onnxmerge.cli.processes import one_of_many
from onnxmerge.cli.running import run_and_show
from onnxmerge.errors import GateFailed, UsageError
from onnxmerge.methods.gate.settings import GateSettings

if TYPE_CHECKING:
    from onnxmerge.methods.gate.plan import GatePlan


@reports_errors
@one_of_many
def gate(
    models: options.Models,
    data: options.Data = [],  # noqa: B006 (typer reads the default, nobody changes it)
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Output folder.", show_default=False)
    ] = None,
    width: Annotated[
        float | None,
        typer.Option(
            "--width",
            metavar="W",
            help="Share of all networks' channels that stays in each channel space; default: 1 / networks.",
            show_default=False,
        ),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            "--heads",
            metavar="mean|apart",
            help="One mean output of networks of one task, or each network's own; default: apart where outputs differ.",
            show_default=False,
        ),
    ] = None,
    layerwise: Annotated[
        bool,
        typer.Option(
            "--layerwise", help="Learn gates one channel space at a time; the networks are never put side by side."
        ),
    ] = False,
    gate_steps: Annotated[
        int, typer.Option("--gate-steps", min=1, help="Steps in which gates learn which channels to keep.")
    ] = GateSettings.gate_steps,
    steps: Annotated[int, typer.Option("--steps", min=0, help="Steps of fine-tuning afterwards; 0: none.")] = (
        GateSettings.steps
    ),
    labels: Annotated[
        bool | None,
        typer.Option(
            "--labels/--no-labels",
            help="Learn from the data's labels, or from the networks' mean; default: labels where there are some.",
            show_default=False,
        ),
    ] = None,
    mean_weight: Annotated[
        float,
        typer.Option(
            "--mean-weight",
            metavar="W",
            min=0.0,
            help="Of classifiers with labels: fine-tune towards the networks' mean too, W times as much as to labels.",
        ),
    ] = GateSettings.mean_weight,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples of each data set in a step.")] = (
        GateSettings.batch
    ),
    rate: Annotated[
        float, typer.Option("--rate", help="Highest learning rate; of adamw as a share of each array's size.")
    ] = GateSettings.rate,
    optimiser: Annotated[
        str,
        typer.Option(
            "--optimiser", metavar="adamw|sgd", help="adamw with one cycle in each training, or sgd at a constant rate."
        ),
    ] = GateSettings.optimiser,
    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", min=0.0, help="Largest loss against any original.", show_default=False),
    ] = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    device: options.Device = None,
    providers: options.Providers = "cpu",
    report: options.Report = None,
    tensorboard: options.TensorBoard = None,
    dry_run: options.DryRun = False,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Make one network out of several of one task and architecture, of the size of one and better than each.

    Writes merged.onnx, one model for each candidate, plan.json, report.json and report.html to DIR.
    """
    from onnxmerge.data import parse_data_option
    from onnxmerge.methods.gate.gate import gate_models, plan_gate
    from onnxmerge.methods.task import task_names

    settings = GateSettings(
        width=width,
        heads=heads,  # type: ignore[arg-type]  # refused there if it is none
        layerwise=layerwise,
        gate_steps=gate_steps,
        steps=steps,
        labels=labels,
        mean_weight=mean_weight,
        batch=batch,
        rate=rate,
        optimiser=optimiser,  # type: ignore[arg-type]  # refused there if it is none
        max_drop=max_drop,
        seed=seed,
        threads=threads,
        device=device,
        providers=options.provider_list(providers),
    )
    if dry_run:
        _print_plan(plan_gate(models, settings=settings), as_json)
        return
    if output is None:
        raise UsageError("give an output folder with -o DIR (or --dry-run to see the plan only)")
    sources = parse_data_option(data, task_names(models))
    result = run_and_show(
        lambda bars: gate_models(
            models, sources, output, settings=settings, overwrite=overwrite, resume=resume, progress=bars
        ),
        quiet=quiet,
        as_json=as_json,
        report=report,
        log=tensorboard,
    )
    if result.chosen is None:
        raise GateFailed(f"no candidate stays within --max-drop {max_drop:g}; see {output / 'report.html'}")


def _print_plan(plan: "GatePlan", as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    if as_json:
        print(plan.to_json(), end="")
        return
    table = Table("channel space", "channels of all", "stay", "")
    for space in plan.spaces:
        table.add_row(space.name, str(space.channels), str(space.keep), space.reason or "")
    Console().print(table)
