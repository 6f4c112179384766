"""Images decoded once: for training and as evaluation views, in memory-mapped files, shared."""

import contextlib
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
import PIL
import torchvision
from filelock import FileLock

from core.cache import FULL_DISK, prune, size_bytes
from core.config import GreyRange, Preprocessing
from core.data.decode import Decoded, Kind, UInt8Array, View, decode, strict_and_quiet
from core.data.draws import IntArray
from core.data.sources import DataError, LabelledImage
from core.device import usable_cores

Progress = Callable[[int, int], None] | None  # takes how many of how many images are decoded

# Stores made by another way of decoding are not used; raise it when `decode` changes its pixels.
_DECODER = 4
_PIXELS, _INDEX = "pixels.bin", "index.json"
# Checking every image's checksum reads the whole file; above this size a sample stands for it.
_CHECK_WHOLE_BYTES = 1 << 30
_CHECK_SAMPLE = 64
# Stores may take this share of what the disk has free and what they take already. Assumption.
_SHARE_OF_DISK = 0.5
# A store that was used since then may be somebody's: it stays, whatever it takes. Assumption.
_IN_USE_S = 24 * 3600.0


class ImageStore:
    """Decoded images of one kind in one flat file, opened as a memory map.

    Attributes:
        sizes: Heights and widths, (N, 2).
        checksums: CRC-32 of each image's pixels, (N,).
        contents: SHA-256 of each image's file, hexadecimal.
        broken: Of other files, why they cannot be decoded.
        size_bytes: Of all pixels.
        grey: Lowest and highest value of images of more than 8 bits, by their contents.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = json.loads((folder / _INDEX).read_bytes())
        self.sizes: IntArray = np.array(index["sizes"], dtype=np.int64).reshape(-1, 2)
        self.checksums: IntArray = np.array(index["checksums"], dtype=np.int64)
        self.contents: list[str] = index["contents"]
        self.broken: dict[str, str] = index["broken"]
        self.grey: dict[str, tuple[float, float]] = index["grey"]
        self._offsets = np.concatenate([[0], np.cumsum(3 * self.sizes.prod(axis=1))])
        self.size_bytes = int(self._offsets[-1])
        path = folder / _PIXELS
        if path.stat().st_size != self.size_bytes:
            raise OSError(f"{path} has {path.stat().st_size} bytes instead of {self.size_bytes}")
        # An empty file cannot be mapped: no image could be decoded.
        empty = np.empty(0, np.uint8)
        self._pixels: UInt8Array = np.memmap(path, np.uint8, "r") if self.size_bytes else empty
        self.mark_used()

    def __len__(self) -> int:
        return len(self.sizes)

    def image(self, i: int) -> UInt8Array:
        """Return image i, (H, W, 3), as a view of the map."""
        height, width = self.sizes[i]
        return self._pixels[self._offsets[i] : self._offsets[i + 1]].reshape(height, width, 3)

    def views(self, which: IntArray) -> UInt8Array:
        """Copy images that all have one size, (B, H, W, 3)."""
        height, width = self.sizes[0]
        return self._pixels.reshape(-1, height, width, 3)[which]

    def mark_used(self) -> None:
        """Keep the store from being pruned for another day."""
        with contextlib.suppress(OSError):  # its folder may be read-only
            os.utime(self.folder)

    def __reduce__(self) -> tuple[type["ImageStore"], tuple[Path]]:
        return ImageStore, (self.folder,)  # a worker opens its own map


def build_stores(
    images: Sequence[LabelledImage],
    kinds: Sequence[Kind],
    cache: Path,
    progress: Progress = None,
    grey_range: GreyRange = None,
) -> list[ImageStore]:
    """Open the stores of images, one for each kind, decoding them first where that was not done.

    A store is keyed by contents, kind, grey range and libraries, so folders may move and files be
    renamed; equal contents are kept once. One process builds it while others wait; a damaged one
    is built again. Stores that were not used for a day are pruned where all together take more
    than half of what they take and what is free.

    Raises:
        DataError: The disk is full, the cache folder cannot be written, or an image has changed.
    """
    unique = {image.content: image for image in images}
    ordered = [unique[content] for content in sorted(unique)]
    decoder = str(_DECODER), PIL.__version__, torchvision.__version__, repr(grey_range)
    name = _hashed([*decoder, *sorted(unique)])
    folders = {kind: cache / "images" / _hashed([name, repr(kind)]) for kind in kinds}
    try:
        stores = {kind: _open_sound(folders[kind], unique.keys()) for kind in kinds}
        if None in stores.values():  # only then a lock: the cache may be read-only
            (cache / "images").mkdir(parents=True, exist_ok=True)
            with FileLock(cache / "images" / f"{name}.lock"):
                stores = {kind: _open_sound(folders[kind], unique.keys()) for kind in kinds}
                lacking = {kind: folders[kind] for kind in kinds if stores[kind] is None}
                if lacking:  # no other process has built them meanwhile
                    _build(ordered, lacking, grey_range, cache / "images", progress)
                stores |= {kind: ImageStore(folder) for kind, folder in lacking.items()}
    except OSError as err:
        bytes_each = (4 * k * k if isinstance(k, int) else 3 * k.image_size**2 for k in kinds)
        need = len(unique) * sum(bytes_each) / 1e6  # images are a third longer than wide
        why = "the disk is full" if err.errno in FULL_DISK else str(err)
        raise DataError(
            f"decoded images cannot be kept in {cache / 'images'}: {why}. About {need:,.1f} MB "
            "are needed; free some disk, set data.cache_dir to another folder, or set "
            "data.store_size lower."
        ) from err
    return [store for store in stores.values() if store is not None]


class EvalViews:
    """The evaluation views of images, a store for each network's preprocessing.

    Attributes:
        grey_range: Of the training images, as `decode` takes it.
    """

    def __init__(
        self, images: Sequence[LabelledImage], main: ImageStore, cache: Path, grey_range: GreyRange
    ) -> None:
        self.grey_range = grey_range
        self._images, self._main, self._cache = images, main, cache
        self._stores: dict[View, ImageStore] = {}

    def store(self, shown: Preprocessing, progress: Progress = None) -> ImageStore:
        """Return the store of some views, made at the first call; it raises as `build_stores`."""
        view = View.of(shown)
        if view not in self._stores:
            [found] = build_stores(self._images, [view], self._cache, progress, self.grey_range)
            if found.contents != self._main.contents:  # a position would be another image
                raise DataError(
                    "images must be readable each time, but some were at one time only. Remove "
                    f"{self._main.folder} and {found.folder}."
                )
            self._stores[view] = found
        return self._stores[view]


def _hashed(words: list[str]) -> str:
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:32]


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
    images: list[LabelledImage],
    folders: dict[Kind, Path],
    grey_range: GreyRange,
    parent: Path,
    progress: Progress,
) -> None:
    """Decode images into new stores; where the disk is full, after pruning all that may go."""
    try:
        _decode_all(images, folders, grey_range, progress)
    except OSError as err:
        if err.errno not in FULL_DISK:
            raise
        prune(_stores(parent), 0, unused_s=_IN_USE_S)
        _decode_all(images, folders, grey_range, progress)
    stores = _stores(parent)
    free = shutil.disk_usage(parent).free + sum(map(size_bytes, stores))
    prune(stores, int(_SHARE_OF_DISK * free), unused_s=_IN_USE_S)


def _stores(folder: Path) -> list[Path]:
    """List the stores of a folder; whatever else lies there is left alone."""
    named = (path for path in folder.iterdir() if re.fullmatch("[0-9a-f]{32}", path.name))
    return [path for path in named if path.is_dir() and not path.is_symlink()]


def _decode_all(
    images: list[LabelledImage],
    folders: dict[Kind, Path],
    grey_range: GreyRange,
    progress: Progress,
) -> None:
    """Write stores; their indexes come last, and without one there is no store."""
    for folder in folders.values():
        # Not written over: other processes may have the damaged pixels mapped.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    common: dict[str, Any] = {"contents": [], "broken": {}, "grey": {}}
    own: list[dict[str, Any]] = [{"sizes": [], "checksums": []} for _ in folders]
    try:
        with contextlib.ExitStack() as opened:
            files = [opened.enter_context(open(f / _PIXELS, "wb")) for f in folders.values()]
            results = _decoded(images, list(folders), grey_range)
            for done, (image, result) in enumerate(results, start=1):
                if isinstance(result, str):
                    common["broken"][image.content] = result
                else:
                    common["contents"].append(image.content)
                    if result.grey is not None:
                        common["grey"][image.content] = result.grey
                    for file, index, pixels in zip(files, own, result.pixels, strict=True):
                        file.write(pixels.data)
                        index["sizes"].append(pixels.shape[:2])
                        index["checksums"].append(zlib.crc32(pixels.data))
                if progress is not None:
                    progress(done, len(images))
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        for folder, index in zip(folders.values(), own, strict=True):
            (folder / _INDEX).write_text(json.dumps(common | index), encoding="utf-8")
    except BaseException:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _decoded(
    images: list[LabelledImage], kinds: Sequence[Kind], grey_range: GreyRange
) -> Iterator[tuple[LabelledImage, Decoded | str]]:
    """Decode in parallel (Pillow releases the GIL), in order, a window at a time."""

    def read(image: LabelledImage) -> Decoded | str:
        try:
            raw = image.raw() if callable(image.raw) else image.raw
            encoded = raw.read_bytes() if isinstance(raw, Path) else raw
            if isinstance(encoded, bytes) and hashlib.sha256(encoded).hexdigest() != image.content:
                raise DataError(f"image {image.path} must not change while it is used, but has.")
            return decode(encoded, kinds, grey_range)
        except (MemoryError, DataError):
            raise
        except Exception as err:  # a damaged file makes decoders raise nearly anything
            if isinstance(err, OSError) and err.errno is not None:  # the machine's, not Pillow's
                raise DataError(f"image {image.path} cannot be read: {err.strerror}.") from err
            return (str(err).splitlines() or [type(err).__name__])[0]

    cores = usable_cores()
    window = 16 * cores
    with strict_and_quiet(), ThreadPoolExecutor(cores) as pool:
        for at in range(0, len(images), window):
            part = images[at : at + window]
            yield from zip(part, pool.map(read, part), strict=True)
