"""onnxmerge inspect: layers, channel spaces, frozen operators."""

from pathlib import Path
from typing import Annotated, Any

import typer

from onnxmerge.cli import options
from onnxmerge.cli.errors import reports_errors
from onnxmerge.errors import GateFailed


@reports_errors
def inspect(
    model: Annotated[Path, typer.Argument(help="ONNX file.", show_default=False)],
    check: Annotated[
        bool, typer.Option("--check", help="Permute every space at random and compare in onnxruntime.")
    ] = False,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Show a model's layers, its channel spaces, and the operators that keep channels in place, and why."""
    from onnxmerge.methods.inspect import inspect_model

    found = inspect_model(model, check=check, seed=seed, threads=threads)
    if as_json:
        options.print_json(found)
    else:
        _print(found)
    if found["check"] is not None and not found["check"]["passed"]:
        raise GateFailed(
            f"{model}: permuting channels changes the outputs by {found['check']['max_relative_error']:.1e} "
            f"(relative), most in the space {found['check']['worst_space']}"
        )


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    layers = Table("layer", "op", "weight", "norm", "activation", "parameters", "MACs", title="Layers")
    for layer in found["layers"]:
        shape = "x".join(map(str, layer["weight_shape"])) + (f" /{layer['groups']}" if layer["groups"] > 1 else "")
        macs = "" if layer["macs"] is None else f"{layer['macs']:,}"
        norm, activation = (layer["norm"] or "").replace("Normalization", "Norm"), layer["activation"] or ""
        layers.add_row(layer["name"], layer["op"], shape, norm, activation, f"{layer['parameters']:,}", macs)
    console.print(layers)
    spaces = Table("space", "channels", "arrays that carry it \\[axes]", title="Channel spaces")
    for space in found["spaces"]:
        arrays = [f"{w['name']}\\[{','.join(map(str, w['axes']))}]" for w in space["weights"]]
        size = f"{space['size']} blocks" if space["blocks"] else str(space["size"])
        spaces.add_row(space["name"], size, ", ".join(arrays))
    console.print(spaces)
    if found["frozen"]:
        frozen = Table("node", "op", "reason", title="Operators that keep channels in place")
        for node in found["frozen"]:
            frozen.add_row(node["node"], node["op"], node["reason"])
        console.print(frozen)
    macs = "unknown (a spatial size is dynamic)" if found["macs"] is None else f"{found['macs']:,}"
    console.print(f"{found['parameters']:,} parameters, {macs} MACs for one sample.")
    console.print(f"{found['permutable_parameters_share']:.1%} of the parameters lie in permutable spaces.")
    if found["check"] is not None:
        verdict = "passed" if found["check"]["passed"] else "FAILED"
        console.print(
            f"Permutation check {verdict}: largest relative error {found['check']['max_relative_error']:.1e}."
        )
    if found["made_by"]:
        console.print("Made by this recipe (onnxmerge run replays it):")
        print(_recipe(found), end="")


def _recipe(found: dict[str, Any]) -> str:
    """The recipe that made the model as YAML; what was read and the versions are comments."""
    from onnxmerge.report.figures import one_line
    from onnxmerge.report.recipe import as_yaml

    told = []
    for step in found["made_by"]:
        versions = ", ".join(f"{name} {version}" for name, version in step["versions"].items())
        told.append(one_line(f"# {step['command']} read, with {versions}:"))
        told += [f"#   {one_line(path)} (SHA-256 {one_line(digest)})" for path, digest in step["files"].items()]
    return "\n".join([*told, as_yaml(found["recipe"])])
