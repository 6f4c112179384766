"""What trials of one process share: augmented pixels and frozen layers' outputs, in memory."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

Batch = Any
"""One batch of an entry: tensors, with what belongs to them."""


@dataclass(slots=True)
class _Entry:
    """Batches of one epoch of one view sequence, or of a validation split.

    Attributes:
        batches: In the order in which a run uses them.
        size_bytes: Their memory.
        built_s: Seconds that making them took: what each reuse saves.
        uses: How often they were read.
    """

    batches: list[Batch]
    size_bytes: int
    built_s: float
    uses: int = 0

    @property
    def value(self) -> float:
        """Return the seconds that a byte saves, by the reuse seen so far."""
        return self.built_s * (1 + self.uses) / max(1, self.size_bytes)


class PrefixCache:
    """Entries by key, within a budget of bytes.

    An entry is whole or not there. Where the budget is full, the entries that save the fewest
    seconds a byte make room; an entry that saves fewer than all others is not taken. Values are
    what a run without the cache would have computed, bit by bit, since a key names everything that
    decides them, down to how pictures are put into batches.

    Attributes:
        budget_bytes: Most memory that entries take.
        hits: Entries read.
        misses: Entries asked for that were not there.
        saved_s: Seconds that the reads saved.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.hits = 0
        self.misses = 0
        self.saved_s = 0.0
        self._entries: dict[Hashable, _Entry] = {}
        self._reserved: dict[Hashable, int] = {}

    @property
    def size_bytes(self) -> int:
        """Return the memory that the entries take, those in the making included."""
        kept = sum(entry.size_bytes for entry in self._entries.values())
        return kept + sum(self._reserved.values())

    def get(self, key: Hashable) -> tuple[list[Batch], float] | None:
        """Return an entry's batches and the seconds that making them took, or None."""
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        entry.uses += 1
        self.hits += 1
        self.saved_s += entry.built_s
        return entry.batches, entry.built_s

    def reserve(self, key: Hashable, size_bytes: int, built_s: float) -> bool:
        """Make room for an entry in the making, as large as it is so far.

        Args:
            key: Its key.
            size_bytes: Its memory so far.
            built_s: Seconds that making it took so far.

        Returns:
            False where it is not worth its bytes; it is to be given up then.
        """
        self._reserved.pop(key, None)
        if not self._make_room(size_bytes, built_s / max(1, size_bytes)):
            return False
        self._reserved[key] = size_bytes
        return True

    def release(self, key: Hashable) -> None:
        """Give up an entry in the making."""
        self._reserved.pop(key, None)

    def put(self, key: Hashable, batches: list[Batch], size_bytes: int, built_s: float) -> bool:
        """Keep an entry if it is worth its bytes; say whether it was kept.

        Args:
            key: Names everything that decides the values.
            batches: Not to be changed afterwards.
            size_bytes: Their memory.
            built_s: Seconds that making them took.
        """
        self._reserved.pop(key, None)
        entry = _Entry(batches, size_bytes, built_s)
        if not self._make_room(size_bytes, entry.value):
            return False
        self._entries[key] = entry
        return True

    def _make_room(self, size_bytes: int, value: float) -> bool:
        """Drop the entries that save the fewest seconds a byte, but none that saves more."""
        free = self.budget_bytes - self.size_bytes
        leaving = []
        for key, other in sorted(self._entries.items(), key=lambda item: item[1].value):
            if free >= size_bytes:
                break
            if other.value >= value:
                return False
            leaving.append(key)
            free += other.size_bytes
        if free < size_bytes:
            return False
        for key in leaving:
            del self._entries[key]
        return True
