import io

import numpy as np
import pytest
from PIL import Image, ImageFile

from core.data.decode import UInt8Array, decode_rgb, strict_and_quiet

RED = (200, 30, 40)


def _decode(source: bytes, bound: int = 100) -> UInt8Array:
    with strict_and_quiet():
        return decode_rgb(source, bound)


def _bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _solid(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (8, 6), colour)


def _palette(**options: int) -> bytes:
    image = _solid("P", 1)
    image.putpalette([0, 0, 0, *RED])
    return _bytes(image, **options)


@pytest.mark.parametrize(
    ("source", "pixel", "tolerance"),
    [
        (_bytes(_solid("RGB", RED)), RED, 0),
        (_bytes(_solid("L", 77)), (77, 77, 77), 0),
        (_bytes(_solid("1", 1)), (255, 255, 255), 0),
        (_bytes(_solid("LA", (77, 255))), (77, 77, 77), 0),
        (_bytes(_solid("LA", (77, 0))), (255, 255, 255), 0),
        (_bytes(_solid("RGBA", (*RED, 255))), RED, 0),
        (_bytes(_solid("RGBA", (0, 0, 0, 0))), (255, 255, 255), 0),
        (_bytes(_solid("RGBA", (0, 0, 0, 128))), (127, 127, 127), 1),
        (_palette(), RED, 0),
        (_palette(transparency=0), RED, 0),
        (_palette(transparency=1), (255, 255, 255), 0),
        (_bytes(_solid("I;16", 65535)), (255, 255, 255), 0),
        (_bytes(_solid("I;16", 77 * 257)), (77, 77, 77), 0),
        (_bytes(_solid("I", 77 * 257), "TIFF"), (77, 77, 77), 0),
        (_bytes(_solid("F", 0.5), "TIFF"), (128, 128, 128), 1),
        (_bytes(_solid("CMYK", (0, 255, 255, 0)), "JPEG"), (255, 0, 0), 3),
        (_bytes(_solid("RGB", RED), "GIF"), RED, 2),
        (_bytes(_solid("RGB", RED), "BMP"), RED, 0),
        (_bytes(_solid("RGB", RED), "WEBP", lossless=True), RED, 0),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else str(value),
)
def test_every_mode_becomes_right_rgb(
    source: bytes, pixel: tuple[int, int, int], tolerance: int
) -> None:
    decoded = _decode(source)
    assert decoded.shape == (6, 8, 3)
    assert decoded.dtype == np.uint8
    assert np.abs(decoded[3, 4].astype(int) - pixel).max() <= tolerance


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (5, 7)), (6, (0, 5))])
def test_exif_rotation_is_applied(orientation: int, corner: tuple[int, int]) -> None:
    image = _solid("RGB", (0, 0, 0))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = _decode(_bytes(image, exif=exif))
    assert decoded[corner].tolist() == [255, 255, 255]
    assert decoded.sum() == 3 * 255
    assert decoded.shape == ((8, 6, 3) if orientation == 6 else (6, 8, 3))


def test_large_images_are_reduced_and_small_ones_kept() -> None:
    image = Image.new("RGB", (900, 600), RED)
    for kind in ("PNG", "JPEG"):
        decoded = _decode(_bytes(image, kind))
        assert decoded.shape == (100, 150, 3)
        assert np.abs(decoded[50, 50].astype(int) - RED).max() <= 3
    assert _decode(_bytes(image), 1000).shape == (600, 900, 3)


def test_a_cut_file_is_refused_whatever_pillow_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    noise = np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)
    whole = _bytes(Image.fromarray(noise), "JPEG")
    with pytest.raises(OSError, match="truncated"):
        _decode(whole[: len(whole) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_infinite_and_undefined_values_decode() -> None:
    values = np.full((6, 8), 0.5, dtype=np.float32)
    values[0, 0], values[0, 1] = np.nan, -np.inf
    decoded = _decode(_bytes(Image.fromarray(values), "TIFF"))
    assert decoded[0, 0].tolist() == decoded[0, 1].tolist() == [0, 0, 0]
    assert decoded[3, 3].tolist() == [128, 128, 128]
