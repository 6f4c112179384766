import io
import os
import pickle
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import make_folder

from core.decode import decode_rgb
from core.pictures import Item, PictureStore, build_store

RED = (200, 30, 40)


def _bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _solid(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (8, 6), colour)


def _palette(transparent: bool) -> bytes:
    image = _solid("P", 1)
    image.putpalette([0, 0, 0, *RED])
    image.putpixel((0, 0), 0)
    return _bytes(image, transparency=0) if transparent else _bytes(image)


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
        (_palette(transparent=False), RED, 0),
        (_palette(transparent=True), RED, 0),
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
    decoded = decode_rgb(source, 100)
    assert decoded.shape == (6, 8, 3)
    assert decoded.dtype == np.uint8
    assert np.abs(decoded[3, 4].astype(int) - pixel).max() <= tolerance


def test_transparent_palette_entry_is_white() -> None:
    assert decode_rgb(_palette(transparent=True), 100)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (5, 7)), (6, (0, 5))])
def test_exif_rotation_is_applied(orientation: int, corner: tuple[int, int]) -> None:
    image = _solid("RGB", (0, 0, 0))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_rgb(_bytes(image, exif=exif), 100)
    assert decoded[corner].tolist() == [255, 255, 255]
    assert decoded.sum() == 3 * 255
    assert decoded.shape == ((8, 6, 3) if orientation == 6 else (6, 8, 3))


def test_large_pictures_are_reduced_and_small_ones_kept() -> None:
    image = Image.new("RGB", (900, 600), RED)
    for kind in ("PNG", "JPEG"):
        decoded = decode_rgb(_bytes(image, kind), 100)
        assert decoded.shape == (100, 150, 3)
        assert np.abs(decoded[50, 50].astype(int) - RED).max() <= 3
    assert decode_rgb(_bytes(image), 1000).shape == (600, 900, 3)


def _items(root: Path) -> list[Item]:
    paths = sorted(root.rglob("*.*"))
    return [Item(f"{k:064d}", path.name, lambda p=path: p) for k, path in enumerate(paths)]


def test_store_holds_what_decoding_gives(tmp_path: Path) -> None:
    items = _items(make_folder(tmp_path / "photos", {"a": 5, "b": 4}))
    told: list[tuple[int, int]] = []
    store, at, broken = build_store(
        items, 30, tmp_path / "cache", lambda done, total: told.append((done, total))
    )
    assert (len(store), broken, told[-1]) == (9, {}, (9, 9))
    for item in items:
        expected = decode_rgb(item.read(), 30)
        assert np.array_equal(store.picture(at[item.content]), expected)
    again, _, _ = build_store(items, 30, tmp_path / "cache", lambda *_: pytest.fail("decoded"))
    assert np.array_equal(again.picture(3), store.picture(3))
    copy: PictureStore = pickle.loads(pickle.dumps(store))
    assert np.array_equal(copy.picture(8), store.picture(8))


@pytest.mark.parametrize("harm", ["truncated", "flipped", "no index", "bad index"])
def test_damaged_store_is_made_again(tmp_path: Path, harm: str) -> None:
    items = _items(make_folder(tmp_path / "photos", {"a": 3}))
    store, _, _ = build_store(items, 30, tmp_path / "cache")
    expected = [store.picture(i).copy() for i in range(3)]
    pixels, index = store.folder / "pixels.bin", store.folder / "index.npz"
    content = bytearray(pixels.read_bytes())
    content[100] ^= 255
    if harm == "truncated":
        pixels.write_bytes(pixels.read_bytes()[:-10])
    elif harm == "flipped":
        pixels.write_bytes(bytes(content))
    elif harm == "no index":
        index.unlink()
    else:
        index.write_bytes(b"PK\x03\x04 damaged")
    del store
    mended, _, _ = build_store(items, 30, tmp_path / "cache")
    assert all(np.array_equal(mended.picture(i), expected[i]) for i in range(3))


def test_unreadable_pictures_are_told_with_their_reason(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", {"a": 3}, suffix="jpg")
    whole = (root / "a" / "000.jpg").read_bytes()
    (root / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "a" / "text.png").write_text("no picture")
    items = _items(root)
    store, at, broken = build_store(items, 30, tmp_path / "cache")
    names = {item.content: item.path for item in items}
    assert {names[content] for content in broken} == {"cut.jpg", "text.png"}
    assert len(store) == len(at) == 3
    _, _, again = build_store(items, 30, tmp_path / "cache")
    assert again == broken


def test_full_disk_is_told_and_leaves_nothing_behind(tmp_path: Path) -> None:
    make_folder(tmp_path / "photos", {"a": 20}, side=100)
    script = textwrap.dedent(
        f"""
        import resource, signal
        from pathlib import Path
        from core.pictures import DataError, Item, build_store
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        root = Path({str(tmp_path)!r})
        paths = sorted((root / "photos").rglob("*.png"))
        items = [Item(str(k), p.name, lambda p=p: p) for k, p in enumerate(paths)]
        try:
            build_store(items, 100, root / "cache")
        except DataError as err:
            print(err)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ
    )
    assert "the disk is full" in done.stdout
    assert "data.cache_dir" in done.stdout
    assert list((tmp_path / "cache" / "pictures").iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 50_000
