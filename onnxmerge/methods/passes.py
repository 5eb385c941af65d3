"""What rewrites there are: those of `onnxmerge.passes`, and those that other distributions or a user's module bring.

A distribution registers a pass under the entry point group `onnxmerge.passes`: the entry's name is the pass's.
"""

import functools
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import onnx_ir as oir
from pydantic import TypeAdapter, ValidationError

import onnxmerge.passes
from onnxmerge.errors import UsageError
from onnxmerge.user_code import guarded, imported

GROUP = "onnxmerge.passes"
"""The entry point group of passes."""
_OURS = "onnxmerge"
_PLAIN = (str, int, float, bool)
"""What a setting may be, besides one of several given values or nothing."""
_NOT_ALONE = {"TakeStream": "leaves the other tasks' outputs wrong; onnxmerge extract takes a task out"}


@dataclass(frozen=True)
class Listed:
    """A pass.

    Attributes:
        name: what `onnxmerge apply --pass` calls it.
        preserves: "exact" where outputs stay equal, else "approximate".
        summary: the first sentence of its docstring, or why it cannot be loaded.
        settings: what `--set` takes, with defaults; None: `apply` cannot make it.
        distribution: what it comes from.
    """

    name: str
    preserves: str
    summary: str
    settings: Mapping[str, str] | None
    distribution: str


@dataclass(frozen=True)
class Found:
    """A pass by its name.

    Attributes:
        name: as it was asked for.
        type: its class.
        source: where it comes from: a distribution with its version, or nothing where a module was named.
        is_ours: whether it is one of `onnxmerge.passes`.
    """

    name: str
    type: type[oir.passes.PassBase]
    source: str
    is_ours: bool

    @property
    def is_exact(self) -> bool:
        """Whether it claims that outputs stay equal."""
        return getattr(self.type, "preserves", None) == "exact"


def list_passes() -> list[Listed]:
    """All passes: those of `onnxmerge.passes` by name, then those of other distributions."""
    found = [_listed(name, own, _OURS) for name, own in sorted(_own_passes().items())]
    for entry in _entry_points():
        try:
            found.append(_listed(entry.name, _loaded(entry), _distribution(entry)))
        except UsageError as error:
            found.append(Listed(entry.name, "", f"cannot be loaded: {error}", None, _distribution(entry)))
    return found


def find_pass(name: str) -> Found:
    """The pass called `name`: one that `list_passes` lists, or `module:Class`.

    Raises:
        UsageError: there is none, or several; or the module or its class cannot be loaded, or is no pass.
    """
    if ":" in name:
        return Found(name, _checked(name, imported(name)), "", is_ours=False)
    ours = _own_passes().get(name)
    others = [entry for entry in _entry_points() if entry.name == name]
    if len(others) + (ours is not None) > 1:
        places = [_OURS] * (ours is not None) + [_distribution(entry) for entry in others]
        raise UsageError(f"--pass {name}: {' and '.join(places)} both have a pass of that name")
    if ours is not None:
        return Found(name, ours, "", is_ours=True)
    if others:
        return Found(name, _loaded(others[0]), _distribution(others[0]), is_ours=False)
    raise UsageError(f"--pass {name}: there is no such pass; there are {', '.join(_makable())}, or give module:Class")


def make_pass(found: Found, settings: Mapping[str, str]) -> oir.passes.PassBase:
    """The pass, made with what `--set` gave.

    Raises:
        UsageError: it takes what no text tells, a setting is missing, unknown or of a wrong type, or making it fails.
    """
    if found.is_ours and found.name in _NOT_ALONE:
        raise UsageError(f"--pass {found.name}: {_NOT_ALONE[found.name]}")
    known = _parameters(found.type)
    hard = [name for name, own in known.items() if own.type is None and own.is_required]
    if hard:
        raise UsageError(
            f"--pass {found.name}: takes {', '.join(hard)}, which --set cannot tell; it is made by the methods alone"
        )
    plain = [name for name, own in known.items() if own.type is not None]
    for name in settings:
        if name not in plain:
            raise UsageError(f"--set {name}: {found.name} has no such setting; it has {', '.join(plain) or 'none'}")
    missing = [name for name in plain if known[name].is_required and name not in settings]
    if missing:
        raise UsageError(f"--pass {found.name}: needs --set {missing[0]}=...")
    values = {name: _value(found.name, name, known[name].type, text) for name, text in settings.items()}
    with guarded(found.name):
        return found.type(**values)


@functools.cache
def _own_passes() -> dict[str, type[oir.passes.PassBase]]:
    found = {}
    for file in pkgutil.iter_modules(onnxmerge.passes.__path__):
        module = importlib.import_module(f"onnxmerge.passes.{file.name}")
        for name, own in inspect.getmembers(module, inspect.isclass):
            if own.__module__ == module.__name__ and issubclass(own, oir.passes.PassBase):
                found[name] = own
    return found


def _entry_points() -> list[metadata.EntryPoint]:
    return sorted(metadata.entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value))


def _distribution(entry: metadata.EntryPoint) -> str:
    return "an unknown distribution" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"


def _loaded(entry: metadata.EntryPoint) -> type[oir.passes.PassBase]:
    name = f"{entry.name} ({_distribution(entry)})"
    with guarded(name):
        return _checked(name, entry.load())


def _checked(name: str, own: object) -> type[oir.passes.PassBase]:
    if not (inspect.isclass(own) and issubclass(own, oir.passes.PassBase)):
        raise UsageError(f"{name}: is no pass: no class made from onnx_ir.passes.InPlacePass or FunctionalPass")
    if inspect.isabstract(own):
        raise UsageError(f"{name}: is no whole pass: it does not define {', '.join(sorted(own.__abstractmethods__))}")
    return own


def _listed(name: str, own: type[oir.passes.PassBase], distribution: str) -> Listed:
    summary = " ".join((inspect.getdoc(own) or "").split("\n\n")[0].split())
    parameters = _parameters(own)
    makable = name not in _NOT_ALONE and all(p.type is not None or not p.is_required for p in parameters.values())
    settings = {n: "" if p.is_required else str(p.default) for n, p in parameters.items() if p.type is not None}
    preserves = getattr(own, "preserves", "approximate")
    return Listed(name, preserves, summary, settings if makable else None, distribution)


def _makable() -> Sequence[str]:
    return [own.name for own in list_passes() if own.settings is not None]


@dataclass(frozen=True)
class _Parameter:
    """What a pass takes when it is made; its type is None where no text can tell it."""

    type: Any
    default: Any

    @property
    def is_required(self) -> bool:
        return self.default is inspect.Parameter.empty


def _parameters(own: type[oir.passes.PassBase]) -> dict[str, _Parameter]:
    if own.__init__ is object.__init__:
        return {}
    try:
        hints = typing.get_type_hints(own.__init__)
    except Exception:  # a name that only type checkers know
        hints = {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: _Parameter(hints.get(name) if _is_plain(hints.get(name)) else None, parameter.default)
        for name, parameter in list(inspect.signature(own.__init__).parameters.items())[1:]
        if parameter.kind in named
    }


def _is_plain(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return all(part is type(None) or _is_plain(part) for part in typing.get_args(hint))
    return hint in _PLAIN or typing.get_origin(hint) is typing.Literal


def _value(owner: str, name: str, hint: Any, text: str) -> Any:
    try:
        return TypeAdapter(hint).validate_python(text)
    except ValidationError as error:
        raise UsageError(f"--set {name}={text}: {owner}: {error.errors()[0]['msg']}") from error
