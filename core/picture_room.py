"""Room for decoded pictures: stores that nobody used lately make way for new ones."""

import contextlib
import os
import re
import shutil
import time
from pathlib import Path

PARTIAL = "partial-"
"""How the names of folders begin that are no store: not yet, or not any more."""
INDEX = "index.npz"
"""The file that is in every whole store."""

# Stores may take this share of what the disk has free and what they take already. Assumption.
_SHARE = 0.5
# A store that was used since then may be somebody's: it stays, whatever it takes. Assumption.
_IN_USE_S = 24 * 3600
# A partial store this old was left by a killed process: decoding takes minutes. Assumption.
_ABANDONED_S = 24 * 3600
_NAME = re.compile("[0-9a-f]{32}")


def mark_used(store: Path) -> None:
    """Note that a store is in use now, if its folder can be written."""
    with contextlib.suppress(OSError):
        os.utime(store)


def make_room(folder: Path, size_bytes: int, budget_bytes: int | None = None) -> int:
    """Remove stores, the least recently used first, until all that stay fit the budget.

    Stores of the last day stay, so the budget may be passed where those alone are too much.
    Whatever else lies in the folder is left alone.

    Args:
        folder: Where the stores lie.
        size_bytes: What a new one takes, which is on the disk already but not among them.
        budget_bytes: Most that all may take; None for half of what is free and what they take.

    Returns:
        The bytes of those that went.
    """
    sizes = {path: _size_bytes(path) for path in folder.iterdir() if _is_store(path)}
    taken = size_bytes + sum(sizes.values())
    if budget_bytes is None:
        budget_bytes = int(_SHARE * (shutil.disk_usage(folder).free + taken))
    freed = 0
    for path in sorted(sizes, key=_used_at):
        if taken - freed <= budget_bytes:
            break
        # Looked up again: another process may have opened it by now.
        if time.time() - _used_at(path) >= _IN_USE_S and _remove(path):
            freed += sizes[path]
    return freed


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left."""
    for partial in folder.glob(f"{PARTIAL}*"):
        if time.time() - _used_at(partial) > _ABANDONED_S:
            shutil.rmtree(partial, ignore_errors=True)


def _is_store(path: Path) -> bool:
    own = _NAME.fullmatch(path.name) and not path.is_symlink()
    return bool(own) and (path / INDEX).is_file()


def _remove(store: Path) -> bool:
    """Remove a store, at once for whoever looks for it; False where the system refuses."""
    aside = store.with_name(f"{PARTIAL}{store.name}-{time.time_ns()}")
    try:
        os.replace(store, aside)
    except OSError:
        return not store.exists()  # another process was as fast
    shutil.rmtree(aside, ignore_errors=True)
    return True


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
