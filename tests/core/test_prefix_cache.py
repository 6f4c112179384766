"""Entries of shared work: which are kept in memory and on disk, and what a file gives back."""

import errno
import itertools
import logging
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.disk_entries import DiskEntries
from core.disk_rates import Rates, measure_rates
from core.entry_file import NotStorable, Stored, Writer
from core.entry_keys import ContentKey
from core.metrics import Shared
from core.prefix_cache import PrefixCache
from core.tally import Making, Tally

FAST = Rates(write=1e9, read=1e9)
KEY = ContentKey.of("an entry", 1)
WIDE = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
POOLED = torch.arange(8, dtype=torch.float32).reshape(2, 4)
# What a file takes beside the data: its header.
HEAD = 8192


def _disk(folder: Path, budget: int = 1 << 20) -> DiskEntries:
    return DiskEntries(folder, budget, FAST)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def _used(folder: Path) -> int:
    return sum(path.stat().st_size for path in _files(folder))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


# In memory


def test_the_least_valuable_entries_make_room() -> None:
    cache = PrefixCache(100)
    assert cache.put("slow", [1], 50, built_s=10.0)
    assert cache.put("quick", [2], 50, built_s=1.0)
    assert not cache.put("quicker", [3], 50, built_s=0.5)
    assert cache.put("middling", [4], 50, built_s=5.0)
    assert cache.get("quick") is None
    found = cache.get("slow")
    assert found is not None and (found.batches, found.built_s) == ([1], 10.0)
    assert not cache.put("too large", [5], 101, built_s=1e9)
    assert (cache.size_bytes, cache.hits, cache.misses, cache.saved_s) == (100, 1, 1, 10.0)


def test_pooled_features_are_never_pushed_out_by_wide_entries() -> None:
    cache = PrefixCache(100)
    assert cache.put("pooled", [(POOLED,)], 50, built_s=0.001)
    assert cache.put("wide", [(WIDE,)], 50, built_s=5.0)
    assert not cache.put("wider", [(WIDE,)], 80, built_s=1e9)
    assert cache.put("more pooled", [(POOLED, torch.tensor([0, 1]))], 50, built_s=0.001)
    assert cache.has("pooled") and cache.has("more pooled") and not cache.has("wide")


# Measured, per 1,000 pictures at 64 px and one epoch (ResNet-18): bytes, and seconds that views
# and frozen layers took.
MEASURED = {
    "pixels": (12_300_000, 0.110),
    "depth 1": (65_500_000, 0.380),
    "depth 2": (65_500_000, 0.569),
    "depth 3": (32_800_000, 0.724),
    "depth 4": (16_400_000, 0.885),
    "depth 5": (2_050_000, 1.058),
}


def test_a_wide_early_boundary_never_takes_the_place_of_a_cheap_late_one() -> None:
    for order in itertools.permutations(MEASURED):
        cache = PrefixCache(70_000_000)
        for name in order:
            cache.put(name, [(POOLED if name == "depth 5" else WIDE,)], *MEASURED[name])
        kept = {name for name in MEASURED if cache.has(name)}
        assert kept == {"pixels", "depth 3", "depth 4", "depth 5"}, order


def test_pixels_are_the_first_to_go_for_boundaries_worth_more_a_byte() -> None:
    cache = PrefixCache(60_000_000)
    for name in ("pixels", "depth 3", "depth 4", "depth 5"):
        assert cache.put(name, [(POOLED if name == "depth 5" else WIDE,)], *MEASURED[name])
    assert not cache.has("pixels")
    assert all(cache.has(f"depth {d}") for d in (3, 4, 5))


def test_a_lasting_copy_makes_an_entry_the_first_to_leave_memory(tmp_path: Path) -> None:
    cache = PrefixCache(100, _disk(tmp_path))
    assert cache.put(KEY, [(WIDE,)], 60, built_s=10.0)  # on disk, too: quick to get back
    assert cache.put("in memory alone", [(WIDE,)], 60, built_s=1.0)
    found = cache.get(KEY)
    assert found is not None and found.is_from_disk
    assert cache.size_bytes == 60


# The file


