import errno
import hashlib
import os
import pickle
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.cache import prune
from core.config import Preprocessing
from core.data import decode as decode_module
from core.data.decode import View, decode, eval_view
from core.data.image_store import EvalViews, ImageStore, Progress, build_stores
from core.data.sources import DataError, LabelledImage
from support import make_folder


def _images(root: Path) -> list[LabelledImage]:
    paths = sorted(root.rglob("*.*"), key=_content)
    return [LabelledImage(_content(p), p.name, p, "a") for p in paths]


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _store(
    images: list[LabelledImage], bound: int, cache: Path, progress: Progress = None
) -> ImageStore:
    return build_stores(images, [bound], cache, progress)[0]


def _stores(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache" / "images").iterdir() if path.is_dir()]


def test_store_holds_what_decoding_gives(tmp_path: Path) -> None:
    images = _images(make_folder(tmp_path / "photos", {"a": 5, "b": 4}))
    shown: list[tuple[int, int]] = []
    store = _store(images, 30, tmp_path / "cache", lambda *done: shown.append(done))
    assert (len(store), store.broken, shown[-1]) == (9, {}, (9, 9))
    assert store.contents == [image.content for image in images]
    again = _store(images, 30, tmp_path / "cache", lambda *_: pytest.fail("decoded"))
    copy: ImageStore = pickle.loads(pickle.dumps(store))
    for i, image in enumerate(images):
        expected = decode(image.raw, [30]).pixels[0]
        assert all(np.array_equal(s.image(i), expected) for s in (store, again, copy))


@pytest.mark.parametrize("harm", ["truncated", "flipped", "no index", "bad index", "other index"])
def test_damaged_store_is_built_again(tmp_path: Path, harm: str) -> None:
    images = _images(make_folder(tmp_path / "photos", {"a": 3}))
    store = _store(images, 30, tmp_path / "cache")
    expected = [store.image(i).copy() for i in range(3)]
    pixels, index = store.folder / "pixels.bin", store.folder / "index.json"
    whole = pixels.read_bytes()
    pixels.write_bytes({"truncated": whole[:-10], "flipped": b"\xff" + whole[1:]}.get(harm, whole))
    if harm == "no index":
        index.unlink()
    elif harm == "bad index":
        index.write_bytes(b"{damaged")
    elif harm == "other index":
        index.write_text(index.read_text().replace(images[2].content, "f" * 64))
    del store
    repaired = _store(images, 30, tmp_path / "cache")
    assert repaired.contents == [image.content for image in images]
    assert all(np.array_equal(repaired.image(i), expected[i]) for i in range(3))


def test_unreadable_images_are_kept_as_broken(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", {"a": 1})
    (root / "a" / "text.png").write_text("no image")
    images = _images(root)
    [bad] = [image for image in images if image.path == "text.png"]
    for some, n_readable in ((images, 1), ([bad], 0)):
        for _ in ("decoded", "opened again"):
            store = _store(some, 30, tmp_path / "cache")
            assert len(store) == len(store.contents) == n_readable
            assert store.broken.keys() == {bad.content}


def test_a_full_disk_is_reported_leaves_nothing_behind_and_prunes_old_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    old = _store(_images(make_folder(tmp_path / "old", {"a": 2})), 20, tmp_path / "cache")
    os.utime(old.folder, (0, 0))
    images = _images(make_folder(tmp_path / "photos", {"a": 20}))
    monkeypatch.setattr(os, "fsync", is_full)
    with pytest.raises(DataError, match=r"disk is full\. About 0\.8 MB are .* data\.cache_dir"):
        _store(images, 100, tmp_path / "cache")
    assert _stores(tmp_path) == []


def test_views_are_made_with_the_images_or_when_they_are_needed(
    tmp_path: Path, shown: Preprocessing
) -> None:
    images, cache = _images(make_folder(tmp_path / "photos", {"a": 5})), tmp_path / "cache"
    larger = replace(shown, image_size=26)
    main, _ = build_stores(images, [30, View.of(shown)], cache)
    made: list[int] = []
    views = EvalViews(images, main, cache, None)
    for how in (shown, larger):
        expected = np.stack([eval_view(image.raw, how) for image in images])
        store = views.store(how, lambda done, _: made.append(done))
        assert np.array_equal(store.views(np.arange(5)), expected)
    assert made == [1, 2, 3, 4, 5]


def test_views_of_other_images_than_those_decoded_are_refused(
    tmp_path: Path, shown: Preprocessing, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, cache = _images(make_folder(tmp_path / "photos", {"a": 5})), tmp_path / "cache"
    second = images[1].raw.read_bytes()

    def broken(raw: bytes, *rest: object) -> object:  # as one read over a network may be
        if raw == second:
            raise SyntaxError("broken PNG file")
        return decode(raw, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("core.data.image_store.decode", broken)
        main = _store(images, 30, cache)
    assert len(main) == 4
    with pytest.raises(DataError, match="must be readable each time"):
        EvalViews(images, main, cache, None).store(shown)


def test_warnings_and_bombs_do_not_stop_decoding_in_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "photos", {"a": 40})
    Image.new("RGB", (200, 200)).save(root / "a" / "bomb.png")
    monkeypatch.setattr(decode_module, "_MAX_PIXELS", 40 * 40 - 1)  # all warn, one is refused
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        store = _store(_images(root), 30, tmp_path / "cache")
        assert warnings.filters == before
    assert len(store) == 40
    assert "exceeds limit" in next(iter(store.broken.values()))


@pytest.mark.parametrize(
    ("is_gone", "message"),
    [(False, "000.png must not change while it is used"), (True, "000.png cannot be read: No")],
)
def test_an_image_that_is_lost_while_it_is_used_is_refused_and_not_kept_as_broken(
    tmp_path: Path, is_gone: bool, message: str
) -> None:
    root = make_folder(tmp_path / "photos", {"a": 3})
    images = _images(root)
    (root / "a" / "000.png").write_bytes(b"another")
    if is_gone:
        (root / "a" / "000.png").unlink()
    with pytest.raises(DataError, match=message):
        _store(images, 30, tmp_path / "cache")
    assert _stores(tmp_path) == []


def _build(root: Path) -> tuple[int, int]:
    decoded: list[int] = []
    images = _images(root / "photos")
    store = _store(images, 30, root / "cache", lambda done, _: decoded.append(done))
    return int(sum(store.image(i).sum() for i in range(len(store)))), len(decoded)


@pytest.mark.slow
def test_of_two_processes_one_builds_and_one_waits(tmp_path: Path) -> None:
    make_folder(tmp_path / "photos", {"a": 30})
    with ProcessPoolExecutor(2, get_context("forkserver")) as pool:
        for _ in range(2):
            sums, decoded = zip(*pool.map(_build, [tmp_path] * 2), strict=True)
            assert len(set(sums)) == 1
            assert sorted(decoded) == [0, 30]
            (folder,) = _stores(tmp_path)
            (folder / "index.json").unlink()


def test_a_store_that_a_trial_uses_is_not_pruned(tmp_path: Path) -> None:
    images = _images(make_folder(tmp_path / "photos", {"a": 2}))
    store = _store(images, 30, tmp_path / "cache")
    for use in (store.mark_used, lambda: _store(images, 30, tmp_path / "cache"), None):
        os.utime(store.folder, (0, 0))
        if use is not None:
            use()
        prune([store.folder], 0, unused_s=24 * 3600)
        assert store.folder.is_dir() == (use is not None)
    assert store.image(1).shape[2] == 3  # its map outlives its folder
