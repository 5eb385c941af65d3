"""onnxmerge align: which layers of two networks stand for each other."""

from pathlib import Path
from typing import Annotated

import typer

from onnxmerge.cli import options
from onnxmerge.cli.errors import reports_errors
from onnxmerge.cli.progress import Bars
from onnxmerge.methods.fuse.choices import LayerCost


@reports_errors
def align(
    first: Annotated[Path, typer.Argument(metavar="A.onnx", help="ONNX file.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B.onnx", help="ONNX file.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="D",
            help="Samples in A's format: an .npz, a folder of images, a YAML data card or module:function.",
            show_default=False,
        ),
    ],
    cost: options.Cost = LayerCost.CKA,
    free_ends: Annotated[
        bool, typer.Option("--free-ends", help="Do not tie first layers to each other, nor last ones.")
    ] = False,
    samples: Annotated[int, typer.Option("--samples", min=2, help="Samples that both networks see.")] = 500,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    report: options.Report = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Map the hidden layers of two networks of any depth to each other, and tell how alike they are.

    Residual networks are mapped block by block inside each stage; convolutions and dense layers apart.
    """
    from onnxmerge.methods.align import align_models

    with Bars(quiet) as bars:
        found = align_models(
            first,
            second,
            data,
            samples=samples,
            seed=seed,
            cost=cost,
            ends=not free_ends,
            threads=threads,
            progress=bars,
        )
    options.show(found.result(), as_json=as_json, report=report)
