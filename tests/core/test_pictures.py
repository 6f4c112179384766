import errno
import os
import pickle
import resource
import subprocess
import sys
import textwrap
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core import pictures
from core.decode import decode_rgb
from core.pictures import DataError, Item, PictureStore, build_store, estimate_store_bytes
from support import make_folder


def _items(root: Path) -> list[Item]:
    paths = sorted(root.rglob("*.*"))
    return [Item(f"{k:064d}", path.name, lambda p=path: p) for k, path in enumerate(paths)]


def test_store_holds_what_decoding_gives(tmp_path: Path) -> None:
    items = _items(make_folder(tmp_path / "photos", {"a": 5, "b": 4}))
    told: list[tuple[int, int]] = []
    store, at, broken = build_store(
        items, 30, tmp_path / "cache", lambda done, total: told.append((done, total))
    )
    assert (len(store), broken, told[-1]) == (9, {}, (9, 9))
    for item in items:
        expected = decode_rgb(item.read(), 30)
        assert np.array_equal(store.picture(at[item.content]), expected)
    again, _, _ = build_store(items, 30, tmp_path / "cache", lambda *_: pytest.fail("decoded"))
    assert np.array_equal(again.picture(3), store.picture(3))
    copy: PictureStore = pickle.loads(pickle.dumps(store))
    assert np.array_equal(copy.picture(8), store.picture(8))


@pytest.mark.parametrize("harm", ["truncated", "flipped", "no index", "bad index"])
def test_damaged_store_is_made_again(tmp_path: Path, harm: str) -> None:
    items = _items(make_folder(tmp_path / "photos", {"a": 3}))
    store, _, _ = build_store(items, 30, tmp_path / "cache")
    expected = [store.picture(i).copy() for i in range(3)]
    pixels, index = store.folder / "pixels.bin", store.folder / "index.npz"
    content = bytearray(pixels.read_bytes())
    content[100] ^= 255
    if harm == "truncated":
        pixels.write_bytes(pixels.read_bytes()[:-10])
    elif harm == "flipped":
        pixels.write_bytes(bytes(content))
    elif harm == "no index":
        index.unlink()
    else:
        index.write_bytes(b"PK\x03\x04 damaged")
    del store
    mended, _, _ = build_store(items, 30, tmp_path / "cache")
    assert all(np.array_equal(mended.picture(i), expected[i]) for i in range(3))


def test_unreadable_pictures_are_told_with_their_reason(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", {"a": 3}, suffix="jpg")
    whole = (root / "a" / "000.jpg").read_bytes()
    (root / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "a" / "text.png").write_text("no picture")
    items = _items(root)
    store, at, broken = build_store(items, 30, tmp_path / "cache")
    names = {item.content: item.path for item in items}
    assert {names[content] for content in broken} == {"cut.jpg", "text.png"}
    assert len(store) == len(at) == 3
    _, _, again = build_store(items, 30, tmp_path / "cache")
    assert again == broken


def test_full_disk_is_told_and_leaves_nothing_behind(tmp_path: Path) -> None:
    make_folder(tmp_path / "photos", {"a": 20}, side=100)
    script = textwrap.dedent(
        f"""
        import resource, signal
        from pathlib import Path
        from core.pictures import DataError, Item, build_store
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        root = Path({str(tmp_path)!r})
        paths = sorted((root / "photos").rglob("*.png"))
        items = [Item(str(k), p.name, lambda p=p: p) for k, p in enumerate(paths)]
        try:
            build_store(items, 100, root / "cache")
        except DataError as err:
            print(err)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ
    )
    assert "the disk is full" in done.stdout
    assert "data.cache_dir" in done.stdout
    assert list((tmp_path / "cache" / "pictures").iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 50_000


def test_where_the_disk_is_full_old_pictures_make_room_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, _, _ = build_store(
        _items(make_folder(tmp_path / "old", {"a": 2})), 20, tmp_path / "cache"
    )
    items = _items(make_folder(tmp_path / "new", {"a": 3}))
    decode = pictures._decode_all

    def decode_where_there_is_room(*given: Any) -> None:
        if old.folder.exists():
            raise OSError(errno.ENOSPC, "no space left")
        decode(*given)

    monkeypatch.setattr(pictures, "_decode_all", decode_where_there_is_room)
    with pytest.raises(DataError, match="the disk is full"):
        build_store(items, 30, tmp_path / "cache")  # the old ones were used today
    os.utime(old.folder, (0, 0))
    store, _, _ = build_store(items, 30, tmp_path / "cache")
    assert (len(store), old.folder.exists()) == (3, False)
    assert list(store.folder.parent.iterdir()) == [store.folder]


def test_warnings_and_bombs_do_not_stop_decoding_in_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "photos", {"a": 40})
    Image.new("RGB", (200, 200)).save(root / "a" / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 40 - 1)  # all warn, one is refused
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        store, _, broken = build_store(_items(root), 30, tmp_path / "cache")
        assert warnings.filters == before
    assert len(store) == 40
    assert "exceeds limit" in next(iter(broken.values()))


def test_a_fault_of_the_machine_is_not_kept_as_the_pictures(tmp_path: Path) -> None:
    def fails() -> Path:
        raise OSError(errno.EIO, "Input/output error")

    items = [*_items(make_folder(tmp_path / "photos", {"a": 2})), Item("f" * 64, "c.png", fails)]
    with pytest.raises(DataError, match=r"picture c.png cannot be read: Input/output error"):
        build_store(items, 30, tmp_path / "cache")
    assert list((tmp_path / "cache" / "pictures").iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    items = _items(make_folder(tmp_path / "photos", {"a": 2}))
    stores = tmp_path / "cache" / "pictures"
    old, young = stores / "partial-old", stores / "partial-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "pixels.bin").write_bytes(b"half")
    os.utime(old, (0, 0))
    store, _, _ = build_store(items, 30, tmp_path / "cache")
    assert set(stores.iterdir()) == {store.folder, young}


def _build(root: Path) -> int:
    store, _, _ = build_store(_items(root / "photos"), 30, root / "cache")
    return int(sum(store.picture(i).sum() for i in range(len(store))))


@pytest.mark.slow
def test_processes_may_build_one_store_at_once(tmp_path: Path) -> None:
    make_folder(tmp_path / "photos", {"a": 30})
    with ProcessPoolExecutor(2, get_context("forkserver")) as pool:
        sums = list(pool.map(_build, [tmp_path] * 2))
        (folder,) = (tmp_path / "cache" / "pictures").iterdir()
        (folder / "index.npz").unlink()
        sums += pool.map(_build, [tmp_path] * 2)
    assert len(set(sums)) == 1
    assert len(list((tmp_path / "cache" / "pictures").iterdir())) == 1


def test_estimated_size_is_near_what_a_store_takes(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(4):
        Image.new("RGB", (400, 300), (i, 0, 0)).save(root / f"{i}.png")
    store, _, _ = build_store(_items(root), 90, tmp_path / "cache")
    assert store.size_bytes == pytest.approx(estimate_store_bytes(4, 90), rel=0.01)
