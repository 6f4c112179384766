"""Pictures decoded once: right RGB of bounded size in one memory-mapped file, shared by all."""

import contextlib
import errno
import hashlib
import io
import os
import shutil
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from core.device import usable_cores

UInt8Array = NDArray[np.uint8]
IntArray = NDArray[np.int64]
Raw = Path | bytes | Image.Image

# Stores made by another way of decoding are not used; raise it when decode_rgb changes its pixels.
_DECODER = 1
_PIXELS, _INDEX = "pixels.bin", "index.npz"
# Checking every picture's checksum reads the whole file; above this size a sample stands for it.
_CHECK_WHOLE_BYTES = 1 << 30
_CHECK_SAMPLE = 64
# One 16-bit step is 257 8-bit-scaled units: 65535 = 255 * 257.
_16_TO_8 = 257


class DataError(ValueError):
    """The pictures cannot be used as they are; the message says which and what to do."""


def decode_rgb(source: Raw, bound: int) -> UInt8Array:
    """Decode a picture of any mode into upright RGB.

    Palettes are looked up, transparency is laid over white, CMYK is converted, 16 bits are scaled
    to 8, and the EXIF orientation is applied.

    Args:
        source: File, encoded bytes, or an opened image.
        bound: Longest allowed shorter side, pixels; larger pictures are reduced, smaller kept.

    Returns:
        Pixels, (H, W, 3).

    Raises:
        OSError: Not a picture, or a damaged one.
    """
    opened: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    with warnings.catch_warnings():
        # Pillow warns of odd metadata and of very large pictures; both decode all the same.
        warnings.simplefilter("ignore")
        image = opened if isinstance(opened, Image.Image) else Image.open(opened)
        with image:
            image.draft("RGB", (2 * bound, 2 * bound))  # JPEG only: decodes at 1/2, 1/4, 1/8
            image.load()
            rgb = _to_rgb(ImageOps.exif_transpose(image))
            pixels: UInt8Array = np.array(_reduced(rgb, bound), dtype=np.uint8)
    return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(values: NDArray[Any]) -> UInt8Array:
    """Scale grey values of 16 bits (or a float picture in [0, 1] or [0, 255]) to 8 bits."""
    if values.dtype.kind == "f":
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


@dataclass(frozen=True, slots=True)
class Item:
    """One picture before it is decoded.

    Attributes:
        content: SHA-256 of its contents, hexadecimal.
        path: What messages and reports call it.
        read: Gives the file, the bytes or the image.
    """

    content: str
    path: str
    read: Callable[[], Raw]


class PictureStore:
    """Decoded pictures in one flat file, opened as a memory map.

    Args:
        folder: Where `build_store` put them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with open(folder / _INDEX, "rb") as file, np.load(file) as index:
            self.sizes: IntArray = index["sizes"]
            self.offsets: IntArray = index["offsets"]
            self.checksums: IntArray = index["checksums"]
            reasons = zip(index["broken"].tolist(), index["reasons"].tolist(), strict=True)
            self.broken: dict[str, str] = dict(reasons)
        self._open()

    def _open(self) -> None:
        path = self.folder / _PIXELS
        if path.stat().st_size != self.size_bytes:
            raise OSError(f"{path} has {path.stat().st_size} bytes instead of {self.size_bytes}")
        self._pixels: UInt8Array = np.memmap(path, np.uint8, "r")

    @property
    def size_bytes(self) -> int:
        """Bytes of all pixels."""
        return int(self.offsets[-1])

    def __len__(self) -> int:
        return len(self.sizes)

    def picture(self, i: int) -> UInt8Array:
        """Return picture i, (H, W, 3), as a view of the map."""
        height, width = self.sizes[i]
        return self._pixels[self.offsets[i] : self.offsets[i + 1]].reshape(height, width, 3)

    def is_sound(self) -> bool:
        """Say whether the pixels agree with their checksums (a sample's, in a large store)."""
        which: Sequence[int] | IntArray = range(len(self))
        if self.size_bytes > _CHECK_WHOLE_BYTES:
            which = np.linspace(0, len(self) - 1, _CHECK_SAMPLE, dtype=np.int64)
        return all(zlib.crc32(self.picture(int(i)).data) == self.checksums[i] for i in which)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]  # a worker opens its own map


