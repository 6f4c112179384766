import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from core.cache import ArrayCache, prune

DAY_S = 24 * 3600.0


def chunks(rows: int, value: float = 1.0) -> Iterator[Tensor]:
    for at in range(0, rows, 4):
        yield torch.full((min(4, rows - at), 10), value + at)


def get(cache: ArrayCache, key: str, rows: int = 6) -> Tensor:
    found = cache.get(key, rows, lambda: chunks(rows))
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_an_array_comes_back_to_the_bit_for_any_process(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    rows = torch.randn(7, 3, 2).mul(100).to(dtype)
    made = ArrayCache(tmp_path, 1 << 20).get("a", 7, lambda: iter(rows.split(4)))
    later = ArrayCache(tmp_path, 1 << 20)
    read = later.get("a", 7, lambda: pytest.fail("it was there"))
    assert made is not None and read is not None and made.dtype == read.dtype == dtype
    assert torch.equal(made, rows) and torch.equal(read, rows)
    assert read.data_ptr() % 64 == 0
    assert (later.hits, later.misses) == (1, 0)


def test_seconds_that_making_took_are_counted_as_saved(tmp_path: Path) -> None:
    def slow() -> Iterator[Tensor]:
        time.sleep(0.05)
        yield from chunks(6)

    cache = ArrayCache(tmp_path, 1 << 20)
    cache.get("a", 6, slow)
    assert cache.saved_s == 0
    get(cache, "a")
    assert cache.saved_s >= 0.05


def test_writing_into_an_array_changes_no_file(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path, 1 << 20)
    get(cache, "a").zero_()
    assert get(cache, "a").min() == 1


@pytest.mark.parametrize("damage", ["cut", "longer", "rows", "garbage"])
def test_a_file_of_wrong_size_or_shape_is_made_again(tmp_path: Path, damage: str) -> None:
    cache = ArrayCache(tmp_path, 1 << 20)
    expected = get(cache, "a").clone()
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage == "rows":
        np.save(path, np.zeros((5, 10), np.float32))
    else:
        path.write_bytes({"cut": whole[:-1], "longer": whole + b"0", "garbage": b"0"}[damage])
    assert torch.equal(get(cache, "a"), expected)
    assert (cache.hits, cache.misses) == (0, 2)
    assert [p.stat().st_size for p in tmp_path.iterdir()] == [len(whole)]


def test_what_does_not_fit_is_temporary_and_evicts_nothing_of_this_hour(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path, 1000)
    get(cache, "a", 12)
    b = get(cache, "b", 12)
    assert len(list(tmp_path.iterdir())) == 1
    assert b[-1, 0] == 9  # readable, though its file is gone
    get(cache, "a", 12)
    assert (cache.hits, cache.misses) == (1, 2)


def test_the_least_recently_used_of_old_arrays_makes_room(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path, 1500)
    for age, key in enumerate(("new", "old")):
        get(cache, key, 12)
        newest = max(tmp_path.iterdir(), key=lambda p: p.stat().st_mtime)
        os.utime(newest, (0, time.time() - (1 + age) * 2 * 3600))
    get(cache, "c", 12)
    for key in ("c", "new", "old"):
        get(cache, key, 12)
    assert (cache.hits, cache.misses) == (2, 4)


def test_an_array_that_is_left_half_made_leaves_nothing(tmp_path: Path) -> None:
    def broken(fault: BaseException) -> Iterator[Tensor]:
        yield from chunks(4)
        raise fault

    cache = ArrayCache(tmp_path, 1 << 20)
    full = OSError(errno.ENOSPC, "no space left on device")
    assert cache.get("a", 6, lambda: broken(full)) is None
    with pytest.raises(KeyboardInterrupt):
        cache.get("a", 6, lambda: broken(KeyboardInterrupt()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("budget", "kept"),
    [(400, {"today", "old", "older", "oldest"}), (250, {"old", "today"}), (0, {"today"})],
)
def test_prune_removes_files_and_folders_that_nobody_used_lately(
    tmp_path: Path, budget: int, kept: set[str]
) -> None:
    for name, days in (("older", 5), ("old", 2), ("today", 0.5), ("oldest", 9)):
        path = tmp_path / name
        if name == "oldest":
            path.write_bytes(bytes(100))
        else:
            path.mkdir()
            (path / "pixels").write_bytes(bytes(100))
        os.utime(path, (0, time.time() - days * DAY_S))
    left = prune(list(tmp_path.iterdir()), budget, unused_s=DAY_S)
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert left == 100 * len(kept)


def test_only_old_partial_files_are_removed(tmp_path: Path) -> None:
    for name, days in (("frostline-partial-a", 2), ("frostline-partial-b", 0.5), ("partial-c", 2)):
        (tmp_path / name).write_bytes(b"0")
        os.utime(tmp_path / name, (0, time.time() - days * DAY_S))
    ArrayCache(tmp_path, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"frostline-partial-b", "partial-c"}
