import os
import time
from pathlib import Path

import pytest

from core.picture_room import prune

DAY_S = 24 * 3600
NAMES = {name: name.encode().hex().zfill(32) for name in ("today", "old", "older", "oldest")}


def _store(folder: Path, name: str, size: int, days_ago: float) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "pixels.bin").write_bytes(bytes(size))
    used = time.time() - days_ago * DAY_S
    os.utime(path, (used, used))
    return path


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        (400, {"old", "older", "oldest", "today"}),
        (350, {"old", "older", "today"}),
        (200, {"old", "today"}),
        (150, {"today"}),
        (0, {"today"}),  # it may be in use
    ],
)
def test_the_least_recently_used_are_removed(tmp_path: Path, budget: int, kept: set[str]) -> None:
    for name, days in (("older", 5), ("old", 2), ("today", 0.5), ("oldest", 9)):
        _store(tmp_path, NAMES[name], 100, days)
    freed = prune(tmp_path, budget)
    assert {path.name for path in tmp_path.iterdir()} == {NAMES[name] for name in kept}
    assert freed == 100 * (4 - len(kept))


def test_what_is_no_store_is_left_alone(tmp_path: Path) -> None:
    """A user's own images may lie in a folder of this name."""
    _store(tmp_path, "cats", 100, 9)
    (tmp_path / NAMES["oldest"]).write_bytes(b"a file")
    (tmp_path / NAMES["old"]).symlink_to(_store(tmp_path / "elsewhere", "f" * 32, 100, 9))
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0), follow_symlinks=False)
    before = sorted(tmp_path.rglob("*"))
    assert prune(tmp_path, 0) == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_removed_while_the_disk_is_free(tmp_path: Path) -> None:
    store = _store(tmp_path, NAMES["old"], 100, 400)
    assert prune(tmp_path) == 0
    assert (store / "pixels.bin").stat().st_size == 100
