"""Triton's config.pbtxt: written for a model, read back, and held against one.

The format is protobuf's text format, of which what such files use is read: fields with numbers, words, strings, lists
and messages. protobuf's own reader would need the whole of Triton's schema: it cannot pass over an unknown list of
messages, such as instance groups. See the pages "Model Configuration" and "Model Repository" of the Triton Inference
Server's user guide.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxmerge.errors import UsageError

TYPES = {
    "bool": "BOOL",
    **{f"{sign}int{bits}": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{"float16": "FP16", "float": "FP32", "double": "FP64", "string": "STRING"},
}
"""onnxruntime's names of element types, and Triton's without the prefix."""
ANY = -1
"""A size that is not fixed."""


@dataclass(frozen=True)
class Array:
    """An input or output.

    Attributes:
        name: as the model has it.
        type: Triton's name of its element type, such as TYPE_FP32.
        shape: of the whole array, the batch axis included; `ANY` where a size is free.
    """

    name: str
    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Config:
    """What Triton must know of a model.

    Attributes:
        name: the model's.
        max_batch: the largest batch that Triton makes up of requests; 0: the model takes its arrays as they come.
        inputs: in the model's order.
        outputs: in the model's order.
    """

    name: str
    max_batch: int
    inputs: Sequence[Array]
    outputs: Sequence[Array]

    def text(self) -> str:
        """The content of config.pbtxt."""
        parts = [f"name: {_quoted(self.name)}", 'backend: "onnxruntime"', f"max_batch_size: {self.max_batch}"]
        for kind, arrays in (("input", self.inputs), ("output", self.outputs)):
            parts.append(f"{kind} [\n" + ",\n".join(self._array(array) for array in arrays) + "\n]")
        if self.max_batch > 1:
            parts.append("dynamic_batching { }")
        return "\n".join(parts) + "\n"

    def _array(self, array: Array) -> str:
        sizes = array.shape[1:] if self.max_batch else array.shape
        lines = [f"name: {_quoted(array.name)}", f"data_type: {array.type}"]
        if sizes:
            lines.append(f"dims: [ {', '.join(map(str, sizes))} ]")
        else:  # Triton wants at least one axis
            lines += ["dims: [ 1 ]", "reshape: { shape: [ ] }"]
        return "  {\n" + "".join(f"    {line}\n" for line in lines) + "  }"

    def contradiction(self, found: "Message") -> str | None:
        """What in another config.pbtxt, as `parse_text` reads it, does not hold for this model; None where all does.

        What it says besides, such as instance groups, is nobody's business here, and fixed sizes may stand where the
        model takes any.
        """
        name = _single(found, "name", self.name)
        if name != self.name:
            return f"its name is {name!r}, not {self.name!r}"
        runs = _single(found, "backend", "onnxruntime"), _single(found, "platform", "onnxruntime_onnx")
        if runs != ("onnxruntime", "onnxruntime_onnx"):
            return f"it is for {runs[0] if runs[0] != 'onnxruntime' else runs[1]}, not for onnxruntime"
        batch = _single(found, "max_batch_size", 0)
        if batch != self.max_batch:
            return f"its max_batch_size is {batch}, not {self.max_batch}"
        for kind, arrays in (("input", self.inputs), ("output", self.outputs)):
            theirs = {_single(own, "name", ""): own for own in found.get(kind, [])}
            missing = [array.name for array in arrays if array.name not in theirs]
            unknown = theirs.keys() - {array.name for array in arrays}
            if unknown:
                return f"the model has no {kind} {min(map(str, unknown))!r}"
            if missing and kind == "input":  # outputs that nobody asks for may be left out
                return f"it lacks the input {missing[0]!r}"
            for array in arrays:
                wrong = array.name in theirs and self._wrong(array, theirs[array.name])
                if wrong:
                    return f"the {kind} {array.name!r} {wrong}"
        return None

    def _wrong(self, array: Array, own: Mapping[str, list[Any]]) -> str | None:
        kind = _single(own, "data_type", "")
        if kind != array.type:
            return f"is of type {array.type}, not {kind}"
        reshaped = own["reshape"][0].get("shape", []) if "reshape" in own else own.get("dims", [])
        sizes = list(array.shape[1:] if self.max_batch else array.shape)
        fits = len(sizes) == len(reshaped) and all(a in (b, ANY) for a, b in zip(sizes, reshaped, strict=True))
        return None if fits else f"has the sizes {sizes}, not {reshaped}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _single(message: Mapping[str, list[Any]], name: str, default: Any) -> Any:
    return message.get(name, [default])[-1]


# --- protobuf's text format -------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""\s+|\#[^\n]*|(?P<token>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|[A-Za-z_][\w.]*|[-+]?[\d.][\w.+-]*|[\[\]{}<>:,;])"""
)
_CLOSING = {"{": "}", "<": ">", "[": "]"}

Message = dict[str, list[Any]]
"""Every field with all its values, in order."""


def parse_text(text: str) -> Message:
    """The fields of a message in protobuf's text format.

    Raises:
        UsageError: it is not in that format; the sentence does not name the file.
    """
    tokens = list(_tokens(text))
    message, rest = _message(tokens, 0, None)
    if rest != len(tokens):
        raise UsageError(f"is no protobuf text: {tokens[rest]!r} closes nothing")
    return message


def _tokens(text: str) -> Iterator[str]:
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise UsageError(f"is no protobuf text: {text[place : place + 20].splitlines()[0]!r} cannot be read")
        place = match.end()
        if match["token"] is not None:
            yield match["token"]


def _message(tokens: Sequence[str], place: int, closing: str | None) -> tuple[Message, int]:
    found: Message = {}
    while place < len(tokens) and tokens[place] not in (closing, "}", ">", "]"):
        name = tokens[place]
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UsageError(f"is no protobuf text: {name!r} is not the name of a field")
        place += 1
        if _at(tokens, place) == ":":
            place += 1
        if _at(tokens, place) == "[":
            values, place = _list(tokens, place + 1)
        else:
            value, place = _one(tokens, place)
            values = [value]
        found.setdefault(name, []).extend(values)
        if _at(tokens, place) in (",", ";"):
            place += 1
    return found, place


def _list(tokens: Sequence[str], place: int) -> tuple[list[Any], int]:
    values = []
    while _at(tokens, place) != "]":
        value, place = _one(tokens, place)
        values.append(value)
        if _at(tokens, place) == ",":
            place += 1
    return values, place + 1


def _one(tokens: Sequence[str], place: int) -> tuple[Any, int]:
    token = _at(tokens, place)
    if token in ("{", "<"):
        message, place = _message(tokens, place + 1, _CLOSING[token])
        if _at(tokens, place) != _CLOSING[token]:
            raise UsageError(f"is no protobuf text: {_at(tokens, place)!r} closes nothing")
        return message, place + 1
    if token[:1] in ('"', "'"):
        text, place = "", place
        while place < len(tokens) and tokens[place][:1] in ('"', "'"):  # strings side by side are one
            text += re.sub(r"\\(.)", lambda match: {"n": "\n", "t": "\t"}.get(match[1], match[1]), tokens[place][1:-1])
            place += 1
        return text, place
    if token in (":", ",", ";", "]", "}", ">", "["):
        raise UsageError(f"is no protobuf text: {token!r} is no value")
    return (int(token) if re.fullmatch(r"[-+]?\d+", token) else token), place + 1


def _at(tokens: Sequence[str], place: int) -> str:
    if place > len(tokens):
        raise UsageError("is no protobuf text: it ends within a field")
    return tokens[place] if place < len(tokens) else ""
