"""`noise`: samples for when there are no data, made from the shapes of a model's inputs alone.

    noise                 # zero mean, unit variance: for inputs that were normalised
    noise:0..1            # values between 0 and 1, mean 1/2, standard deviation up to 1/4; likewise any other range
    noise:28x28           # the height and width of images, where the model leaves them open or takes them flat
    noise:224x224:0..255  # both

Images are pink noise with what all natural images have in common: amplitudes that fall as 1 / frequency (Field,
*Relations between the statistics of natural images and the response properties of cortical cells*, 1987), colour
channels that nearly agree, and a contrast that varies from image to image. Other inputs of floating type are white
noise; other integers are drawn evenly from the range, which they cannot do without.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxmerge.data.dataset import Batch, Dataset, InputSpec, Split
from onnxmerge.data.prepare import IMAGE_CHANNELS, ImageInput, convert, describe, is_floating
from onnxmerge.errors import UsageError
from onnxmerge.user_code import PATTERN

CALIBRATION, HELD_OUT = 10_000, 1_000
"""How many samples there are to calibrate with, and how many are held out."""
COLOUR = np.array([[1, 0.92, 0.81], [0.92, 1, 0.92], [0.81, 0.92, 1]])
"""Correlations of red, green and blue, measured on CIFAR-10; a fourth channel agrees with none."""
CONTRAST = 0.3
"""Standard deviation of the logarithm of an image's contrast, measured on CIFAR-10."""

_FORMS = "noise, noise:LOW..HIGH (such as noise:0..1), noise:HEIGHTxWIDTH or noise:HEIGHTxWIDTH:LOW..HIGH"
_NUMBER = r"-?\d+(?:\.\d+)?"
_WORD = re.compile(rf"noise(?::([1-9]\d*)x([1-9]\d*))?(?::({_NUMBER})\.\.({_NUMBER}))?")


def is_stand_in(source: str) -> bool:
    """Whether `source` is the reserved word with or without options; `noise:function` still is a module's function."""
    return source == "noise" or (source.startswith("noise:") and not PATTERN.fullmatch(source))


def load_stand_in(source: str, specs: Sequence[InputSpec], seed: int) -> Dataset:
    """Noise for the inputs of a model, without labels, made as it is read: a sample depends on `seed` and its number.

    Raises:
        UsageError: the word's options cannot be read or do not fit an input, an input's size is open, or an integer
            input has no range.
    """
    word = _WORD.fullmatch(source)
    if word is None:
        raise UsageError(f"{source}: write {_FORMS}")
    height, width, low, high = word.groups()
    size = None if height is None else (int(height), int(width))
    span = None if low is None else (float(low), float(high))
    if span is not None and span[0] >= span[1]:
        raise UsageError(f"{source}: the range is empty; write the smaller number first")
    samples = NoiseSamples([_noise_for(source, spec, size, span) for spec in specs], seed)
    calibration, held_out = np.split(np.arange(len(samples)), [CALIBRATION])
    name = f"{source} (a stand-in for data)"
    return Dataset(name, Split(samples, calibration), Split(samples, held_out), stand_in=True)