@pytest.mark.parametrize(
    "batches",
    [
        [(WIDE, torch.tensor([1, 0])), (WIDE[:1] + 1, torch.tensor([1]))],
        [(WIDE.to(memory_format=torch.channels_last), 2, None, True, "x")],
        [(WIDE.transpose(0, 1), torch.Size([2, 3])), (WIDE, 2.5)],
        [(WIDE.to(torch.uint8),), (WIDE.to(torch.bfloat16), WIDE > 3, WIDE.double())],
        [(torch.empty_strided((2, 3, 1, 1), (3, 1, 7, 9)).fill_(1.0),)],
    ],
    ids=["ragged", "channels last", "turned", "types", "odd strides of one"],
)
def test_a_file_gives_back_values_strides_and_numbers(tmp_path: Path, batches: list[Any]) -> None:
    disk = _disk(tmp_path)
    assert disk.put(KEY, batches, 1.0, is_pooled=False) == _used(tmp_path)
    found = disk.find(KEY)
    assert found is not None and len(found) == len(batches)
    for got, put in zip(found, batches, strict=True):
        for a, b in zip(got, put, strict=True):
            assert type(a) is type(b)
            assert _same(a, b) if isinstance(b, Tensor) else a == b
            assert not isinstance(a, Tensor) or a.data_ptr() % 64 == 0


def test_inference_tensors_are_stored_like_others(tmp_path: Path) -> None:
    with torch.inference_mode():
        batch = (WIDE * 2,)
    disk = _disk(tmp_path)
    assert disk.put(KEY, [batch], 1.0, is_pooled=False)
    found = disk.find(KEY)
    assert found is not None and _same(found[0][0], WIDE * 2)


def test_writing_into_what_was_read_changes_nothing_for_others(tmp_path: Path) -> None:
    disk = _disk(tmp_path)
    disk.put(KEY, [(WIDE,)], 1.0, is_pooled=False)
    first = disk.find(KEY)
    assert first is not None
    first[0][0].zero_()
    again = _disk(tmp_path).find(KEY)
    assert again is not None and _same(again[0][0], WIDE)


@pytest.mark.parametrize(
    "batch",
    [(WIDE[:, :, ::2],), (WIDE[:1].expand(2, 3, 4, 4),), (WIDE, [1]), (torch.empty(0),)],
    ids=["with holes", "expanded", "a list", "empty"],
)
def test_what_a_file_cannot_give_back_exactly_stays_in_memory(
    tmp_path: Path, batch: tuple[Any, ...]
) -> None:
    cache = PrefixCache(1 << 20, _disk(tmp_path))
    assert cache.put(KEY, [batch], 100, built_s=1.0)
    assert _files(tmp_path) == []
    assert cache.get(KEY) is not None
    with pytest.raises(NotStorable), Writer(tmp_path / "x", lambda _: True) as writer:
        writer.append(batch)
    assert _files(tmp_path) == []


def _damages() -> dict[str, Any]:
    def flip(position: int) -> Any:
        def damage(path: Path) -> None:
            data = bytearray(path.read_bytes())
            data[position] ^= 1
            path.write_bytes(data)

        return damage

    def cut(path: Path) -> None:
        os.truncate(path, path.stat().st_size - 1)

    def foreign(path: Path) -> None:
        with Writer(path, lambda _: True) as writer:
            writer.append((WIDE + 1,))
            writer.commit("another key", 1.0, is_pooled=False)

    def strange(path: Path) -> None:
        from safetensors.torch import save_file

        save_file({"data": WIDE}, path)

    return {
        "a bit of the data": flip(HEAD + 5),
        "the last bit": flip(-1),
        "the header's length": flip(0),
        "half": lambda path: os.truncate(path, path.stat().st_size // 2),
        "a byte less": cut,
        "a byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        "empty": lambda path: path.write_bytes(b""),
        "another entry": foreign,
        "another program's": strange,
    }


@pytest.mark.parametrize("damage", _damages().values(), ids=_damages().keys())
def test_a_damaged_file_is_not_served_but_made_again(tmp_path: Path, damage: Any) -> None:
    disk = _disk(tmp_path)
    disk.put(KEY, [(WIDE,)], 1.0, is_pooled=False)
    assert disk.find(KEY) is not None  # checked once, which must not hide later damage
    time.sleep(0.01)  # file systems keep times in ticks of some milliseconds
    (path,) = _files(tmp_path)
    damage(path)
    for reader in (disk, _disk(tmp_path)):
        assert reader.find(KEY) is None
    assert _files(tmp_path) == []
    assert disk.put(KEY, [(WIDE,)], 1.0, is_pooled=False)
    found = disk.find(KEY)
    assert found is not None and _same(found[0][0], WIDE)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.integers(0, HEAD - 1), bit=st.integers(0, 7))
def test_no_bit_of_the_header_can_change_unseen(tmp_path: Path, position: int, bit: int) -> None:
    disk = _disk(tmp_path)
    disk.put(KEY, [(WIDE, 7)], 1.0, is_pooled=False)
    (path,) = _files(tmp_path)
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)
    assert _disk(tmp_path).find(KEY) is None


