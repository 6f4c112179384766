"""What trials share: augmented pixels and frozen layers' outputs, in memory and on disk."""

import threading
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from core.disk_entries import DiskEntries, DiskEntry

Batch = Any
"""One batch of an entry: tensors, with what belongs to them; a tuple if it is to lie on disk."""


def is_pooled(batch: Batch) -> bool:
    """Say whether a batch holds features behind pooling, (N, F): no tensor has positions."""
    leaves = batch if isinstance(batch, tuple) else (batch,)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return bool(tensors) and all(tensor.dim() <= 2 for tensor in tensors)


class Found(NamedTuple):
    """An entry that was asked for.

    Attributes:
        batches: In the order in which a run uses them.
        built_s: Seconds that making them took, or would take from the start.
        size_bytes: Their memory.
        read_s: Seconds that getting hold of them took.
        is_from_disk: Whether they came from a file.
    """

    batches: Sequence[Batch]
    built_s: float
    size_bytes: int
    read_s: float = 0.0
    is_from_disk: bool = False


@dataclass(slots=True)
class _Entry:
    """Batches of one epoch of one view sequence, or of a validation split.

    Attributes:
        batches: In the order in which a run uses them.
        size_bytes: Their memory.
        built_s: Seconds that making them took.
        lost_s: Seconds that losing them would cost at the next use: less where they lie on disk.
        is_pooled: Whether they are features behind pooling.
        uses: How often they were read.
    """

    batches: Sequence[Batch]
    size_bytes: int
    built_s: float
    lost_s: float
    is_pooled: bool
    uses: int = 0

    @property
    def worth(self) -> tuple[bool, float]:
        """Return whether it comes before others, and the seconds that a byte saves by its uses."""
        return self.is_pooled, self.lost_s * (1 + self.uses) / max(1, self.size_bytes)


class PrefixCache:
    """Entries by key, within a budget of bytes in memory and another on disk.

    An entry is whole or not there. Where memory is full, the entries that save the fewest seconds
    a byte make room; an entry that saves fewer than all others is not taken. Pooled features come
    before everything else: they took the whole network and hardly any bytes. So augmented pixels,
    which save little, go first, unless a wide early boundary saves even less a byte.

    An entry is written to disk when it is whole, if one reading saves more than writing and
    reading cost; pooled features always are. One that memory has no room for goes there batch by
    batch. What lies on disk is read through a memory map and takes no memory of the budget.

    Values are what a run without the cache would have computed, bit by bit, since a key names
    everything that decides them, down to how pictures are put into batches. Several threads may
    use a cache.

    Args:
        budget_bytes: Most memory that entries take.
        disk: The tier below; None for memory alone.

    Attributes:
        budget_bytes: Most memory that entries take.
        disk: The tier below.
        hits: Entries read.
        misses: Entries asked for that were not there.
        saved_s: Seconds that the reads saved.
    """

    def __init__(self, budget_bytes: int, disk: DiskEntries | None = None) -> None:
        self.budget_bytes = budget_bytes
        self.disk = disk
        self.hits = 0
        self.misses = 0
        self.saved_s = 0.0
        self._entries: dict[Hashable, _Entry] = {}
        self._reserved: dict[Hashable, int] = {}
        self._lock = threading.RLock()

    @property
    def size_bytes(self) -> int:
        """Return the memory that the entries take, those in the making included."""
        with self._lock:
            kept = sum(entry.size_bytes for entry in self._entries.values())
            return kept + sum(self._reserved.values())

    def has(self, key: Hashable) -> bool:
        """Say whether an entry is there, without counting it as read or missed."""
        with self._lock:
            if key in self._entries:
                return True
        return self.disk is not None and self.disk.has(key)

    def get(self, key: Hashable) -> Found | None:
        """Return an entry, or None."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                entry.uses += 1
                found = Found(entry.batches, entry.built_s, entry.size_bytes)
                return self._counted(found)
        return self._counted(self._from_disk(key))

    def _counted(self, found: Found | None) -> Found | None:
        with self._lock:
            if found is None:
                self.misses += 1
            else:
                self.hits += 1
                self.saved_s += found.built_s - found.read_s
        return found

    def _from_disk(self, key: Hashable) -> Found | None:
        if self.disk is None:
            return None
        begin = time.perf_counter()
        stored = self.disk.find(key)
        if stored is None:
            return None
        read_s = time.perf_counter() - begin
        label = stored.label
        return Found(stored, label.built_s, label.size_bytes, read_s, is_from_disk=True)

    def reserve(
        self, key: Hashable, size_bytes: int, built_s: float, *, is_pooled: bool = False
    ) -> bool:
        """Make room in memory for an entry in the making, as large as it is so far.

        Args:
            key: Its key.
            size_bytes: Its memory so far.
            built_s: Seconds that making it took so far.
            is_pooled: Whether it holds features behind pooling.

        Returns:
            False where it is not worth its bytes; it is to leave memory then.
        """
        with self._lock:
            self._reserved.pop(key, None)
            if not self._make_room(size_bytes, (is_pooled, built_s / max(1, size_bytes))):
                return False
            self._reserved[key] = size_bytes
            return True

    def release(self, key: Hashable) -> None:
        """Give up an entry in the making."""
        with self._lock:
            self._reserved.pop(key, None)

    def spill(
        self, key: Hashable, size_bytes: int, built_s: float, *, is_pooled: bool = False
    ) -> DiskEntry | None:
        """Begin an entry on disk that memory has no room for; None where that does not pay.

        Args:
            key: Its key.
            size_bytes: Its bytes so far.
            built_s: Seconds that making it took so far.
            is_pooled: Whether it holds features behind pooling.
        """
        if self.disk is None or not (is_pooled or self.disk.pays(size_bytes, built_s)):
            return None
        return self.disk.begin(key, is_pooled=is_pooled)

    def put(
        self, key: Hashable, batches: Sequence[Batch], size_bytes: int, built_s: float
    ) -> bool:
        """Keep an entry if it is worth its bytes; say whether it was kept.

        Args:
            key: Names everything that decides the values.
            batches: One or more, not to be changed afterwards.
            size_bytes: Their memory.
            built_s: Seconds that making them took.
        """
        lost_s, is_on_disk = built_s, False
        pooled = is_pooled(batches[0])
        disk = self.disk
        if disk is not None and (pooled or disk.pays(size_bytes, built_s)):
            # Another process may have been as fast.
            is_on_disk = disk.has(key) or disk.put(key, batches, built_s, is_pooled=pooled) > 0
            if is_on_disk and not pooled:  # those are too small for the disk's rate to matter
                lost_s = min(built_s, disk.read_s(size_bytes))
        entry = _Entry(batches, size_bytes, built_s, lost_s, pooled)
        with self._lock:
            self._reserved.pop(key, None)
            if not self._make_room(size_bytes, entry.worth):
                return is_on_disk
            self._entries[key] = entry
        return True

    def _make_room(self, size_bytes: int, worth: tuple[bool, float]) -> bool:
        """Drop the entries that are worth the least, but none that is worth more."""
        free = self.budget_bytes - self.size_bytes
        leaving = []
        for key, other in sorted(self._entries.items(), key=lambda item: item[1].worth):
            if free >= size_bytes:
                break
            if other.worth >= worth:
                return False
            leaving.append(key)
            free += other.size_bytes
        if free < size_bytes:
            return False
        for key in leaving:
            del self._entries[key]
        return True
