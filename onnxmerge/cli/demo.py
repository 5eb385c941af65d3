"""onnxmerge demo: the main job on two small networks that ship with the package."""

from pathlib import Path
from typing import Annotated

import typer

from onnxmerge.cli import options
from onnxmerge.cli.errors import reports_errors
from onnxmerge.cli.progress import Bars


@reports_errors
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Output folder.")] = Path("demo-out"),
    steps: options.Steps = 100,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Zip a digit and a fashion classifier into one network, offline, on the CPU."""
    from importlib.resources import as_file, files

    from onnxmerge.methods.zip.choices import Start
    from onnxmerge.methods.zip.settings import ZipSettings
    from onnxmerge.methods.zip.zip import zip_models

    with as_file(files("onnxmerge.demo")) as folder, Bars(quiet) as bars:
        tasks = ("digits", "fashion")
        result = zip_models(
            [folder / f"{task}.onnx" for task in tasks],
            {task: folder / f"{task}.yaml" for task in tasks},
            output,
            # one start: a minute is enough
            settings=ZipSettings(steps=steps, seed=seed, start=(Start.SUBSPACE,), device="cpu"),
            overwrite=overwrite,
            progress=bars,
        )
    options.show(result, as_json=as_json, report=None)
    if not as_json:
        print(f"\nThe report: {output / 'report.html'}\nThe model:  {output / 'merged.onnx'}")
