import os
import time
from pathlib import Path

import pytest

from core.pictures import Item, build_store
from core.store_room import make_room
from support import make_folder

DAY_S = 24 * 3600


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
        (1000, {"old", "older", "oldest", "today"}),
        (450, {"old", "older", "today"}),
        (300, {"old", "today"}),
        (150, {"today"}),
        (0, {"today"}),  # somebody may be reading it
    ],
)
def test_the_least_recently_used_make_room(tmp_path: Path, budget: int, kept: set[str]) -> None:
    for name, days in (("older", 5), ("old", 2), ("today", 0.5), ("oldest", 9)):
        _store(tmp_path, name, 100, days)
    make_room(tmp_path, 100, budget)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_while_the_disk_has_room_nothing_is_removed(tmp_path: Path) -> None:
    _store(tmp_path, "old", 100, 400)
    make_room(tmp_path, 100)
    assert (tmp_path / "old" / "pixels.bin").stat().st_size == 100
    make_room(tmp_path, 1 << 62)  # more than any disk
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_opened_counts_as_used(tmp_path: Path) -> None:
    paths = sorted(make_folder(tmp_path / "photos", {"a": 2}).rglob("*.*"))
    items = [Item(f"{k:064d}", path.name, lambda p=path: p) for k, path in enumerate(paths)]
    store, _, _ = build_store(items, 30, tmp_path / "cache")
    os.utime(store.folder, (0, 0))
    again, _, _ = build_store(items, 30, tmp_path / "cache")
    make_room(store.folder.parent, 100, 0)
    assert again.folder.is_dir()
    os.utime(store.folder, (0, 0))
    make_room(store.folder.parent, 100, 0)
    assert not store.folder.exists()
    assert again.picture(1).shape[2] == 3  # its map outlives its folder
    made_anew, _, _ = build_store(items, 30, tmp_path / "cache")
    assert made_anew.is_sound()
