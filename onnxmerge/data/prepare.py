"""From stored samples to what a model is fed: layout, size, normalisation, element type."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from onnxmerge.data.dataset import InputSpec
from onnxmerge.errors import UsageError

Layout = Literal["NCHW", "NHWC", "NHW"]
IMAGE_CHANNELS = (1, 3, 4)
"""Channel counts by which an image input is recognised: grayscale, RGB, RGBA."""


@dataclass(frozen=True)
class ImageInput:
    """What an input's shape says about the images it takes; None for a size means any."""

    channels: int
    height: int | None
    width: int | None
    channels_first: bool

    @classmethod
    def of(cls, spec: InputSpec) -> "ImageInput | None":
        """Judge an input's shape: (N, C, H, W) or (N, H, W, C) with 1, 3 or 4 channels; None when it is neither.

        Where tiny images leave both open, the smaller size is taken for the channels, and (N, C, H, W) breaks a tie.
        """
        if len(spec.shape) != 4:
            return None
        _, first, second, last = spec.shape
        candidates = [size for size in (first, last) if size in IMAGE_CHANNELS]
        if not candidates:
            return None
        if first == min(candidates):
            return cls(first, second, last, channels_first=True)
        return cls(min(candidates), first, second, channels_first=False)


@dataclass(frozen=True)
class Preparation:
    """What a data card asks for: value = (stored * scale - mean) / std, after layout and resize.

    `mean` and `std` hold one number, or one for each channel. `layout` is how the samples are stored (None: as the
    model takes them). `resize` is the (height, width) to stretch images to, or True for the model's own.
    """

    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    layout: Layout | None = None
    resize: tuple[int, int] | bool = False

    @property
    def normalises(self) -> bool:
        """Whether values change, so that integers may be fed to an input of floating type."""
        return not (self.scale is None and self.mean is None and self.std is None)

    def apply(self, rows: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
        """Prepare samples for `spec`.

        Args:
            rows: (samples, ...) as stored.
            spec: The model's input.
            where: What an error names: the file and, where there is one, the array.

        Returns:
            (samples, ...) of `spec`'s type, not yet checked against its shape.

        Raises:
            UsageError: layout, resize, mean or std do not fit the samples or the model's input.
        """
        if self.layout or self.resize:
            rows = self._arrange(rows, spec, where)
        if self.normalises and is_floating(spec.dtype):
            rows = self._normalise(rows, spec, where)
        return convert(rows, spec, where)

    def target_size(self, image: ImageInput, spec: InputSpec, where: str) -> tuple[int, int]:
        """The (height, width) that `resize` means for an input.

        Raises:
            UsageError: the model takes any size and the card does not name one.
        """
        if not isinstance(self.resize, bool):
            return self.resize
        if image.height is None or image.width is None:
            raise UsageError(
                f"{where}: the model's input {spec.name!r} {describe(spec.shape)} takes images of any size; "
                "name one in a data card (resize: [height, width])"
            )
        return image.height, image.width

    def _arrange(self, rows: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
        """Bring images into the model's layout and size."""
        image = require_image_input(spec, where)
        stored = self.layout or ("NCHW" if image.channels_first else "NHWC")
        if rows.ndim != len(stored):
            raise UsageError(f"{where} has shape {describe((None, *rows.shape[1:]))}, which is not of layout {stored}")
        if stored == "NHW":
            rows = rows[..., np.newaxis]
        elif stored == "NCHW":
            rows = rows.transpose(0, 2, 3, 1)
        if self.resize:
            rows = _resize(rows, self.target_size(image, spec, where))
        return rows.transpose(0, 3, 1, 2) if image.channels_first else rows

    def _normalise(self, rows: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
        values = rows.astype(np.promote_types(spec.dtype, np.float32))
        if self.scale is not None:
            values *= self.scale
        if self.mean is not None:
            values -= self._per_channel("mean", self.mean, values, spec, where)
        if self.std is not None:
            values /= self._per_channel("std", self.std, values, spec, where)
        return values

    @staticmethod
    def _per_channel(
        field: str, numbers: tuple[float, ...], values: np.ndarray, spec: InputSpec, where: str
    ) -> np.ndarray:
        """`numbers` shaped to broadcast along the channel axis of `values`."""
        vector = np.asarray(numbers, values.dtype)
        if len(vector) == 1:
            return vector
        image = require_image_input(spec, where)
        axis = 1 if image.channels_first else 3
        if values.ndim != 4 or values.shape[axis] != len(vector):
            raise UsageError(
                f"{where}: {field} has {len(vector)} numbers, one for each channel, but the samples for the model's "
                f"input {spec.name!r} have shape {describe((None, *values.shape[1:]))}"
            )
        return vector.reshape((-1, 1, 1) if image.channels_first else (-1,))


def require_image_input(spec: InputSpec, where: str) -> ImageInput:
    """What `spec` says about images.

    Raises:
        UsageError: its shape is not that of a batch of images.
    """
    image = ImageInput.of(spec)
    if image is None:
        raise UsageError(
            f"{where}: the model's input {spec.name!r} {describe(spec.shape)} does not take images: "
            "neither (N, C, H, W) nor (N, H, W, C) with 1, 3 or 4 channels"
        )
    return image


def convert(rows: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
    """`rows` as `spec`'s element type: floats to any precision, integers to any width that holds their values.

    Raises:
        UsageError: an integer does not fit.
    """
    if rows.dtype.kind in "iu" and spec.dtype.kind in "iu" and rows.size:
        limits = np.iinfo(spec.dtype)
        low, high = int(rows.min()), int(rows.max())
        if low < limits.min or high > limits.max:
            raise UsageError(
                f"{where} holds values from {low} to {high}, but the model's input {spec.name!r} is {spec.dtype}"
            )
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow becomes infinity, which reading refuses by name
        return np.ascontiguousarray(rows, dtype=spec.dtype)


def is_floating(dtype: np.dtype) -> bool:
    """Whether `dtype` is a floating type, bfloat16 included (numpy itself knows it as an opaque kind)."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def describe(shape: tuple[int | None, ...]) -> str:
    """A shape for a message: the batch axis is N, any other size that is not fixed is `?`."""
    sizes = ["N", *("?" if size is None else str(size) for size in shape[1:])]
    return f"({', '.join(sizes)})" if len(sizes) > 1 else "(N,)"


def _resize(rows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Stretch images (N, H, W, C) to `size` with an antialiased bilinear filter; integers stay integers."""
    height, width = size
    if rows.shape[1:3] == (height, width):
        return rows
    resized = np.empty((len(rows), height, width, rows.shape[3]), np.float32)
    for sample, channel in np.ndindex(len(rows), rows.shape[3]):
        plane = Image.fromarray(np.ascontiguousarray(rows[sample, :, :, channel], dtype=np.float32))
        resized[sample, :, :, channel] = np.asarray(plane.resize((width, height), Image.Resampling.BILINEAR))
    return resized if rows.dtype.kind == "f" else np.rint(resized).astype(rows.dtype)
