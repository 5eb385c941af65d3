"""Export the zoo by torch's exporters, in the ways that users do."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.onnx import TrainingMode

from zoo import ZOO, build

EXPORTERS = {"legacy": (11, 13, 17, 20), "unfolded": (12, 16), "dynamo": (18, 20, 23)}
"""Exporter -> opsets. `legacy` traces (`dynamo=False`), `unfolded` does so and leaves norms, transposed weights and
constants as they are, with initializers as inputs; `dynamo` goes by torch.export.
"""

_FIXED = {("legacy", 13), ("legacy", 20), ("dynamo", 20)}
_ALL_FREE = {("legacy", 11), ("unfolded", 16), ("dynamo", 18)}


def exports(name: str) -> list[tuple[str, int]]:
    """The pairs of exporter and opset that can express the network `name`."""
    return [
        (exporter, opset) for exporter, opsets in EXPORTERS.items() for opset in opsets if opset >= ZOO[name].oldest
    ]


def free_axes(name: str, exporter: str, opset: int) -> dict[int, str]:
    """The input axes that `export` makes symbolic: none, the batch, or every axis that the network lets vary."""
    if (exporter, opset) in _FIXED:
        return {}
    return {0: "batch"} | (ZOO[name].free if (exporter, opset) in _ALL_FREE else {})


def examples(name: str, exporter: str, opset: int) -> dict[str, Tensor]:
    """Inputs that the exported file takes, by name."""
    batch = 2 if free_axes(name, exporter, opset) else 1
    return dict(zip(ZOO[name].inputs, ZOO[name].examples(batch), strict=True))


def export(name: str, exporter: str, opset: int, path: Path) -> None:
    """Write the network `name` to `path`; raises what torch raises where the exporter cannot."""
    model, inputs, axes = build(name), examples(name, exporter, opset), free_axes(name, exporter, opset)
    with _quiet(), torch.no_grad():
        made = model(*inputs.values())
        outputs = [f"output{number}" for number in range(1 if isinstance(made, Tensor) else len(made))]
        common = {"input_names": list(inputs), "output_names": outputs, "opset_version": opset}
        if exporter == "dynamo":
            shapes = tuple({axis: torch.export.Dim(free) for axis, free in axes.items()} for _ in inputs)
            common |= {"dynamo": True, "dynamic_shapes": shapes if axes else None, "external_data": False}
        else:
            common |= {"dynamo": False, "dynamic_axes": dict.fromkeys(inputs, axes) if axes else None}
        if exporter == "unfolded":
            common |= {"training": TrainingMode.PRESERVE, "do_constant_folding": False}
            common |= {"keep_initializers_as_inputs": True}
        torch.onnx.export(model, tuple(inputs.values()), path, verbose=False, **common)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' progress and warnings to themselves."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