class PinkImages:
    """Random images (channels, height, width) whose values have mean 0 and variance 1 over all images."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        self._shape = (channels, height, width)
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
        # An image is cut out of a larger scene, so that its brightness varies like a frequency below its lowest.
        frequency[0, 0] = 0.5 / max(height, width)
        amplitude = 1 / frequency
        amplitude /= np.sqrt((amplitude**2).mean())
        self._amplitude = amplitude[:, : width // 2 + 1].astype(np.float32)
        correlation = np.eye(channels)
        if channels >= len(COLOUR):
            correlation[: len(COLOUR), : len(COLOUR)] = COLOUR
        self._colours = np.linalg.cholesky(correlation).astype(np.float32)

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """One image."""
        white = np.fft.rfft2(generator.standard_normal(self._shape, np.float32))
        pink = np.fft.irfft2(white * self._amplitude, s=self._shape[1:])
        contrast = math.exp(CONTRAST * generator.standard_normal() - CONTRAST**2)  # its mean square is 1
        return contrast * np.tensordot(self._colours, pink, 1)


@dataclass(frozen=True)
class Noise:
    """What one input is fed.

    Attributes:
        spec: The input.
        shape: Of a sample, with every size known.
        images: Where samples are images; None: their numbers are independent.
        span: (lowest, highest) value; None: any, with mean 0 and variance 1.
    """

    spec: InputSpec
    shape: tuple[int, ...]
    images: PinkImages | None
    span: tuple[float, float] | None

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """One sample of `shape`."""
        if self.images is None and not is_floating(self.spec.dtype) and self.span is not None:
            first, last = map(int, self.span)
            return generator.integers(first, last, self.shape, self.spec.dtype.type, endpoint=True)
        if self.images is None:
            values = generator.standard_normal(self.shape, np.float32)
        else:
            values = self.images.draw(generator)
            image = ImageInput.of(self.spec)
            values = values if image is None or image.channels_first else values.transpose(1, 2, 0)
            values = values.reshape(self.shape)
        if self.span is not None:
            low, high = self.span
            values = np.clip((low + high) / 2 + values.astype(np.float64) * (high - low) / 4, low, high)
        return values if is_floating(self.spec.dtype) else np.rint(values)


class NoiseSamples:
    """Samples that are made when they are read; see `Samples`."""

    has_labels = False

    def __init__(self, inputs: Sequence[Noise], seed: int) -> None:
        self._inputs = inputs
        self._seed = seed

    def __len__(self) -> int:
        return CALIBRATION + HELD_OUT

    def read(self, rows: np.ndarray) -> Batch:
        """See `Samples.read`."""
        generators = [np.random.default_rng((self._seed, row)) for row in rows]
        drawn = {noise.spec.name: np.stack([noise.draw(g) for g in generators]) for noise in self._inputs}
        return Batch({n.spec.name: convert(drawn[n.spec.name], n.spec, "noise") for n in self._inputs}, None)


def _noise_for(source: str, spec: InputSpec, size: tuple[int, int] | None, span: tuple[float, float] | None) -> Noise:
    """Judge from an input's shape and type what it is to be fed."""
    where = f"{source}: the model's input {spec.name!r} {describe(spec.shape)}"
    if not is_floating(spec.dtype):
        _check_integers(where, spec, span)
    image = ImageInput.of(spec)
    if image is not None and size is None and image.height and image.width:
        size = image.height, image.width
    if size is None:
        sizes = [known for known in spec.sample_shape if known is not None]
        if len(sizes) < len(spec.sample_shape):
            remedy = "give noise:HEIGHTxWIDTH" if image is not None else "noise cannot know it, so give samples"
            raise UsageError(f"{where} has an axis of open size: {remedy}")
        return Noise(spec, tuple(sizes), None, span)
    shape = tuple(known or 0 for known in spec.sample_shape)
    if image is not None:
        channels = image.channels
        shape = (channels, *size) if image.channels_first else (*size, channels)
    else:
        channels, rest = divmod(int(np.prod(shape)), size[0] * size[1])
        channels = 0 if rest else channels
    if channels not in IMAGE_CHANNELS or not spec.accepts(shape):
        raise UsageError(f"{where} does not hold images of {size[0]}x{size[1]} with 1, 3 or 4 channels")
    return Noise(spec, shape, PinkImages(channels, *size), span)


def _check_integers(where: str, spec: InputSpec, span: tuple[float, float] | None) -> None:
    if spec.dtype.kind not in "iu":
        raise UsageError(f"{where} takes {spec.dtype}, which noise does not make")
    if span is None:
        raise UsageError(f"{where} takes integers ({spec.dtype}): say which in a range, such as noise:0..255")
    limits = np.iinfo(spec.dtype)
    if not all(end.is_integer() and limits.min <= end <= limits.max for end in span):
        raise UsageError(f"{where} is {spec.dtype}, which does not hold the range {span[0]:g}..{span[1]:g}")
