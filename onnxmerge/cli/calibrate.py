"""onnxmerge calibrate: train a merged model towards its originals."""

from pathlib import Path
from typing import Annotated

import typer

from onnxmerge.calibration.settings import Precision, Settings
from onnxmerge.cli import options
from onnxmerge.cli.errors import reports_errors
from onnxmerge.cli.processes import one_of_many
from onnxmerge.cli.progress import shown


@reports_errors
@one_of_many
def calibrate(
    merged: Annotated[Path, typer.Argument(help="The merged ONNX file.", show_default=False)],
    teacher: Annotated[
        list[str],
        typer.Option(
            "--teacher", metavar="TASK=MODEL.onnx", help="An original; repeat for each task.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Output folder.", show_default=False)],
    data: options.Data = [],  # noqa: B006 (typer reads the default, nobody changes it)
    steps: Annotated[int, typer.Option("--steps", min=0, help="Optimiser steps; 0 only measures.")] = 1000,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples of each task in a step.")] = Settings.batch,
    rate: Annotated[
        float, typer.Option("--rate", help="Highest learning rate; of adamw as a share of each array's size.")
    ] = Settings.rate,
    optimiser: Annotated[
        str, typer.Option("--optimiser", metavar="adamw|sgd", help="adamw with one cycle, or sgd in steps.")
    ] = Settings.optimiser,
    clip: Annotated[
        float | None, typer.Option("--clip", help="Largest norm of the gradients of a step.", show_default=False)
    ] = None,
    accumulate: Annotated[
        int, typer.Option("--accumulate", min=1, help="Batches whose gradients make one step.")
    ] = Settings.accumulate,
    patience: Annotated[
        int | None,
        typer.Option(
            "--patience",
            min=1,
            help="Stop after so many measurements without gain (of --evaluations).",
            show_default=False,
        ),
    ] = None,
    evaluations: Annotated[
        int, typer.Option("--evaluations", min=1, help="How often the held-out loss is measured.")
    ] = Settings.evaluations,
    norm_statistics: Annotated[
        str, typer.Option("--norm-statistics", metavar="frozen|updating", help="Running statistics of batch norms.")
    ] = Settings.norm_statistics,
    precision: Annotated[
        Precision | None,
        typer.Option(
            "--precision",
            help="Precision of a step; by default bfloat16 where the device has instructions for it, else float32.",
            show_default=False,
        ),
    ] = None,
    cache_bytes: Annotated[
        int,
        typer.Option(
            "--cache-bytes",
            min=0,
            help="Compute once what teachers give for each sample, and keep it in a temporary file of at most this "
            "size; 0: in every step.",
        ),
    ] = Settings.cache_bytes,
    labels: options.Labels = False,
    kl_weight: Annotated[
        float, typer.Option("--kl-weight", help="Weight of the KL divergence to the teachers.")
    ] = Settings.kl_weight,
    logit_weight: Annotated[
        float, typer.Option("--logit-weight", help="Weight of the squared error to the teachers' outputs.")
    ] = Settings.logit_weight,
    feature_weight: Annotated[
        float, typer.Option("--feature-weight", help="Weight of the error to the teachers' feature maps.")
    ] = Settings.feature_weight,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Softens the outputs under the KL divergence.")
    ] = Settings.temperature,
    samples: Annotated[
        int | None,
        typer.Option("--samples", min=1, help="Samples of each task to train with, at most.", show_default=False),
    ] = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    device: options.Device = None,
    report: options.Report = None,
    tensorboard: options.TensorBoard = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a merged model with its originals as teachers, and keep what does best on held-out data.

    Writes merged.onnx, report.json and report.html to DIR.
    """
    from onnxmerge.data import parse_data_option
    from onnxmerge.methods.calibrate import calibrate_model

    teachers = options.task_models(teacher, "--teacher")
    settings = Settings(
        steps=steps,
        batch=batch,
        optimiser=optimiser,  # type: ignore[arg-type]  # refused there if it is none
        rate=rate,
        clip=clip,
        accumulate=accumulate,
        patience=patience,
        norm_statistics=norm_statistics,  # type: ignore[arg-type]
        seed=seed,
        evaluations=evaluations,
        threads=threads,
        device=device,
        precision=precision,
        cache_bytes=cache_bytes,
        kl_weight=kl_weight,
        temperature=temperature,
        logit_weight=logit_weight,
        label_weight=float(labels),
        feature_weight=feature_weight,
    )
    sources = parse_data_option(data, list(teachers))
    try:
        with shown(quiet, tensorboard) as bars:
            result = calibrate_model(
                merged,
                teachers,
                sources,
                output,
                settings=settings,
                samples=samples,
                overwrite=overwrite,
                resume=resume,
                progress=bars,
            )
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt("interrupted; --resume goes on from there") from stopped
    options.show(result, as_json=as_json, report=report)