Progress = Callable[[int, int], None]


def build_store(
    items: Sequence[Item], bound: int, cache: Path, progress: Progress | None = None
) -> tuple[PictureStore, dict[str, int], dict[str, str]]:
    """Open the store of these pictures, decoding them first where that was not done yet.

    The store is keyed by contents and bound, so folders may move and files be renamed; it appears
    whole or not at all, and a damaged one is made again.

    Args:
        items: Pictures; equal contents are kept once.
        bound: Longest allowed shorter side, pixels.
        cache: Folder of stores.
        progress: Told how many of how many pictures are decoded.

    Returns:
        The store, the position in it of each content, and why the other contents are unreadable.

    Raises:
        DataError: The disk is full or the cache folder cannot be written.
    """
    unique = {item.content: item for item in items}
    contents = sorted(unique)
    digest = hashlib.sha256(f"{_DECODER} {bound} {' '.join(contents)}".encode()).hexdigest()
    folder = cache / "pictures" / digest[:32]
    found = _opened(folder, contents)
    if found is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix="partial-", dir=folder.parent))
        try:
            _decode_all([unique[content] for content in contents], bound, partial, progress)
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process was as fast: its store serves
                os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as err:
        raise _cache_error(err, folder.parent, len(unique), bound) from err
    found = _opened(folder, contents)
    assert found is not None, "a store just built must open"
    return found


def _opened(
    folder: Path, contents: list[str]
) -> tuple[PictureStore, dict[str, int], dict[str, str]] | None:
    """Open a store that is there and sound; None where there is none."""
    try:
        store = PictureStore(folder)
        if not store.is_sound():
            return None
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile):
        return None
    readable = [content for content in contents if content not in store.broken]
    return store, {content: i for i, content in enumerate(readable)}, store.broken


def _cache_error(err: OSError, folder: Path, n: int, bound: int) -> DataError:
    need = n * bound * bound * 4 / 1e9  # 3 bytes a pixel, pictures a third longer than wide
    is_full = err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    why = "the disk is full" if is_full else str(err)
    return DataError(
        f"decoded pictures cannot be kept in {folder}: {why}. About {need:.1f} GB are needed; "
        "make room, set data.cache_dir to another folder, or set data.picture_size lower."
    )


def _decode_all(items: list[Item], bound: int, folder: Path, progress: Progress | None) -> None:
    sizes: list[tuple[int, int]] = []
    checksums: list[int] = []
    offsets = [0]
    broken: dict[str, str] = {}
    with open(folder / _PIXELS, "wb") as file:
        for done, (item, result) in enumerate(_decoded(items, bound), start=1):
            if isinstance(result, str):
                broken[item.content] = result
            else:
                file.write(result.data)
                sizes.append((result.shape[0], result.shape[1]))
                checksums.append(zlib.crc32(result.data))
                offsets.append(offsets[-1] + result.size)
            if progress is not None:
                progress(done, len(items))
        file.flush()
        os.fsync(file.fileno())
    np.savez(
        folder / _INDEX,
        sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        offsets=np.array(offsets, dtype=np.int64),
        checksums=np.array(checksums, dtype=np.int64),
        broken=np.array(list(broken), dtype=np.str_),
        reasons=np.array(list(broken.values()), dtype=np.str_),
    )


def _decoded(items: list[Item], bound: int) -> Iterator[tuple[Item, UInt8Array | str]]:
    """Decode in parallel (Pillow leaves the interpreter free), in order, a window at a time."""

    def decode(item: Item) -> UInt8Array | str:
        try:
            return np.ascontiguousarray(decode_rgb(item.read(), bound))
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as err:
            return (str(err).splitlines() or [type(err).__name__])[0]

    cores = usable_cores()
    window = 16 * cores
    with ThreadPoolExecutor(cores) as pool:
        for at in range(0, len(items), window):
            part = items[at : at + window]
            yield from zip(part, pool.map(decode, part), strict=True)
