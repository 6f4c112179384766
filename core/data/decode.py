"""Image files of any mode, decoded into upright RGB: reduced, or as an evaluation view."""

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from core.config import GreyRange, Preprocessing

UInt8Array = NDArray[np.uint8]
Raw = Path | bytes | Image.Image

Image.init()
_RASTER = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "AVIF")
FORMATS = tuple(kind for kind in _RASTER if kind in Image.OPEN)
"""What Pillow may take a file for: others, such as EPS, start programs or read other files."""
# Pillow refuses images of twice as many pixels. They are the user's own files, so its limit of
# 179 megapixels, meant for files of strangers, is too low.
_MAX_PIXELS = 500_000_000
# Larger images are decoded one at a time, since each takes up to 9 bytes a pixel. Assumption.
_LARGE_PIXELS = 32_000_000
_ONE_LARGE_IMAGE = threading.Lock()
_SETTINGS, _SETTINGS_LOCK = contextlib.ExitStack(), threading.Lock()
_n_strict = 0
# Longer sides, relative to the shorter one, are cut: resized they could fill the memory.
_MAX_ASPECT = 20


@dataclass(frozen=True, slots=True)
class View:
    """An evaluation view: what it takes from `Preprocessing`."""

    image_size: int
    resize_size: int
    interpolation: str
    is_squashed: bool = False

    @classmethod
    def of(cls, shown: Preprocessing) -> "View":
        """Return the view that a network wants."""
        return cls(shown.image_size, shown.resize_size, shown.interpolation, shown.is_squashed)


Kind = int | View
"""What is kept of an image: a view, or the image with its shorter side reduced to at most this."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """One image.

    Attributes:
        pixels: (H, W, 3), one array per kind; one black pixel each where the grey values have yet
            to be scaled.
        grey: The lowest and highest value of an image of more than 8 bits; else None.
    """

    pixels: list[UInt8Array]
    grey: GreyRange


@contextlib.contextmanager
def strict_and_quiet() -> Iterator[None]:
    """Let Pillow refuse files that are cut short, read large ones, and keep warnings to itself.

    It warns of odd metadata and of very large images; both decode all the same. These are
    settings of the whole process, which the last thread that leaves restores.
    """
    global _n_strict
    with _SETTINGS_LOCK:
        if _n_strict == 0:
            _SETTINGS.enter_context(_settings())
        _n_strict += 1
    try:
        yield
    finally:
        with _SETTINGS_LOCK:
            _n_strict -= 1
            if _n_strict == 0:
                _SETTINGS.close()


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, _MAX_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before


def decode(source: Raw, kinds: Sequence[Kind], grey_range: GreyRange = None) -> Decoded:
    """Decode an image of any mode into upright RGB, in any thread inside `strict_and_quiet`.

    Palettes are looked up, transparency is laid over white, CMYK is converted, the values in
    `grey_range` of an image of more than 8 bits become 0 to 255, the EXIF orientation is applied,
    and an image that is very long loses its ends.

    Raises:
        OSError: Not an image, or a damaged one.
    """
    image = source if isinstance(source, Image.Image) else _opened(source)
    is_large = image.width * image.height > _LARGE_PIXELS
    with image, _ONE_LARGE_IMAGE if is_large else contextlib.nullcontext():
        image.load()
        upright, grey = _to_8_bits(_within_aspect(_upright(image)), grey_range)
        if grey is not None and grey_range is None:
            return Decoded([np.zeros((1, 1, 3), np.uint8)] * len(kinds), grey)
        return Decoded([_kept(upright, kind) for kind in kinds], grey)


def eval_view(source: Raw, shown: Preprocessing) -> UInt8Array:
    """Decode an image into the evaluation view that a checkpoint's card describes, (S, S, 3).

    Raises:
        OSError: Not an image, or a damaged one.
        ValueError: It has more than 8 bits, and no image of the network's data had.
    """
    try:
        with strict_and_quiet():
            decoded = decode(source, [View.of(shown)], shown.grey_range)
    except (OSError, MemoryError):
        raise
    except Exception as err:  # Pillow raises nearly anything for damaged files
        raise OSError(str(err)) from err
    if decoded.grey is not None and shown.grey_range is None:
        raise ValueError("the image must have 8 bits, as those that the network was trained on.")
    return decoded.pixels[0]


def _opened(source: Path | bytes) -> Image.Image:
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as err:
        raise OSError(f"its contents are none of {', '.join(FORMATS)}") from err


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # a damaged EXIF block raises nearly anything, and the pixels are whole
        return image


def _within_aspect(image: Image.Image) -> Image.Image:
    """Cut the ends off an image that a resize of its shorter side would make enormous."""
    longest = _MAX_ASPECT * min(image.size)
    if max(image.size) <= longest:
        return image
    size = [min(image.height, longest), min(image.width, longest)]
    cropped: Image.Image = functional.center_crop(image, size)
    return cropped


def _to_8_bits(image: Image.Image, grey_range: GreyRange) -> tuple[Image.Image, GreyRange]:
    """Convert to RGB, or to 8-bit grey where that is all there is, for a third of the memory.

    Also return the lowest and highest value of an image of more than 8 bits.
    """
    if image.mode.startswith(("I", "F")):
        values = np.array(image, dtype=np.float32)
        np.nan_to_num(values, copy=False, posinf=0, neginf=0)
        own = float(values.min()), float(values.max())
        low, high = grey_range or own
        values -= low
        values *= 255 / ((high - low) or 1.0)
        levels = np.clip(values.round(out=values), 0, 255).astype(np.uint8)
        return Image.fromarray(levels), own
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        over_white = Image.new("RGB", layer.size, "white")
        over_white.paste(layer, mask=layer)
        return over_white, None
    return image.convert("L" if image.mode in ("1", "L") else "RGB"), None


def _kept(image: Image.Image, kind: Kind) -> UInt8Array:
    if isinstance(kind, View):
        mode = InterpolationMode(kind.interpolation)
        size = [kind.resize_size] * (2 if kind.is_squashed else 1)
        resized = functional.resize(image, size, mode)
        image = functional.center_crop(resized, [kind.image_size, kind.image_size])
    elif (short := min(image.size)) > kind:
        width, height = (max(1, round(side * kind / short)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.array(image.convert("RGB"), dtype=np.uint8)
