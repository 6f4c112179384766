"""Which decoded images are removed where they take too much of the disk."""

import contextlib
import os
import re
import shutil
import time
import uuid
from pathlib import Path

# Stores may take this share of what the disk has free and what they take already. Assumption.
_SHARE = 0.5
# A store that was used since then may be in use: it stays, whatever it takes. Assumption.
_IN_USE_S = 24 * 3600
_NAME = re.compile("[0-9a-f]{32}")


def prune(folder: Path, budget_bytes: int | None = None) -> int:
    """Remove stores, the least recently used first, until the rest fits the budget.

    Stores of the last day stay, so the budget may be exceeded where those alone are too much.
    Whatever else lies in the folder is left alone.

    Args:
        folder: Where the stores lie.
        budget_bytes: Most that all may take; None for half of what is free and what they take.

    Returns:
        The bytes that were freed.
    """
    stores = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and not p.is_symlink()]
    sizes = {path: _size_bytes(path) for path in stores if path.is_dir()}
    taken = sum(sizes.values())
    if budget_bytes is None:
        budget_bytes = int(_SHARE * (shutil.disk_usage(folder).free + taken))
    freed = 0
    for path in sorted(sizes, key=_used_at):
        if taken - freed <= budget_bytes:
            break
        # Looked up again: another process may have opened it by now.
        if time.time() - _used_at(path) >= _IN_USE_S:
            # Renamed first, so that nobody opens or builds a store that is half removed.
            aside = path.with_name(uuid.uuid4().hex)
            with contextlib.suppress(OSError):
                os.replace(path, aside)
                shutil.rmtree(aside, ignore_errors=True)
                freed += sizes[path]
    return freed


def _used_at(path: Path) -> float:
    """Return when a store was last used, seconds since 1970; now, where it is gone."""
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