# The folder


def test_entries_are_found_again_by_another_cache(tmp_path: Path) -> None:
    first = PrefixCache(1 << 20, _disk(tmp_path))
    assert first.put(KEY, [(WIDE, 2)], WIDE.nbytes, built_s=3.0)
    second = PrefixCache(1 << 20, _disk(tmp_path))
    found = second.get(KEY)
    assert found is not None and found.is_from_disk and found.built_s == 3.0
    assert _same(found.batches[0][0], WIDE) and found.batches[0][1] == 2
    assert (second.hits, second.misses, second.size_bytes) == (1, 0, 0)
    assert 0 < second.saved_s < 3.0
    assert second.get(ContentKey.of("an entry", 2)) is None


def test_keys_that_do_not_name_contents_stay_in_memory(tmp_path: Path) -> None:
    cache = PrefixCache(1 << 20, _disk(tmp_path))
    assert cache.put(("a tuple",), [(WIDE,)], 100, built_s=1.0)
    assert cache.get(("a tuple",)) is not None
    assert _files(tmp_path) == []
    with pytest.raises(TypeError, match="a key must hold numbers and texts, but got a object"):
        ContentKey.of("x", object())


def test_only_what_is_worth_writing_and_reading_is_written(tmp_path: Path) -> None:
    disk = DiskEntries(tmp_path, 1 << 20, Rates(write=1e6, read=2e6))
    cache = PrefixCache(1 << 20, disk)
    cache.put(KEY, [(WIDE,)], 1_000_000, built_s=1.49)  # 1 s to write it, 0.5 s to read it
    assert _files(tmp_path) == []
    cache.put(ContentKey.of(2), [(WIDE,)], 1_000_000, built_s=1.51)
    cache.put(ContentKey.of(3), [(POOLED,)], 1_000_000, built_s=0.001)  # these always are
    assert len(_files(tmp_path)) == 2


def test_the_folder_stays_within_its_budget_and_drops_the_least_valuable(tmp_path: Path) -> None:
    size = HEAD + 384
    disk = _disk(tmp_path, 3 * size)
    keys = [ContentKey.of(n) for n in range(6)]
    for key, built_s in zip(keys, (5.0, 1.0, 3.0, 0.5, 4.0, 2.0), strict=True):
        disk.put(key, [(WIDE,)], built_s, is_pooled=False)
        assert _used(tmp_path) <= 3 * size
    assert [disk.has(key) for key in keys] == [True, False, True, False, True, False]
    assert disk.put(keys[1], [(POOLED,)], 1e-6, is_pooled=True)  # before all that is wide
    assert [disk.has(key) for key in keys] == [True, True, False, False, True, False]
    assert not _disk(tmp_path, size - 1).put(keys[5], [(WIDE,)], 9.0, is_pooled=False)


def test_entries_that_nobody_reads_any_more_give_way(tmp_path: Path) -> None:
    size = HEAD + 384
    disk = _disk(tmp_path, 2 * size)
    old, used, new = (ContentKey.of(n) for n in range(3))
    week = time.time() - 7 * 24 * 3600
    for key, batch in ((old, POOLED), (used, WIDE)):
        disk.put(key, [(batch,)], 5.0, is_pooled=batch is POOLED)
    for path in _files(tmp_path):
        os.utime(path, (week, week))
    assert disk.find(used) is not None  # which is remembered
    assert disk.put(new, [(WIDE,)], 1.0, is_pooled=False)
    assert [disk.has(key) for key in (old, used, new)] == [False, True, True]


def test_a_killed_writers_file_goes_after_a_day(tmp_path: Path) -> None:
    left, fresh = tmp_path / "partial-left", tmp_path / "partial-fresh"
    for path in (left, fresh):
        path.write_bytes(bytes(100))
    day = time.time() - 25 * 3600
    os.utime(left, (day, day))
    _disk(tmp_path).put(KEY, [(WIDE,)], 1.0, is_pooled=False)
    assert not left.exists() and fresh.exists()


@pytest.mark.parametrize("fails_at", ["mkstemp", "replace", "mkdir"])
def test_a_full_disk_ends_writing_with_one_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fails_at: str,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "entries"
    cache = PrefixCache(1 << 20, _disk(folder))
    cache.put(KEY, [(WIDE,)], 100, built_s=1.0)
    owner = {"mkstemp": "tempfile.mkstemp", "replace": "os.replace", "mkdir": "pathlib.Path.mkdir"}
    monkeypatch.setattr(owner[fails_at], full)
    with caplog.at_level(logging.WARNING):
        for n in range(3):
            assert cache.put(ContentKey.of(n), [(WIDE,)], 100, built_s=1.0)
    (record,) = caplog.records
    said = f"{folder} cannot be written (No space left on device). Make room"
    assert re.search(re.escape(said), record.getMessage())
    assert len(_files(folder)) == 1  # nothing partial is left
    assert PrefixCache(0, cache.disk).get(KEY) is not None  # reading goes on


