"""onnxmerge fuse: networks of one task into one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnxmerge.cli import options
from onnxmerge.cli.errors import reports_errors
from onnxmerge.cli.processes import one_of_many
from onnxmerge.cli.progress import Bars
from onnxmerge.cli.running import run_and_show
from onnxmerge.errors import GateFailed, UsageError
from onnxmerge.methods.fuse.choices import Balance, LayerCost, Matching, Rule, Start, Targets

if TYPE_CHECKING:
    from onnxmerge.methods.fuse.plan import FusePlan


@reports_errors
@one_of_many
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
        Balance | None,
        typer.Option(
            "--balance",
            help="Layers without a counterpart: add identities, collapse them, or keep the result's own.",
            show_default=False,
        ),
    ] = None,
    match: Annotated[
        Matching, typer.Option("--match", help="What channels are compared by; none: they keep their order.")
    ] = Matching.ACTIVATIONS,
    entropy: Annotated[
        float, typer.Option("--entropy", min=0.0, help="Regularisation of optimal transport; 0: exact.")
    ] = 0.0,
    cost: options.Cost = LayerCost.CKA,
    layer_map: Annotated[
        Path | None,
        typer.Option("--map", metavar="FILE", help="A plan.json whose layer maps are taken.", show_default=False),
    ] = None,
    targets: Annotated[
        Targets | None,
        typer.Option(
            "--targets",
            help="What least squares fits a channel to: the mean of matched channels, or one network's channel; "
            "default: the better of both.",
            show_default=False,
        ),
    ] = None,
    start: Annotated[
        Start | None,
        typer.Option(
            "--start",
            help="What is calibrated: what the rule makes, the network itself, or random weights; "
            "default: the best of several.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="W,W,...", help="Weight of each network.", show_default=False)
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", min=0.0, help="Largest loss against any original.", show_default=False),
    ] = None,
    steps: options.Steps = 0,
    labels: options.Labels = False,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.1, help="Softens logits while calibrating.")
    ] = 2.0,
    distil_weight: Annotated[
        float | None,
        typer.Option(
            "--distil-weight",
            metavar="G",
            min=0.0,
            max=1.0,
            help="G times the teachers' loss and 1 - G times that of the labels.",
            show_default=False,
        ),
    ] = None,
    samples: options.Samples = 10_000,
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
    """Fuse networks of one task, whatever their depths and widths, into one network of the size of one.

    Writes merged.onnx, one model for each candidate, plan.json, report.json and report.html to DIR.
    """
    from onnxmerge.data import parse_data_option
    from onnxmerge.methods.fuse.fuse import fuse_models, plan_fuse
    from onnxmerge.methods.fuse.settings import FuseSettings
    from onnxmerge.methods.task import task_names

    settings = FuseSettings(
        into=into,
        rule=rule,
        balance=balance,
        match=match,
        entropy=entropy,
        cost=cost,
        map=None if layer_map is None else str(layer_map),
        targets=targets,
        start=start,
        weights=options.weight_list(weights),
        max_drop=max_drop,
        steps=steps,
        temperature=temperature,
        distil_weight=distil_weight,
        samples=samples,
        labels=labels,
        seed=seed,
        threads=threads,
        device=device,
        providers=options.provider_list(providers),
    )
    sources = parse_data_option(data, task_names(models))
    if dry_run:
        with Bars(quiet) as bars:
            plan = plan_fuse(models, sources, settings=settings, progress=bars)
        _print_plan(plan, as_json)
        return
    if output is None:
        raise UsageError("give an output folder with -o DIR (or --dry-run to see the plan only)")
    result = run_and_show(
        lambda bars: fuse_models(
            models, sources, output, settings=settings, overwrite=overwrite, resume=resume, progress=bars
        ),
        quiet=quiet,
        as_json=as_json,
        report=report,
        log=tensorboard,
    )
    if result.chosen is None:
        raise GateFailed(f"no candidate stays within --max-drop {max_drop:g}; see {output / 'report.html'}")


def _print_plan(plan: "FusePlan", as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    if as_json:
        print(plan.to_json(), end="")
        return
    table = Table(f"layer of {plan.into}", *plan.maps)
    for layer in plan.layers:
        table.add_row(layer, *(_partner(own, layer) for own in plan.maps.values()))
    Console().print(table)


def _partner(layers: dict[str, str], wanted: str) -> str:
    return next((theirs for theirs, ours in layers.items() if ours == wanted), "-")
