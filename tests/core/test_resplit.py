import hashlib
from pathlib import Path

import pytest

from core.config import DataConfig
from core.data import ImageData, Split, load_data
from core.pictures import DataError
from support import make_folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("whole") / "photos", {"a": 20, "b": 20})


def _load(root: Path, **settings: object) -> ImageData:
    config = DataConfig(source=f"folder:{root}", cache_dir=str(root.parent / "cache"), **settings)
    return load_data(config, 40)


def _paths(split: Split | None) -> list[str]:
    assert split is not None
    return list(split.paths)


def _all_paths(data: ImageData) -> list[list[str]]:
    return [_paths(split) for split in (data.train, data.val, data.test)]


def test_without_val_seed_both_splits_follow_split_seed(photos: Path) -> None:
    for seed in (0, 5):
        plain = _load(photos, split_seed=seed)
        same = _load(photos, split_seed=seed, val_seed=seed)
        assert _all_paths(plain) == _all_paths(same)
        assert plain.fingerprint == same.fingerprint


def _before(root: Path, seed: int) -> dict[str, set[str]]:
    """Split as was done before data.val_seed: one lot a picture, first to test, then to val."""
    parts: dict[str, set[str]] = {"test": set(), "val": set(), "train": set()}
    for folder in sorted(root.iterdir()):
        lots = {}
        for path in folder.iterdir():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            lot = hashlib.sha256(f"{seed} {content}".encode()).digest()
            lots[lot] = path.relative_to(root).as_posix()
        line = [lots[lot] for lot in sorted(lots)]
        fifth = round(0.2 * len(line))
        parts["test"].update(line[:fifth])
        parts["val"].update(line[fifth : 2 * fifth])
        parts["train"].update(line[2 * fifth :])
    return parts


@pytest.mark.parametrize("seed", [0, 5])
def test_without_val_seed_the_splits_are_those_from_before_it_was_a_key(
    photos: Path, seed: int
) -> None:
    data = _load(photos, split_seed=seed)
    parts = {"test": data.test, "val": data.val, "train": data.train}
    assert {name: set(_paths(part)) for name, part in parts.items()} == _before(photos, seed)


def test_val_seed_moves_validation_and_never_the_test_split(photos: Path) -> None:
    plain = _load(photos)
    drawn = [_load(photos, val_seed=seed) for seed in range(1, 6)]
    for data in drawn:
        assert _paths(data.test) == _paths(plain.test)
        assert (len(data.train), len(data.val)) == (len(plain.train), len(plain.val))
        assert sorted(_paths(data.train) + _paths(data.val)) == sorted(
            _paths(plain.train) + _paths(plain.val)
        )
        assert sorted(data.val.labels) == sorted(plain.val.labels)
    splits = {tuple(_paths(data.val)) for data in (plain, *drawn)}
    assert len(splits) == 6
    assert len({data.fingerprint for data in (plain, *drawn)}) == 6


def test_an_equal_val_seed_draws_an_equal_split(photos: Path) -> None:
    assert _all_paths(_load(photos, val_seed=3)) == _all_paths(_load(photos, val_seed=3))


def test_a_given_test_folder_stays_while_validation_moves(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    make_folder(root / "train", {"a": 15, "b": 15})
    make_folder(root / "test", {"a": 4, "b": 4}, seed=1)
    plain, other = _load(root), _load(root, val_seed=1)
    assert all(path.startswith("test/") for path in _paths(plain.test))
    assert _paths(plain.test) == _paths(other.test)
    assert set(_paths(plain.val)) != set(_paths(other.val))
    assert sorted(_paths(plain.train) + _paths(plain.val)) == sorted(
        _paths(other.train) + _paths(other.val)
    )


def test_val_seed_is_refused_where_validation_is_given(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    make_folder(root / "train", {"a": 6, "b": 6})
    make_folder(root / "val", {"a": 3, "b": 3}, seed=1)
    assert len(_load(root).val) == 6
    with pytest.raises(DataError) as told:
        _load(root, val_seed=0)
    assert str(told.value) == (
        "data.val_seed must be left out where the source has a validation split of its own, but "
        "got val_seed=0. Remove the key, or merge val/ into train/."
    )


def test_val_seed_is_a_whole_number_from_0() -> None:
    with pytest.raises(ValueError, match=r"val_seed must be >= 0, but got val_seed=-1\."):
        DataConfig(val_seed=-1)
