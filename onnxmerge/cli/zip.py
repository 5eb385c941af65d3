"""onnxmerge zip: networks of different tasks into one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnxmerge.cli import options
from onnxmerge.cli.errors import reports_errors
from onnxmerge.cli.processes import one_of_many
from onnxmerge.cli.running import run_and_show
from onnxmerge.errors import GateFailed, UsageError
from onnxmerge.methods.zip.choices import TREE, Mode, Pairing, Rule, Start

if TYPE_CHECKING:
    from rich.table import Table

    from onnxmerge.methods.zip.structure import Size


@reports_errors
@one_of_many
def zip(
    models: options.Models,
    data: options.Data = [],  # noqa: B006 (typer reads the default, nobody changes it)
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Output folder.", show_default=False)
    ] = None,
    share: Annotated[
        str,
        typer.Option(
            "--share",
            metavar="auto|tree|K|FRACTION|plan.json",
            help="How many units to share; auto tries all, tree then lets groups of tasks share further.",
        ),
    ] = "auto",
    width: Annotated[
        list[float],
        typer.Option(
            "--width",
            min=0.05,
            help="Channels that a task reads of the stem, relative to the first network; may be repeated.",
        ),
    ] = [1.0],  # noqa: B006
    sharing: Annotated[
        list[float],
        typer.Option("--sharing", help="Share of these channels that is computed once for all; may be repeated."),
    ] = [1.0],  # noqa: B006
    mode: Annotated[
        Mode, typer.Option("--mode", help="Compute shared channels once, or hold shared weights once.")
    ] = Mode.COMPUTE,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            min=0.0,
            help="Largest loss of the worst task: accuracy where labels exist, else agreement, else relative error. "
            "Default 0.01 with --share auto or tree; with another --share it is a bound only when given.",
            show_default=False,
        ),
    ] = None,
    max_bytes: options.MaxBytes = None,
    min_speedup: options.MinSpeedup = None,
    start: Annotated[
        list[Start],
        typer.Option("--start", help="Where stems start from; may be repeated: the best on held-out samples is taken."),
    ] = [],  # noqa: B006
    rule: Annotated[
        Rule, typer.Option("--rule", help="How shared weights are made, in weights mode.")
    ] = Rule.LEAST_SQUARES,
    pairing: Annotated[
        Pairing, typer.Option("--pairing", help="How neurons are paired, in weights mode.")
    ] = Pairing.ASSIGNMENT,
    max_difference: Annotated[
        float | None,
        typer.Option(
            "--max-difference",
            min=0.0,
            help="Share neurons only where their functional difference is at most this part of their layer's energy, "
            "in weights mode.",
            show_default=False,
        ),
    ] = None,
    retrain: Annotated[
        int, typer.Option("--retrain", min=0, help="Steps after each shared layer, in weights mode.")
    ] = 0,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", metavar="W,W,...", help="How much each task counts in what is shared.", show_default=False
        ),
    ] = None,
    steps: options.Steps = 300,
    labels: options.Labels = False,
    samples: options.Samples = 2000,
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
    """Zip networks of different tasks into one multi-task network that computes their first layers once.

    Writes merged.onnx (the chosen one), one model for each candidate, plan.json, report.json and report.html to DIR.
    """
    from onnxmerge.data import parse_data_option
    from onnxmerge.methods.task import task_names
    from onnxmerge.methods.zip.settings import ZipSettings
    from onnxmerge.methods.zip.zip import plan_zip, zip_models

    names = task_names(models)
    if max_difference is not None and mode is not Mode.WEIGHTS:
        raise UsageError("--max-difference is for --mode weights")
    if dry_run:
        _print_plan(plan_zip(models, share, width, sharing, mode), share, max_difference, as_json)
        return
    if output is None:
        raise UsageError("give an output folder with -o DIR (or --dry-run to see the plan only)")
    explicit = share not in ("auto", TREE)
    budget = max_bytes is not None or min_speedup is not None
    settings = ZipSettings(
        share=share,
        width=tuple(width),
        sharing=tuple(sharing),
        max_drop=max_drop if explicit or budget or max_drop is not None else ZipSettings.max_drop,
        max_bytes=max_bytes,
        min_speedup=min_speedup,
        mode=mode,
        rule=rule,
        pairing=pairing,
        max_difference=max_difference,
        retrain=retrain,
        start=tuple(start) or ZipSettings.start,
        weights=options.weight_list(weights),
        steps=steps,
        samples=samples,
        labels=labels,
        seed=seed,
        threads=threads,
        device=device,
        providers=options.provider_list(providers),
    )
    sources = parse_data_option(data, names)
    result = run_and_show(
        lambda bars: zip_models(
            models, sources, output, settings=settings, overwrite=overwrite, resume=resume, progress=bars
        ),
        quiet=quiet,
        as_json=as_json,
        report=report,
        log=tensorboard,
    )
    if result.chosen is None:
        raise GateFailed(f"{result.notes[-1]} See {output / 'report.html'}")


def _print_plan(plan: object, share: str, max_difference: float | None, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from onnxmerge.methods.zip.plan import Plan

    assert isinstance(plan, Plan)
    if as_json:
        print(plan.to_json(), end="")
        return
    table = Table("candidate", "units", "up to", "parameters", "MB", "MACs", "of the originals", "ideal speed-up")
    originals = plan.originals
    _add_row(table, "originals", "", "", originals, originals)
    for candidate in plan.candidates:
        last = plan.units[candidate.units - 1].name if candidate.units else "nothing shared"
        units = ", ".join([str(candidate.units), *(f"{branch.name} {branch.units}" for branch in candidate.branches)])
        _add_row(table, candidate.name, units, last, candidate.predicted, originals)
    console = Console()
    console.print(table)
    console.print(f"At most {len(plan.units)} units can be shared: {plan.limit}.")
    if share == TREE:
        console.print(
            "Trees are planned when these candidates are measured: groups of tasks that keep --max-drop deeper."
        )
    if max_difference is not None:
        console.print(
            f"With --max-difference {max_difference:g} how many neurons are shared is decided while walking: each "
            "candidate shares at most what stands here, so its parameters and MB are lower bounds."
        )


def _add_row(table: "Table", name: str, units: str, last: str, size: "Size | None", originals: "Size") -> None:
    assert size is not None
    known = size.macs is not None and originals.macs is not None
    table.add_row(
        name,
        units,
        last,
        f"{size.parameters:,}",
        f"{size.bytes / 1e6:.2f}",
        f"{size.macs:,}" if size.macs is not None else "",
        f"{size.macs / originals.macs:.0%}" if known and size.macs and originals.macs else "",
        f"{originals.macs / size.macs:.2f}x" if known and size.macs and originals.macs else "",
    )