def test_a_disk_that_fills_while_an_entry_is_written_leaves_nothing_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resource = pytest.importorskip("resource", reason="files cannot be bounded on this system")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    disk = _disk(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HEAD + 1000, before[1]))
    try:
        written = disk.put(KEY, [(torch.zeros(200, 200),)] * 5, 1.0, is_pooled=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert written == 0 and not disk.is_writable
    assert len(caplog.records) == 1 and "File too large" in caplog.text
    assert _files(tmp_path) == []


def test_many_writers_and_readers_of_one_folder_never_see_anything_half(tmp_path: Path) -> None:
    size = HEAD + 4096
    keys = [ContentKey.of(n) for n in range(5)]

    def value(n: int) -> Tensor:
        return torch.full((1, 1, 32, 32), float(n))

    def work(k: int) -> int:
        disk = _disk(tmp_path, 4 * size)
        served = 0
        for turn in range(40):
            n = (turn * (k + 1)) % len(keys)
            found = disk.find(keys[n])
            if found is None:
                disk.put(keys[n], [(value(n),)], 1.0 + turn, is_pooled=False)
            else:
                served += 1
                assert _same(found[0][0], value(n))
        assert disk.is_writable
        return served

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(4))) > 0
    assert all(path.name.endswith(".safetensors") for path in _files(tmp_path))


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    rates = measure_rates(tmp_path)
    assert rates.read > 0 and rates.write > 0
    assert _files(tmp_path) == []
    disk = DiskEntries(tmp_path / "new", 1 << 20)
    assert disk.rates() is disk.rates()


# Entries in the making


def _make(cache: PrefixCache, n: int, seconds: float = 1.0) -> Shared:
    tally = Tally(cache)
    making = Making(tally, KEY)
    for k in range(n):
        making.add((WIDE + k, k), seconds)
    making.finish()
    return tally.take()


def test_an_entry_that_memory_cannot_hold_goes_on_to_disk(tmp_path: Path) -> None:
    cache = PrefixCache(3 * WIDE.nbytes, _disk(tmp_path))
    counts = _make(cache, 8)
    assert cache.size_bytes == 0
    assert counts.cache_kept_bytes == _used(tmp_path)
    tally = Tally(cache)
    found = tally.get(KEY)
    assert found is not None and found.built_s == 8.0
    assert [number for _, number in found.batches] == list(range(8))
    assert all(_same(tensor, WIDE + k) for k, (tensor, _) in enumerate(found.batches))
    taken = tally.take()
    assert (taken.cache_hits, taken.cache_misses) == (1, 0)
    assert taken.cache_read_bytes == taken.cache_disk_bytes == _used(tmp_path)
    assert tally.take() == Shared()


def test_an_entry_without_any_room_is_forgotten(tmp_path: Path) -> None:
    for disk in (None, _disk(tmp_path, HEAD), DiskEntries(tmp_path, 1 << 20, Rates(1.0, 1.0))):
        cache = PrefixCache(3 * WIDE.nbytes, disk)
        assert _make(cache, 8).cache_kept_bytes == 0
        assert cache.size_bytes == 0 and _files(tmp_path) == []


def test_an_entry_given_up_leaves_nothing(tmp_path: Path) -> None:
    cache = PrefixCache(3 * WIDE.nbytes, _disk(tmp_path))
    making = Making(Tally(cache), KEY)
    for _ in range(8):
        making.add((WIDE,), 1.0)
    assert len(_files(tmp_path)) == 1  # in the making
    making.give_up()
    assert _files(tmp_path) == [] and cache.size_bytes == 0


def test_a_cohort_shares_seconds_and_bytes() -> None:
    whole = Shared(3.0, 4, 1, 3000, 300, 30)
    assert whole.share(3) == Shared(1.0, 4, 1, 1000, 100, 10)


def test_stored_entries_are_sequences(tmp_path: Path) -> None:
    disk = _disk(tmp_path)
    disk.put(KEY, [(WIDE, k) for k in range(5)], 1.0, is_pooled=False)
    found = disk.find(KEY)
    assert isinstance(found, Stored)
    assert [number for _, number in found[1:4]] == [1, 2, 3]
    assert found[-1][1] == 4
