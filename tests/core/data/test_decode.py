import io
import resource
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFile
from torchvision.transforms import v2

from core.config import GreyRange, Preprocessing
from core.data.decode import FORMATS, Decoded, Raw, UInt8Array, decode, eval_view, strict_and_quiet

RED = (200, 30, 40)


def _decoded(source: Raw, bound: int = 100, grey_range: GreyRange = None) -> Decoded:
    with strict_and_quiet():
        return decode(source, [bound], grey_range)


def _decode(source: Raw, bound: int = 100, grey_range: GreyRange = None) -> UInt8Array:
    return _decoded(source, bound, grey_range).pixels[0]


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
        (_bytes(_solid("LA", (0, 128))), (127, 127, 127), 1),
        (_bytes(_solid("RGBA", (*RED, 128))), (227, 142, 147), 1),
        (_palette(transparency=0), RED, 0),
        (_palette(transparency=1), (255, 255, 255), 0),
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
    with ThreadPoolExecutor(1) as pool, strict_and_quiet():  # another thread's end changes nothing
        pool.submit(_decode, Image.new("RGB", (9, 9))).result()
        assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_file_that_breaks_pillow_is_refused_like_any_other(shown: Preprocessing) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    head, first, second = _bytes(Image.fromarray(noise)).split(b"IDAT", 2)
    broken = head + b"IDAT" + first + bytes(4) + second  # the kind of the second part is missing
    with pytest.raises(OSError, match="broken PNG"):
        eval_view(broken, shown)


@pytest.mark.parametrize(
    ("mode", "value", "grey_range", "expected"),
    [
        ("I;16", 2048, (0, 4095), 128),
        ("I;16", 9999, (0, 4095), 255),  # brighter than any training image
        ("I", 77 * 257, (0, 65535), 77),
        ("F", 0.0, (-0.5, 2.0), 51),
        ("F", 3.0, (3.0, 3.0), 0),
    ],
)
def test_grey_values_of_more_than_8_bits_are_scaled_by_one_range(
    mode: str, value: float, grey_range: GreyRange, expected: int, shown: Preprocessing
) -> None:
    source = _bytes(_solid(mode, value), "TIFF")
    decoded = _decoded(source, grey_range=grey_range)
    assert decoded.grey == (value, value)
    assert decoded.pixels[0][3, 4].tolist() == [expected] * 3
    assert _decode(source).shape == (1, 1, 3)  # not to be used before the range is known
    with pytest.raises(ValueError, match="must have 8 bits"):
        eval_view(source, shown)


def test_infinite_and_undefined_values_decode() -> None:
    values = np.full((6, 8), 0.5, dtype=np.float32)
    values[0, 0], values[0, 1] = np.nan, -np.inf
    decoded = _decode(_bytes(Image.fromarray(values), "TIFF"), grey_range=(0, 1))
    assert decoded[0, 0].tolist() == decoded[0, 1].tolist() == [0, 0, 0]
    assert decoded[3, 3].tolist() == [128, 128, 128]


@pytest.mark.parametrize(
    "exif", [b"\0\x08\0\x02\x01\x12\0\x03\0\0", b"Exif\0\0\0\x08\0\x02", b"\xff"]
)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_a_damaged_exif_block_leaves_the_pixels(exif: bytes, kind: str) -> None:
    pixels = _decode(_bytes(_solid("RGB", RED), kind, exif=exif, quality=100))
    assert pixels.shape == (6, 8, 3)
    assert np.abs(pixels[3, 4].astype(int) - RED).max() <= 5


def test_an_image_of_more_than_a_hundred_megapixels_is_read_in_bounded_memory() -> None:
    encoded = _bytes(Image.new("1", (14000, 13000), 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert _decode(encoded).tolist() == np.full((100, 108, 3), 255).tolist()
    # One byte a pixel for Pillow's mode 1, one for grey; RGB would take four.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2.2 * 182e3 + 50e3


def test_a_very_long_image_loses_its_ends(shown: Preprocessing) -> None:
    long = Image.new("L", (8000, 1), 50)
    long.paste(200, (3990, 0, 4010, 1))
    assert _decode(_bytes(long)).tolist() == np.full((1, 20, 3), 200).tolist()
    assert eval_view(_bytes(long), shown).tolist() == np.full((24, 24, 3), 200).tolist()


def test_no_format_that_runs_programs_is_opened() -> None:
    assert {"JPEG", "PNG", "TIFF"} <= set(FORMATS)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
    with pytest.raises(OSError, match="its contents are none of JPEG"):
        _decode(script)


@pytest.mark.parametrize("name", ["RGB", "L", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("size", [(30, 50), (300, 200), (24, 24)])
def test_evaluation_view_is_torchvisions_transform_of_the_whole_image(
    shown: Preprocessing, name: str, size: tuple[int, int]
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    source = _bytes(Image.fromarray(noise).convert(name), "TIFF")
    image = Image.open(io.BytesIO(source)).convert("RGB")
    for how in ("bilinear", "bicubic"):
        transform = v2.Compose([v2.Resize(28, v2.InterpolationMode(how)), v2.CenterCrop(24)])
        view = eval_view(source, replace(shown, interpolation=how))
        assert np.array_equal(view, np.asarray(transform(image)))
    squashed = v2.Compose([v2.Resize((28, 28)), v2.CenterCrop(24)])(image)
    assert np.array_equal(eval_view(source, replace(shown, is_squashed=True)), squashed)
