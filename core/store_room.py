"""Room for decoded pictures: stores that nobody used lately make way for new ones."""

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

PARTIAL = "partial-"
"""How the names of folders begin that are no store: not yet, or not any more."""

# Stores may take this share of what the disk has free and what they take already. Assumption.
_SHARE = 0.5
# A store that was opened since then may be somebody's: it stays, whatever it takes. Assumption.
_IN_USE_S = 24 * 3600
# A partial store this old was left by a killed process: decoding takes minutes. Assumption.
_ABANDONED_S = 24 * 3600


def mark_used(store: Path) -> None:
    """Note that a store is in use now, if its folder can be written."""
    with contextlib.suppress(OSError):
        os.utime(store)


def make_room(folder: Path, size_bytes: int, budget_bytes: int | None = None) -> None:
    """Remove stores, the least recently used first, until a new one fits the budget.

    Stores of the last day stay, so the budget may be passed where those alone are too much.

    Args:
        folder: Where the stores lie.
        size_bytes: What the new store will take.
        budget_bytes: Most that all stores may take; None for half of what is free and what they
            take now.
    """
    remove_abandoned(folder)
    stores = [path for path in folder.iterdir() if not path.name.startswith(PARTIAL)]
    sizes = {path: _size_bytes(path) for path in stores}
    taken = sum(sizes.values())
    if budget_bytes is None:
        budget_bytes = int(_SHARE * (shutil.disk_usage(folder).free + taken))
    for used_at, path in sorted((_used_at(path), path) for path in stores):
        if taken + size_bytes <= budget_bytes or time.time() - used_at < _IN_USE_S:
            return
        with contextlib.suppress(OSError):  # a system that keeps open files refuses
            _remove(path)
            taken -= sizes[path]


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left."""
    for partial in folder.glob(f"{PARTIAL}*"):
        if time.time() - _used_at(partial) > _ABANDONED_S:
            shutil.rmtree(partial, ignore_errors=True)


def _remove(store: Path) -> None:
    """Remove a store at once for whoever looks for it; its map stays valid for who has it."""
    aside = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=store.parent))
    os.replace(store, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _used_at(path: Path) -> float:
    """Return when a store was last marked, seconds since 1970; now, where it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _size_bytes(store: Path) -> int:
    total = 0
    for path in store.glob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total
