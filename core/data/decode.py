"""Image files of any mode, decoded into upright RGB of bounded size."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

UInt8Array = NDArray[np.uint8]
Raw = Path | bytes | Image.Image

# One 16-bit step is 257 8-bit-scaled units: 65535 = 255 * 257.
_16_TO_8 = 257


@contextlib.contextmanager
def strict_and_quiet() -> Iterator[None]:
    """Let Pillow refuse files that are cut short, and keep its warnings to itself.

    It warns of odd metadata and of very large images; both decode all the same. These are
    settings of the whole process: enter this around threads, not in each of them.
    """
    allowed = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = allowed


def decode_rgb(source: Raw, bound: int) -> UInt8Array:
    """Decode an image of any mode into upright RGB, in any thread inside `strict_and_quiet`.

    Palettes are looked up, transparency is laid over white, CMYK is converted, 16 bits are scaled
    to 8, and the EXIF orientation is applied.

    Args:
        source: File, encoded bytes, or an opened image.
        bound: Longest allowed shorter side, pixels; larger images are reduced, smaller kept.

    Returns:
        Pixels, (H, W, 3).

    Raises:
        OSError: Not an image, or a damaged one.
    """
    opened: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    image = opened if isinstance(opened, Image.Image) else Image.open(opened)
    with image:
        image.draft("RGB", (2 * bound, 2 * bound))  # JPEG only: decodes at 1/2, 1/4, 1/8
        image.load()
        rgb = _to_rgb(ImageOps.exif_transpose(image))
        return np.array(_reduced(rgb, bound), dtype=np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(values: NDArray[Any]) -> UInt8Array:
    """Scale grey values of 16 bits (or a float image in [0, 1] or [0, 255]) to 8 bits."""
    if values.dtype.kind == "f":
        values = np.nan_to_num(values)
        top = float(values.max(initial=0.0))
        scaled = values * 255 if top <= 1 else values / _16_TO_8 if top > 255 else values
    else:
        scaled = values / _16_TO_8
    pixels: UInt8Array = np.clip(np.round(scaled), 0, 255).astype(np.uint8)
    return pixels


def _reduced(image: Image.Image, bound: int) -> Image.Image:
    short = min(image.size)
    if short <= bound:
        return image
    size = (
        max(1, round(image.width * bound / short)),
        max(1, round(image.height * bound / short)),
    )
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
