"""Images decoded once: RGB of bounded size in one memory-mapped file, shared by all."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from core.cache import FULL_DISK, prune, size_bytes
from core.data.decode import UInt8Array, decode_rgb, strict_and_quiet
from core.data.draws import IntArray
from core.data.sources import DataError, LabelledImage
from core.device import usable_cores

Progress = Callable[[int, int], None] | None  # takes how many of how many images are decoded

# Stores made by another way of decoding are not used; raise it when decode_rgb changes its pixels.
_DECODER = 1
_PIXELS, _INDEX = "pixels.bin", "index.json"
# Checking every image's checksum reads the whole file; above this size a sample stands for it.
_CHECK_WHOLE_BYTES = 1 << 30
_CHECK_SAMPLE = 64
# These are faults of the machine, not of the image, and must not be kept as the image's.
_MACHINE_ERRORS = (errno.EIO, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EMFILE, errno.ENFILE)
# Stores may take this share of what the disk has free and what they take already. Assumption.
_SHARE_OF_DISK = 0.5
# A store that was used since then may be somebody's: it stays, whatever it takes. Assumption.
_IN_USE_S = 24 * 3600.0


class ImageStore:
    """Decoded images in one flat file, opened as a memory map.

    Attributes:
        folder: Where `build_store` put them.
        sizes: Heights and widths, (N, 2).
        checksums: CRC-32 of each image's pixels, (N,).
        contents: SHA-256 of each image's undecoded contents, hexadecimal, in their order.
        broken: Why other contents cannot be decoded.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = json.loads((folder / _INDEX).read_bytes())
        self.sizes: IntArray = np.array(index["sizes"], dtype=np.int64).reshape(-1, 2)
        self.checksums: IntArray = np.array(index["checksums"], dtype=np.int64)
        self.contents: list[str] = index["contents"]
        self.broken: dict[str, str] = index["broken"]
        self._offsets = np.concatenate([[0], np.cumsum(3 * self.sizes.prod(axis=1))])
        path = folder / _PIXELS
        if path.stat().st_size != self.size_bytes:
            raise OSError(f"{path} has {path.stat().st_size} bytes instead of {self.size_bytes}")
        # An empty file cannot be mapped: no image could be decoded.
        empty = np.empty(0, np.uint8)
        self._pixels: UInt8Array = np.memmap(path, np.uint8, "r") if self.size_bytes else empty
        self.mark_used()

    @property
    def size_bytes(self) -> int:
        """Bytes of all pixels."""
        return int(self._offsets[-1])

    def __len__(self) -> int:
        return len(self.sizes)

    def image(self, i: int) -> UInt8Array:
        """Return image i, (H, W, 3), as a view of the map."""
        height, width = self.sizes[i]
        return self._pixels[self._offsets[i] : self._offsets[i + 1]].reshape(height, width, 3)

    def mark_used(self) -> None:
        """Keep the store from being pruned for another day."""
        with contextlib.suppress(OSError):  # its folder may be read-only
            os.utime(self.folder)

    def __reduce__(self) -> tuple[type["ImageStore"], tuple[Path]]:
        return ImageStore, (self.folder,)  # a worker opens its own map


def build_store(
    images: Sequence[LabelledImage], bound: int, cache: Path, progress: Progress = None
) -> ImageStore:
    """Open the store of these images, decoding them first where that was not done yet.

    The store is keyed by contents and bound, so folders may move and files be renamed. One
    process builds it while others wait; a damaged one is built again. Stores that were not used
    for a day are pruned where all together take more than half of what they take and what is free.

    Args:
        images: What to decode; equal contents are kept once.
        bound: Longest allowed shorter side, pixels.
        cache: Folder of stores.
        progress: Called after each image.

    Raises:
        DataError: The disk is full or the cache folder cannot be written.
    """
    unique = {image.content: image for image in images}
    ordered = [unique[content] for content in sorted(unique)]
    digest = hashlib.sha256(f"{_DECODER} {bound} {' '.join(sorted(unique))}".encode()).hexdigest()
    folder = cache / "images" / digest[:32]
    store = _open_sound(folder, unique.keys())  # no lock first: the cache may be read-only
    if store is not None:
        return store
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            store = _open_sound(folder, unique.keys())  # another process may have built it
            return store or _build(ordered, bound, folder, progress)
    except OSError as err:
        need = 4 * len(unique) * bound * bound / 1e6  # 3 bytes per pixel, a third longer than wide
        why = "the disk is full" if err.errno in FULL_DISK else str(err)
        raise DataError(
            f"decoded images cannot be kept in {folder.parent}: {why}. About {need:,.1f} MB are "
            "needed; free some disk, set data.cache_dir to another folder, or set "
            "data.store_size lower."
        ) from err


