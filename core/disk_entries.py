"""The cache's tier on disk: entries that later processes and other workers find again."""

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path

from core.disk_rates import Rates, measure_rates
from core.entry_file import (
    PARTIAL,
    SUFFIX,
    Batch,
    Label,
    NotStorable,
    Stored,
    Writer,
    read_label,
)
from core.entry_keys import ContentKey, surroundings

# A partial file this old was left by a killed process: an epoch takes minutes (assumption).
_ABANDONED_S = 24 * 3600
# An entry that nobody read for so long is half as likely to be read again (assumption).
_FADING_S = 3600
# Pooled features come before all else only while somebody works with them (assumption).
_FRESH_S = 24 * 3600

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _File:
    """An entry's file, as eviction sees it.

    Attributes:
        path: Where it lies.
        size_bytes: Its size.
        used_at: When it was last read or written, seconds since 1970.
        made_at: When it was written, nanoseconds.
    """

    path: Path
    size_bytes: int
    used_at: float
    made_at: int


class DiskEntries:
    """Entries in a folder, within a budget of bytes; several processes may use it at once.

    An entry appears whole or not at all, since it is renamed into its place; equal keys mean equal
    bytes, so it does not matter whose file is the last. A damaged, partial or foreign file is not
    served, but removed and made again. A disk that is full, or a folder that cannot be written,
    ends writing with one warning. Processes that write at the same time do not see each other's
    last bytes, so together they may pass the budget until the next entry is begun.

    Args:
        folder: Where entries lie; made when the first is written.
        budget_bytes: Most bytes that all files in it take.
        rates: How fast the disk is; None measures it when that is first asked.
    """

    def __init__(self, folder: Path, budget_bytes: int, rates: Rates | None = None) -> None:
        self.folder = folder
        self.budget_bytes = budget_bytes
        self.is_writable = budget_bytes > 0
        self._rates = rates
        self._labels: dict[tuple[Path, int], Label | None] = {}
        self._checked: dict[Path, tuple[int, int, int]] = {}
        self._others_bytes = 0
        self._lock = threading.RLock()

    def find(self, key: Hashable) -> Stored | None:
        """Return an entry that is there and sound, or None."""
        text = _full_text(key)
        if text is None:
            return None
        path = self._path(text)
        try:
            state = path.stat()
            identity = (state.st_ino, state.st_size, state.st_mtime_ns)
            stored = Stored(path, text, is_checked=self._checked.get(path) == identity)
            self._checked[path] = identity
            with contextlib.suppress(OSError):  # another may have dropped it by now
                os.utime(path, ns=(time.time_ns(), state.st_mtime_ns))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as err:
            _log.debug("cache entry %s is not used: %s", path, err)
            if isinstance(err, ValueError):
                with contextlib.suppress(OSError):
                    path.unlink()
            return None
        return stored

    def has(self, key: Hashable) -> bool:
        """Say whether there is a file for an entry; it is not looked into."""
        text = _full_text(key)
        return text is not None and self._path(text).is_file()

    def pays(self, size_bytes: int, built_s: float) -> bool:
        """Say whether reading an entry once is worth more than writing it took."""
        if not self.is_writable:
            return False
        rates = self.rates()
        return built_s > size_bytes / rates.read + size_bytes / rates.write

    def read_s(self, size_bytes: int) -> float:
        """Return how long reading so many bytes takes, seconds."""
        return size_bytes / self.rates().read

    def put(
        self, key: Hashable, batches: Iterable[Batch], built_s: float, *, is_pooled: bool
    ) -> int:
        """Write an entry, if there is room for it; return the bytes written.

        Args:
            key: Names everything that decides the values.
            batches: Tensors with what belongs to them.
            built_s: Seconds that making them took.
            is_pooled: Whether they are features behind pooling.
        """
        entry = self.begin(key, is_pooled=is_pooled)
        if entry is None:
            return 0
        for batch in batches:
            if not entry.append(batch, built_s):
                return 0
        return entry.finish(built_s)

    def begin(self, key: Hashable, *, is_pooled: bool) -> "DiskEntry | None":
        """Begin an entry that is written batch by batch; None where nothing can be written.

        Args:
            key: Names everything that decides the values.
            is_pooled: Whether they are features behind pooling.
        """
        text = _full_text(key)
        if text is None or not self.is_writable:
            return None
        return DiskEntry(self, text, is_pooled)

    def rates(self) -> Rates:
        """Return how fast the disk is, measured with a few megabytes when first asked."""
        with self._lock:
            if self._rates is None:
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    self._rates = measure_rates(self.folder)
                except OSError as err:
                    self.turn_off(err)
                    self._rates = Rates(write=1.0, read=1.0)
            return self._rates

    def turn_off(self, err: OSError) -> None:
        """Write nothing any more, and say so once."""
        if self.is_writable:
            self.is_writable = False
            _log.warning(
                "shared work is not kept on disk any more: %s cannot be written (%s). Make room, "
                "or name another folder with data.cache_dir.",
                self.folder,
                err.strerror or err,
            )

    def path_of(self, text: str) -> Path:
        """Return where an entry of this full key lies; the folder is made."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self._path(text)

    def _path(self, text: str) -> Path:
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}{SUFFIX}"

    def make_room(
        self, own: Collection[Path], size_bytes: int, value: float, *, is_pooled: bool
    ) -> bool:
        """Drop the entries that save the fewest seconds a byte, but none that saves more.

        Args:
            own: Files of the entry that is to lie there, which do not count.
            size_bytes: Room for it.
            value: Seconds that a byte of it saves.
            is_pooled: Whether it holds features behind pooling.
        """
        with self._lock:
            free = self.budget_bytes - size_bytes - self._others_bytes
            if free >= 0:
                return True
            if size_bytes > self.budget_bytes:
                return False
            files = self._scan(own)
            free = self.budget_bytes - size_bytes - self._others_bytes
            ranked = sorted((*self._rank(file), file.path, file) for file in files)
            leaving = []
            for pooled, other, _, file in ranked:
                if free >= 0:
                    break
                if (pooled, other) >= (is_pooled, value):
                    return False
                leaving.append(file)
                free += file.size_bytes
            if free < 0:
                return False
            for file in leaving:
                file.path.unlink(missing_ok=True)
                self._others_bytes -= file.size_bytes
            return True

    def look(self, own: Path) -> None:
        """Count again what the other files take."""
        with self._lock:
            self._scan((own,))

    def _scan(self, own: Collection[Path]) -> list[_File]:
        """List the entries' files, and count what all files but `own` take."""
        files, total = [], 0
        with os.scandir(self.folder) as found:
            for entry in found:
                with contextlib.suppress(FileNotFoundError):
                    state = entry.stat()
                    path = Path(entry.path)
                    if path in own:
                        continue
                    if entry.name.startswith(PARTIAL):
                        if time.time() - state.st_mtime > _ABANDONED_S:
                            path.unlink()
                            continue
                    elif entry.name.endswith(SUFFIX):
                        used = max(state.st_atime, state.st_mtime)
                        files.append(_File(path, state.st_size, used, state.st_mtime_ns))
                    total += state.st_size
        self._others_bytes = total
        return files

    def _rank(self, file: _File) -> tuple[bool, float]:
        """Return what an entry is worth: whether it comes before others, and seconds a byte."""
        known = (file.path, file.made_at)
        if known not in self._labels:
            try:
                self._labels[known] = read_label(file.path)
            except (OSError, ValueError):
                self._labels[known] = None
        label = self._labels[known]
        if label is None:
            return False, 0.0
        age = max(0.0, time.time() - file.used_at)
        value = label.built_s / max(1, file.size_bytes) / (1 + age / _FADING_S)
        return label.is_pooled and age < _FRESH_S, value


