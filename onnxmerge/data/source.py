"""Open a data source of any kind."""

import os
from collections.abc import Sequence
from pathlib import Path

from onnxmerge.data.archive import Archive
from onnxmerge.data.arrays import Names, load_archive
from onnxmerge.data.card import CARD_SUFFIXES, load_card
from onnxmerge.data.dataset import Dataset, InputSpec
from onnxmerge.data.generated import load_function
from onnxmerge.data.images import load_folder
from onnxmerge.data.prepare import Preparation
from onnxmerge.data.stand_in import is_stand_in, load_stand_in
from onnxmerge.errors import UsageError
from onnxmerge.user_code import is_code


def load_dataset(source: str | os.PathLike[str], inputs: Sequence[InputSpec], *, seed: int = 0) -> Dataset:
    """Open a data source for a model; samples are read later, batch by batch.

    Args:
        source: An `.npz`, a folder of images, a YAML data card, or `module:function`; or the word `noise`, which is
            never a path (a file of that name is `./noise`). Anything else that exists is a path.
        inputs: The model's inputs.
        seed: Chooses the tenth that is held out where the source has no test samples, or makes the noise. Two sources
            of equal length hold out the same samples under one seed.

    Returns:
        The samples to calibrate with and those held out.

    Raises:
        UsageError: the source is missing or damaged, or does not fit the inputs, or arrays hold NaN or infinity in
            held-out samples. Among the others these are found while reading, so iterating may raise it too.
    """
    name = os.fspath(source)
    for spec in inputs:
        if not spec.shape:
            raise UsageError(f"{name}: cannot feed the model's input {spec.name!r}, a scalar without a batch axis")
    if isinstance(source, str) and is_stand_in(source):
        return load_stand_in(source, inputs, seed)
    path = Path(name)
    if path.is_dir():
        return load_folder(path, inputs, seed, Preparation())
    if path.suffix in CARD_SUFFIXES and path.exists():
        return load_card(path, inputs, seed)
    if is_code(name):
        return load_function(name, inputs, seed)
    return load_archive(Archive(path), inputs, seed, Names(), Preparation())
