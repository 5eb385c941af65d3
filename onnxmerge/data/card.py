"""The data card: a YAML file that says how an archive or a folder of images is to be read.

    file: photos.npz                  # or a folder of images; relative to the card
    inputs: {image: x_train}          # model input: array; each input's own name where left out
    labels: y_train                   # default: labels, where there is such an array
    test_inputs: {image: x_test}      # held out; default: the input's name with prefix test_
    test_labels: y_test               # default: test_labels
    scale: 1/255                      # value = (stored * scale - mean) / std, for inputs of floating type
    mean: [0.485, 0.456, 0.406]       # one number, or one for each channel
    std: [0.229, 0.224, 0.225]
    layout: NHWC                      # how arrays are stored: NCHW, NHWC or NHW; default: as the model takes them
    resize: true                      # stretch images to the model's input size, or to [height, width]

All but `file` may be left out. One card may serve several models: inputs that a model does not have are ignored.
A folder of images is always resized, and its pixels 0..255 are scaled by 1/255 unless `scale` says otherwise.
"""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from onnxmerge.data.archive import Archive
from onnxmerge.data.arrays import Names, load_archive
from onnxmerge.data.dataset import Dataset, InputSpec
from onnxmerge.data.images import load_folder
from onnxmerge.data.prepare import Layout, Preparation
from onnxmerge.errors import UsageError
from onnxmerge.files import read_yaml

CARD_SUFFIXES = frozenset({".yaml", ".yml"})


def _number(value: Any) -> Any:
    """Let a fraction such as 1/255 stand for its value; anything else is pydantic's to judge."""
    if not isinstance(value, str):
        return value
    try:
        return float(Fraction(value))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"{value!r} is not a number") from None


def _size(value: Any) -> Any:
    """Spare the reader pydantic's account of a union."""
    pair = isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)
    if not (pair or isinstance(value, bool)):
        raise ValueError("must be true, false or [height, width] in pixels")
    return value


def _one_or_more(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Numbers = Annotated[tuple[Number, ...], BeforeValidator(_one_or_more), Field(min_length=1)]
Deviations = Annotated[tuple[Annotated[Number, Field(gt=0)], ...], BeforeValidator(_one_or_more), Field(min_length=1)]
Size = Annotated[bool | tuple[int, int], BeforeValidator(_size)]


class Card(BaseModel):
    """A data card's fields; see the module's example."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    inputs: dict[str, str] = {}
    labels: str | None = None
    test_inputs: dict[str, str] = {}
    test_labels: str | None = None
    scale: Number | None = None
    mean: Numbers | None = None
    std: Deviations | None = None
    layout: Layout | None = None
    resize: Size = False


def load_card(path: Path, specs: Sequence[InputSpec], seed: int) -> Dataset:
    """The samples a data card describes.

    Raises:
        UsageError: the card is not one, or what it describes does not fit the model's inputs.
    """
    card = read_card(path)
    target = path.parent / card.file
    preparation = Preparation(card.scale, card.mean, card.std, card.layout, card.resize)
    if target.is_dir():
        if card.inputs or card.labels or card.test_inputs or card.test_labels:
            raise UsageError(f"{path}: {card.file} is a folder of images, which has no arrays to name")
        return replace(load_folder(target, specs, seed, preparation), source=str(path))
    if target.suffix in CARD_SUFFIXES:
        raise UsageError(f"{path}: file names another data card ({card.file}), not an .npz or a folder of images")
    if not target.exists():
        raise UsageError(f"{path}: names the file {target}, but there is no such file")
    names = Names(card.inputs, card.labels, card.test_inputs, card.test_labels)
    return replace(load_archive(Archive(target), specs, seed, names, preparation), source=str(path))


def read_card(path: Path) -> Card:
    """Parse a data card.

    Raises:
        UsageError: it is no YAML, or a field is unknown, missing or of the wrong kind.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UsageError(f"{path}: is not a data card: it must name at least a file (file: data.npz)")
    try:
        return Card.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in Card.model_fields)
        raise UsageError(f"{path}: {field}: {first['msg'].removeprefix('Value error, ')}") from error
