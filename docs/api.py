"""Write api.md: what `import onnxmerge` offers, from signatures and docstrings.

python docs/api.py
"""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import onnxmerge
from onnxmerge.files import write_text

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Python API

What `import onnxmerge` offers, written by `python docs/api.py` from signatures and docstrings. All else in the package
may change from one version to the next ([what is promised](compatibility.md)).

Every error that is the caller's is an `onnxmerge.errors.OnnxMergeError`: `UsageError` (usage, configuration or data) or
`ModelError` (a model or operator that cannot be handled). What `zip_models` and the like return is a report; its fields
are told in [report.md](report.md).

"""
WIDTH = 110


def page() -> str:
    """The whole page."""
    names = [name for name in onnxmerge.__all__ if not name.startswith("_")]
    functions = [name for name in names if inspect.isfunction(getattr(onnxmerge, name))]
    others = [name for name in names if name not in functions]
    listed = "".join(f"- [`{name}`](#{name.lower()}): {_summary(getattr(onnxmerge, name))}\n" for name in names)
    parts = [_entry(name, getattr(onnxmerge, name)) for name in (*functions, *others)]
    return HEAD + listed + "\n" + "\n".join(parts)


def _summary(own: Any) -> str:
    return " ".join((inspect.getdoc(own) or "").split("\n\n")[0].split())


def _entry(name: str, own: Any) -> str:
    return f"## {name}\n\n```\n{_signature(name, own)}\n```\n\n{_described(inspect.getdoc(own) or '')}\n"


def _signature(name: str, own: Any) -> str:
    shown, defaults = [], {}
    if dataclasses.is_dataclass(own):
        defaults = {field.name: field for field in dataclasses.fields(own)}
    star = False
    for parameter in inspect.signature(own).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            shown.append("*")
            star = True
        kind = parameter.annotation
        text = f"{parameter.name}: {_plain(kind if isinstance(kind, str) else inspect.formatannotation(kind))}"
        if parameter.default is not parameter.empty:
            field = defaults.get(parameter.name)
            made = field is not None and field.default is dataclasses.MISSING
            text += f" = {_value(field.default_factory() if made else parameter.default)}"  # type: ignore[union-attr]
        shown.append(text)
    result = inspect.signature(own).return_annotation if inspect.isfunction(own) else None
    kind = result if isinstance(result, str) or result is None else inspect.formatannotation(result)
    tail = f" -> {_plain(kind)}" if kind else ""
    one = f"{name}({', '.join(shown)}){tail}"
    lines = "".join(f"    {part},\n" for part in shown)
    return one if len(one) <= WIDTH else f"{name}(\n{lines}){tail}"


def _plain(text: str) -> str:
    """An annotation without the modules that its names are from, alike in every version of Python."""
    text = re.sub(r"\b[a-z_][\w.]*\.(?=[A-Z])", "", text)
    return re.sub(r"Optional\[(Literal\[[^]]*\])\]", r"\1 | None", text)


def _value(default: Any) -> str:
    if dataclasses.is_dataclass(default):
        return f"{type(default).__name__}()"
    if callable(default):
        return getattr(default, "__name__", type(default).__name__)
    if isinstance(default, tuple):
        return f"({', '.join(map(_value, default))}{',' if len(default) == 1 else ''})"
    return f"{default:.4g}" if isinstance(default, float) else repr(getattr(default, "value", default))


def _described(doc: str) -> str:
    """A docstring as Markdown: its sections become lists."""
    found: list[str] = []
    section = False
    for line in doc.splitlines():
        head = re.fullmatch(r"(Args|Attributes|Raises|Returns|Yields):", line)
        if head:
            section = True
            found += [f"**{head[1]}**", ""]
        elif section and (item := re.fullmatch(r"    (\w+(?:, \w+)*): (.*)", line)):
            found.append(f"- `{item[1].replace(', ', '`, `')}`: {item[2]}")
        elif section and line.startswith("    "):
            found.append(f"  {line.strip()}" if found[-1] else line.strip())
        else:
            section = section and not line.strip()
            found.append(line)
    return "\n".join(found).strip()


if __name__ == "__main__":
    write_text(PAGE, page())