def _open_sound(folder: Path, contents: Set[str]) -> ImageStore | None:
    """Open the store of these contents if it is whole, by its checksums (a sample of many)."""
    try:
        store = ImageStore(folder)
        n = _CHECK_SAMPLE if store.size_bytes > _CHECK_WHOLE_BYTES else len(store)
        which = np.linspace(0, len(store) - 1, n, dtype=np.int64)
        is_whole = all(zlib.crc32(store.image(i).data) == store.checksums[i] for i in which)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return store if is_whole and contents == {*store.contents, *store.broken} else None


def _build(
    images: list[LabelledImage], bound: int, folder: Path, progress: Progress
) -> ImageStore:
    """Decode images into a new store; where the disk is full, after pruning all that may go."""
    try:
        _decode_all(images, bound, folder, progress)
    except OSError as err:
        if err.errno not in FULL_DISK:
            raise
        prune(_stores(folder.parent), 0, unused_s=_IN_USE_S)
        _decode_all(images, bound, folder, progress)
    stores = _stores(folder.parent)
    free = shutil.disk_usage(folder).free + sum(map(size_bytes, stores))
    prune(stores, int(_SHARE_OF_DISK * free), unused_s=_IN_USE_S)
    return ImageStore(folder)


def _stores(folder: Path) -> list[Path]:
    """List the stores of a folder; whatever else lies there is left alone."""
    named = (path for path in folder.iterdir() if re.fullmatch("[0-9a-f]{32}", path.name))
    return [path for path in named if path.is_dir() and not path.is_symlink()]


def _decode_all(images: list[LabelledImage], bound: int, folder: Path, progress: Progress) -> None:
    """Write a store; its index comes last, and without it there is no store."""
    # Not written over: other processes may have the damaged pixels mapped.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    index: dict[str, Any] = {"contents": [], "sizes": [], "checksums": [], "broken": {}}
    try:
        with open(folder / _PIXELS, "wb") as file:
            for done, (image, result) in enumerate(_decoded(images, bound), start=1):
                if isinstance(result, str):
                    index["broken"][image.content] = result
                else:
                    file.write(result.data)
                    index["contents"].append(image.content)
                    index["sizes"].append(result.shape[:2])
                    index["checksums"].append(zlib.crc32(result.data))
                if progress is not None:
                    progress(done, len(images))
            file.flush()
            os.fsync(file.fileno())
        (folder / _INDEX).write_text(json.dumps(index), encoding="utf-8")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _decoded(
    images: list[LabelledImage], bound: int
) -> Iterator[tuple[LabelledImage, UInt8Array | str]]:
    """Decode in parallel (Pillow releases the GIL), in order, a window at a time."""

    def decode(image: LabelledImage) -> UInt8Array | str:
        try:
            return decode_rgb(image.read(), bound)
        except MemoryError:
            raise
        except Exception as err:  # a damaged file makes decoders raise nearly anything
            if isinstance(err, OSError) and err.errno in _MACHINE_ERRORS:
                raise DataError(f"image {image.path} cannot be read: {err.strerror}.") from err
            return (str(err).splitlines() or [type(err).__name__])[0]

    cores = usable_cores()
    window = 16 * cores
    with strict_and_quiet(), ThreadPoolExecutor(cores) as pool:
        for at in range(0, len(images), window):
            part = images[at : at + window]
            yield from zip(part, pool.map(decode, part), strict=True)
