"""Images of a network as PNG: which arrays are images, and which of their numbers are black and white."""

import base64
import io

import numpy as np
from PIL import Image

SMALLEST = 32
"""Pixels on a side below which an array is no image to look at."""
WIDEST = 192
"""Pixels on a side of an embedded image: as wide as half a phone's screen."""
_CHANNELS = (1, 3)
_RANGES = ((0.0, 1.0, 0.05, 0.0), (-1.0, 1.0, 0.1, 0.0), (0.0, 255.0, 64.0, 8.0))
"""(black, white, how far the numbers may leave the range, how far they reach at least)."""


def is_image(array: np.ndarray) -> bool:
    """Whether `array` is a batch of grey or RGB images [N, 1 or 3, height, width] of floats, large enough to see."""
    shape = array.shape
    return array.ndim == 4 and array.dtype.kind == "f" and shape[1] in _CHANNELS and min(shape[2:]) >= SMALLEST


def black_and_white(images: np.ndarray) -> tuple[float, float]:
    """The numbers that stand for black and white: 0..1, -1..1 or 0..255 where nearly all pixels lie there.

    Else the images were normalised, and the darkest and brightest hundredths of their pixels are black and white.
    """
    low, high = (float(edge) for edge in np.percentile(images, (1, 99)))
    for black, white, beyond, least in _RANGES:
        if black - beyond <= low and least <= high <= white + beyond:
            return black, white
    return low, max(high, low + 1e-6)


def to_png(image: np.ndarray, black: float, white: float) -> bytes:
    """The image [1 or 3, height, width] as a small PNG of at most 256 colours; what is not finite is black."""
    shade = np.nan_to_num((image.astype(np.float64) - black) / (white - black), nan=0.0, posinf=0.0, neginf=0.0)
    pixels = np.rint(255 * shade.clip(0, 1)).astype(np.uint8).transpose(1, 2, 0)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((WIDEST, WIDEST), Image.Resampling.BOX)
    if picture.mode == "RGB":
        picture = picture.quantize(256, dither=Image.Dither.FLOYDSTEINBERG)
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def data_uri(png: bytes) -> str:
    """The image inside the page's text: nothing is fetched."""
    return f"data:image/png;base64,{base64_text(png)}"


def base64_text(content: bytes) -> str:
    """`content` as base64."""
    return base64.b64encode(content).decode("ascii")