class DiskEntry:
    """An entry on its way to disk; it is given up at the first thing that goes wrong."""

    def __init__(self, disk: DiskEntries, text: str, is_pooled: bool) -> None:
        self._disk = disk
        self._text = text
        self._is_pooled = is_pooled
        self._built_s = 0.0
        self._writer: Writer | None = None
        self._is_over = False

    def append(self, batch: Batch, built_s: float) -> bool:
        """Add a batch; False where the entry was given up.

        Args:
            batch: Tensors with what belongs to them.
            built_s: Seconds that making the entry took so far.
        """
        if self._is_over:
            return False
        self._built_s = built_s
        try:
            if self._writer is None:
                path = self._disk.path_of(self._text)
                self._disk.look(path)
                self._writer = Writer(path, lambda size: self._claim(path, size))
            if self._writer.append(batch):
                return True
        except NotStorable as err:
            _log.debug("a cache entry stays in memory: %s", err)
        except OSError as err:
            self._disk.turn_off(err)
        self.give_up()
        return False

    def _claim(self, path: Path, size_bytes: int) -> bool:
        assert self._writer is not None, "asked by the writer"
        value = self._built_s / max(1, size_bytes)
        own = (path, self._writer.partial)
        return self._disk.make_room(own, size_bytes, value, is_pooled=self._is_pooled)

    def finish(self, built_s: float) -> int:
        """Put the entry in its place; return its bytes, 0 where it was given up."""
        writer = self._writer
        if self._is_over or writer is None:
            return 0
        try:
            writer.commit(self._text, built_s, is_pooled=self._is_pooled)
            self._is_over = True
            return writer.size_bytes
        except NotStorable as err:
            _log.debug("a cache entry stays in memory: %s", err)
        except OSError as err:
            self._disk.turn_off(err)
        self.give_up()
        return 0

    def give_up(self) -> None:
        """Remove what was written, unless the entry is in its place."""
        if self._writer is not None and not self._is_over:
            with contextlib.suppress(OSError):
                self._writer.give_up()
        self._is_over = True


def _full_text(key: Hashable) -> str | None:
    """Write a key with all else that decides bits; None where its text could mean two things."""
    return f"{key.text} {surroundings()}" if isinstance(key, ContentKey) else None
