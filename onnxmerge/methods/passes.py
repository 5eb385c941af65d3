"""What rewrites there are."""

import importlib
import inspect
import pkgutil
from dataclasses import dataclass

import onnx_ir as oir

import onnxmerge.passes


@dataclass(frozen=True)
class Listed:
    """A pass.

    Attributes:
        name: of its class; `onnxmerge.passes` holds it.
        preserves: "exact" where outputs stay equal, else "approximate".
        summary: the first sentence of its docstring.
    """

    name: str
    preserves: str
    summary: str


def list_passes() -> list[Listed]:
    """All passes of `onnxmerge.passes`, by name."""
    found = []
    for file in pkgutil.iter_modules(onnxmerge.passes.__path__):
        module = importlib.import_module(f"onnxmerge.passes.{file.name}")
        for name, own in inspect.getmembers(module, inspect.isclass):
            if own.__module__ == module.__name__ and issubclass(own, oir.passes.PassBase):
                summary = " ".join((inspect.getdoc(own) or "").split("\n\n")[0].split())
                found.append(Listed(name, vars(own)["preserves"], summary))
    return sorted(found, key=lambda own: own.name)
