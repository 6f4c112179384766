import os
import shutil
import time
from pathlib import Path

import pytest

from core.picture_room import make_room, mark_used
from core.pictures import Item, build_store
from support import make_folder

DAY_S = 24 * 3600


NAMES = {name: name.encode().hex().zfill(32) for name in ("today", "old", "older", "oldest")}


def _store(folder: Path, name: str, size: int, days_ago: float) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "pixels.bin").write_bytes(bytes(size))
    (path / "index.npz").touch()
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
        _store(tmp_path, NAMES[name], 100, days)
    freed = make_room(tmp_path, 100, budget)
    assert {path.name for path in tmp_path.iterdir()} == {NAMES[name] for name in kept}
    assert freed == 100 * (4 - len(kept))


def test_what_is_no_store_is_left_alone(tmp_path: Path) -> None:
    """A user's own pictures may lie in a folder of this name."""
    _store(tmp_path, "cats", 100, 9)
    (tmp_path / NAMES["older"]).mkdir()  # without an index
    (tmp_path / NAMES["oldest"]).write_bytes(b"a file")
    (tmp_path / NAMES["old"]).symlink_to(_store(tmp_path / "elsewhere", "f" * 32, 100, 9))
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0), follow_symlinks=False)
    before = sorted(tmp_path.rglob("*"))
    assert make_room(tmp_path, 100, 0) == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_a_store_that_was_opened_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, days in (("oldest", 9), ("older", 5)):
        _store(tmp_path, NAMES[name], 100, days)
    remove = shutil.rmtree

    def slowly(path: Path, **how: bool) -> None:
        mark_used(tmp_path / NAMES["older"])  # by another process
        remove(path, **how)

    monkeypatch.setattr("core.picture_room.shutil.rmtree", slowly)
    make_room(tmp_path, 100, 0)
    assert [path.name for path in tmp_path.iterdir()] == [NAMES["older"]]


def test_while_the_disk_has_room_nothing_is_removed(tmp_path: Path) -> None:
    store = _store(tmp_path, NAMES["old"], 100, 400)
    assert make_room(tmp_path, 100) == 0
    assert (store / "pixels.bin").stat().st_size == 100
    make_room(tmp_path, 1 << 62)  # more than any disk
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_opened_counts_as_used(tmp_path: Path) -> None:
    paths = sorted(make_folder(tmp_path / "photos", {"a": 2}).rglob("*.*"))
    items = [Item(f"{k:064d}", path.name, lambda p=path: p) for k, path in enumerate(paths)]
    store, _, _ = build_store(items, 30, tmp_path / "cache")
    os.utime(store.folder, (0, 0))
    store.mark_used()  # as every trial does
    assert make_room(store.folder.parent, 100, 0) == 0
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
