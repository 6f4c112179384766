"""One run's dealings with the cache: what it read and left there, counted."""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from core.disk_entries import DiskEntry
from core.metrics import Shared
from core.prefix_cache import Found, PrefixCache, is_pooled


class Tally:
    """Reads and fills the cache for one run.

    Args:
        cache: What the runs share.
    """

    def __init__(self, cache: PrefixCache) -> None:
        self.cache = cache
        self._counts = Shared()

    def get(self, key: Hashable) -> Found | None:
        """Return an entry, or None."""
        found = self.cache.get(key)
        if found is None:
            self._add(cache_misses=1)
            return None
        self._add(
            cache_hits=1,
            saved_s=found.built_s - found.read_s,
            cache_read_bytes=found.size_bytes,
            cache_disk_bytes=found.size_bytes if found.is_from_disk else 0,
        )
        return found

    def put(self, key: Hashable, batches: Sequence[Any], size_bytes: int, built_s: float) -> None:
        """Leave an entry, if it is worth its bytes; as `PrefixCache.put`."""
        if self.cache.put(key, batches, size_bytes, built_s):
            self.count_kept(size_bytes)

    def count_kept(self, size_bytes: int) -> None:
        """Count an entry that was left."""
        self._add(cache_kept_bytes=size_bytes)

    def _add(self, **more: float) -> None:
        sums = {name: getattr(self._counts, name) + value for name, value in more.items()}
        self._counts = dataclasses.replace(self._counts, **sums)

    def take(self) -> Shared:
        """Return what was counted since the last call."""
        taken, self._counts = self._counts, Shared()
        return taken


class Making:
    """An entry in the making: it is kept when it is whole, or given up.

    It grows in memory; where there is no room for it, it goes on to disk.

    Args:
        tally: The run's.
        key: Names everything that decides the values.
    """

    def __init__(self, tally: Tally, key: Hashable) -> None:
        self.built_s = 0.0
        self._tally = tally
        self._key = key
        self._batches: list[tuple[Any, ...]] | None = []
        self._on_disk: DiskEntry | None = None
        self._size_bytes = 0

    def add(self, batch: tuple[Any, ...], seconds: float) -> None:
        """Add a batch, unless there is no room for it."""
        self.built_s += seconds
        size = sum(leaf.nbytes for leaf in batch if isinstance(leaf, Tensor))
        self._size_bytes += size
        if self._on_disk is not None:
            self._on_disk.append(batch, self.built_s)
        elif self._batches is not None:
            self._batches.append(batch)
            pooled = is_pooled(batch)
            room = (self._key, self._size_bytes, self.built_s)
            if not self._tally.cache.reserve(*room, is_pooled=pooled):
                self._on_disk = self._tally.cache.spill(*room, is_pooled=pooled)
                waiting, self._batches = self._batches, None
                if self._on_disk is not None:
                    for earlier in waiting:
                        self._on_disk.append(earlier, self.built_s)

    def finish(self) -> None:
        """Leave the entry in the cache."""
        if self._batches:
            self._tally.put(self._key, self._batches, self._size_bytes, self.built_s)
        elif self._on_disk is not None:
            self._tally.count_kept(self._on_disk.finish(self.built_s))
        self._batches = self._on_disk = None

    def give_up(self) -> None:
        """Forget the batches, if there are any left."""
        self._tally.cache.release(self._key)
        if self._on_disk is not None:
            self._on_disk.give_up()
        self._batches = self._on_disk = None
