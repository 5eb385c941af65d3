"""A folder of images, decoded batch by batch; one sub-folder for each class when labelled."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from onnxmerge.data.dataset import Batch, Dataset, InputSpec, hold_out
from onnxmerge.data.prepare import Preparation, describe, require_image_input
from onnxmerge.errors import UsageError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""What counts as an image file, by its lower-case suffix."""
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's pixel mode for each channel count."""
_WORKERS = min(os.cpu_count() or 1, 8)
"""Files decoded at once."""
_WIDE_MODES = frozenset({"F", "I", "I;16", "I;16B", "I;16L", "I;16N"})


class ImageSamples:
    """Image files, stretched to the model's input size (bilinear, antialiased) as they are read."""

    def __init__(
        self,
        paths: Sequence[Path],
        labels: np.ndarray | None,
        spec: InputSpec,
        size: tuple[int, int],
        after: Preparation,
    ) -> None:
        """`size` is (height, width) in pixels; `after` turns pixels 0..255 into values."""
        self._paths = paths
        self._labels = labels
        self._spec = spec
        self._mode = MODES[require_image_input(spec, str(paths[0])).channels]
        self._size = size
        self._after = after

    @property
    def has_labels(self) -> bool:
        """Whether the files lie in class folders."""
        return self._labels is not None

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, rows: np.ndarray) -> Batch:
        """See `Samples.read`."""
        with ThreadPoolExecutor(_WORKERS) as workers:  # Pillow decodes and resizes outside the interpreter's lock
            pixels = np.stack(list(workers.map(self._decode, [self._paths[row] for row in rows])))
        values = self._after.apply(pixels, self._spec, str(self._paths[rows[0]]))
        return Batch({self._spec.name: values}, None if self._labels is None else self._labels[rows])

    def _decode(self, path: Path) -> np.ndarray:
        """One file as (height, width, channels) uint8."""
        height, width = self._size
        try:
            with Image.open(path) as image:
                if image.mode in _WIDE_MODES:
                    raise UsageError(
                        f"{path}: has more than 8 bits a channel (mode {image.mode}); convert it to 8 first"
                    )
                pixels = np.asarray(image.convert(self._mode).resize((width, height), Image.Resampling.BILINEAR))
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            raise UsageError(f"{path}: cannot be read as an image: {error}") from error
        return pixels.reshape(height, width, -1)


def load_folder(folder: Path, specs: Sequence[InputSpec], seed: int, preparation: Preparation) -> Dataset:
    """The images of `folder`; a tenth chosen by `seed` is held out.

    Classes are numbered from 0 in the order of their folders' names, as image folders are elsewhere.

    Args:
        folder: Images, or one sub-folder of images for each class.
        specs: The model's inputs, of which there must be one, and it must take images.
        seed: Chooses the held-out tenth.
        preparation: How pixels 0..255 become what the model is fed; where it has no scale, 1/255.

    Raises:
        UsageError: there are no images, they lie both in and beside class folders, or the model takes no images.
    """
    if len(specs) != 1:
        raise UsageError(
            f"{folder}: a folder of images feeds one input, but the model has {', '.join(spec.name for spec in specs)}"
        )
    if preparation.layout is not None:
        raise UsageError(f"{folder}: layout ({preparation.layout}) is for arrays; images have none to choose")
    spec = specs[0]
    image = require_image_input(spec, str(folder))
    sizing = replace(preparation, resize=preparation.resize or True)
    size = sizing.target_size(image, spec, str(folder))
    got = (image.channels, *size) if image.channels_first else (*size, image.channels)
    if not spec.accepts(got):
        raise UsageError(
            f"{folder}: resize gives images of shape {describe((None, *got))}, "
            f"but the model's input {spec.name!r} expects {describe(spec.shape)}"
        )
    paths, labels = _find_images(folder)
    scale = 1 / 255 if preparation.scale is None else preparation.scale
    # Decoded pixels are (N, H, W, C) at the right size: what is left is the layout and the normalisation.
    after = replace(preparation, scale=scale, layout="NHWC", resize=False)
    return hold_out(str(folder), ImageSamples(paths, labels, spec, size, after), seed)


def _find_images(folder: Path) -> tuple[list[Path], np.ndarray | None]:
    """All image files in order of their names, and their class numbers where they lie in class folders."""
    try:
        loose = _images_in(folder, recursive=False)
        classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        found = [(number, path) for number, name in enumerate(classes) for path in _images_in(name, recursive=True)]
    except OSError as error:
        raise UsageError(f"{folder}: cannot be read: {error.strerror or error}") from error
    if loose and found:
        raise UsageError(f"{folder}: has images both in sub-folders and beside them (such as {loose[0].name})")
    if loose:
        return loose, None
    if not found:
        raise UsageError(f"{folder}: holds no images ({', '.join(sorted(SUFFIXES))})")
    labels = np.array([number for number, _ in found], np.int64)
    if len(np.unique(labels)) < len(classes):
        empty = next(name for number, name in enumerate(classes) if number not in labels)
        raise UsageError(f"{folder}: the class folder {empty.name!r} holds no images")
    return [path for _, path in found], labels


def _images_in(folder: Path, *, recursive: bool) -> list[Path]:
    entries = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(
        path for path in entries if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
