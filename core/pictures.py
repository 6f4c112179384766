"""Pictures decoded once: right RGB of bounded size in one memory-mapped file, shared by all."""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.cache import FULL_DISK, PARTIAL, prune, remove_abandoned, size_bytes
from core.decode import Raw, UInt8Array, decode_one, strict_and_quiet
from core.device import usable_cores

IntArray = NDArray[np.int64]

# Stores made by another way of decoding are not used; raise it when decode_rgb changes its pixels.
_DECODER = 1
_PIXELS = "pixels.bin"
_INDEX = "index.npz"
# Stores may take this share of what the disk has free and what they take already. Assumption.
_SHARE_OF_DISK = 0.5
# A store that was used since then may be somebody's: it stays, whatever it takes. Assumption.
_IN_USE_S = 24 * 3600.0
# Checking every picture's checksum reads the whole file; above this size a sample stands for it.
_CHECK_WHOLE_BYTES = 1 << 30
_CHECK_SAMPLE = 64
# A rename takes microseconds; processes that collide part again after a try or two (assumption).
_TRIES, _PAUSE_S = 10, 0.1
# These tell of the machine, not of the picture, and must not be kept as the picture's fault.
_MACHINE_ERRORS = (errno.EIO, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EMFILE, errno.ENFILE)


class DataError(ValueError):
    """The pictures cannot be used as they are; the message says which and what to do."""


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
        self.mark_used()

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

    def mark_used(self) -> None:
        """Keep the store from making room for others for another day."""
        with contextlib.suppress(OSError):
            os.utime(self.folder)

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
# A store, the position in it of each content, and why the other contents are unreadable.
Opened = tuple[PictureStore, dict[str, int], dict[str, str]]


def build_store(
    items: Sequence[Item], bound: int, cache: Path, progress: Progress | None = None
) -> Opened:
    """Open the store of these pictures, decoding them first where that was not done yet.

    The store is keyed by contents and bound, so folders may move and files be renamed; it appears
    whole or not at all, and a damaged one is made again. Stores that were not used for a day go
    where all together take more than half of what they take and what is free
    (`core.cache.prune`).

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
        remove_abandoned(folder.parent)
        try:
            _make(folder, unique, bound, progress)
        except OSError as err:
            if err.errno not in FULL_DISK:
                raise
            prune(_stores(folder.parent), 0, unused_s=_IN_USE_S)
            _make(folder, unique, bound, progress)
    except OSError as err:
        raise _cache_error(err, folder.parent, len(unique), bound) from err
    found = _opened_soon(folder, contents)
    assert found is not None, "a store just built must open"
    return found


def _make(folder: Path, unique: Mapping[str, Item], bound: int, progress: Progress | None) -> None:
    """Decode pictures by content into a new store, and put it in its place."""
    contents = sorted(unique)
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder.parent))
    try:
        _decode_all([unique[content] for content in contents], bound, partial, progress)
        stores, size = _stores(folder.parent), size_bytes(partial)
        free = shutil.disk_usage(partial).free + size + sum(map(size_bytes, stores))
        prune(stores, int(_SHARE_OF_DISK * free) - size, unused_s=_IN_USE_S)
        _publish(partial, folder, contents)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _stores(folder: Path) -> list[Path]:
    """List the whole stores of a folder; whatever else lies there is left alone."""
    named = (path for path in folder.iterdir() if re.fullmatch("[0-9a-f]{32}", path.name))
    return [path for path in named if not path.is_symlink() and (path / _INDEX).is_file()]


def estimate_store_bytes(n: int, bound: int) -> int:
    """Estimate the disk that n pictures take: 3 bytes a pixel, a third longer than wide."""
    return 4 * n * bound * bound


def _publish(partial: Path, folder: Path, contents: list[str]) -> None:
    """Put a store in its place, unless another process was as fast and its store is sound.

    Processes that mend one store at the same time may push each other's away: hence the tries.
    """
    for attempt in range(_TRIES):
        try:
            os.replace(partial, folder)
            return
        except OSError as err:
            if err.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES, errno.EPERM):
                raise
        if _opened(folder, contents) is not None:
            return
        aside = partial.with_name(f"{partial.name}-{attempt}")
        with contextlib.suppress(OSError):  # somebody else may have moved it just now
            os.replace(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)
    os.replace(partial, folder)


def _opened_soon(folder: Path, contents: list[str]) -> Opened | None:
    """Open a store that another process may be putting in place of a damaged one."""
    for _ in range(_TRIES):
        found = _opened(folder, contents)
        if found is not None:
            return found
        time.sleep(_PAUSE_S)
    return None


def _opened(folder: Path, contents: list[str]) -> Opened | None:
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
    need = estimate_store_bytes(n, bound) / 1e6
    why = "the disk is full" if err.errno in FULL_DISK else str(err)
    return DataError(
        f"decoded pictures cannot be kept in {folder}: {why}. About {need:,.1f} MB are needed; "
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
            return decode_one(item.read(), bound)
        except MemoryError:
            raise
        except Exception as err:  # a damaged file makes decoders raise nearly anything
            if isinstance(err, OSError) and err.errno in _MACHINE_ERRORS:
                raise DataError(f"picture {item.path} cannot be read: {err.strerror}.") from err
            return (str(err).splitlines() or [type(err).__name__])[0]

    cores = usable_cores()
    window = 16 * cores
    with strict_and_quiet(), ThreadPoolExecutor(cores) as pool:
        for at in range(0, len(items), window):
            part = items[at : at + window]
            yield from zip(part, pool.map(decode, part), strict=True)
