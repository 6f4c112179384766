import hashlib
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.config import DataConfig, Preprocessing
from core.data.sources import DataError
from core.data.splits import ImageData, Split, load_data
from core.data.views import eval_views
from support import make_folder, shared_data


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("whole") / "photos", {"a": 20, "b": 10})


def _load(root: Path, **settings: object) -> ImageData:
    config = DataConfig(source=f"folder:{root}", cache_dir=str(root.parent / "cache"), **settings)
    return load_data(config, 40)


def _splits(data: ImageData) -> list[Split]:
    assert data.test is not None
    return [data.train, data.val, data.test]


def _paths(data: ImageData) -> list[list[str]]:
    return [list(split.paths) for split in _splits(data)]


def _sha256(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()


def _split_by_hand(root: Path, seed: int) -> list[set[str]]:
    """Rank each class by a hash of seed and contents: a fifth to test, a fifth to val."""
    train, val, test = set[str](), set[str](), set[str]()
    for folder in root.iterdir():
        found = {_sha256(path.read_bytes()): path for path in folder.iterdir()}
        order = sorted(found, key=lambda content: _sha256(f"{seed} {content}".encode()))
        line = [found[content].relative_to(root).as_posix() for content in order]
        fifth = round(0.2 * len(line))
        test.update(line[:fifth])
        val.update(line[fifth : 2 * fifth])
        train.update(line[2 * fifth :])
    return [train, val, test]


def test_a_sample_holds_the_same_share_of_classes_and_no_image_of_the_test_split(
    photos: Path,
) -> None:
    whole = _load(photos)
    config = DataConfig(source=f"folder:{photos}", cache_dir=str(photos.parent / "cache"))
    some = load_data(config, 40, most=12)
    assert some.test is None and 9 < len(some.train) + len(some.val) <= 13
    for part, own in ((some.train, whole.train), (some.val, whole.val)):
        assert set(part.paths) < set(own.paths)
        assert 0 < (part.labels == 0).sum() < len(part)


@pytest.mark.parametrize("seed", [0, 5])
def test_one_folder_is_split_three_ways_by_class_and_contents(photos: Path, seed: int) -> None:
    data = _load(photos, split_seed=seed)
    assert [set(paths) for paths in _paths(data)] == _split_by_hand(photos, seed)
    for split in _splits(data):
        assert [data.classes[k] for k in split.labels] == [path[0] for path in split.paths]
        named = [_sha256((photos / path).read_bytes()) for path in split.paths]
        assert split.contents == named == sorted(named)


def test_given_splits_are_kept_and_searched_for_copies_and_a_val_is_made(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    make_folder(root / "train", {"a": 10, "b": 10})
    make_folder(root / "test", {"a": 4, "b": 4}, seed=1)
    plain, other = _load(root), _load(root, val_seed=1)
    assert [len(paths) for paths in _paths(plain)] == [16, 4, 8]
    assert _paths(plain)[2] == _paths(other)[2]
    assert _paths(plain)[1] != _paths(other)[1]
    make_folder(root / "valid", {"a": 3, "b": 3}, seed=2)
    shutil.copy(root / "train" / "a" / "000.png", root / "test" / "a" / "copy.png")
    data = _load(root)
    assert [len(paths) for paths in _paths(data)] == [20, 6, 9]
    assert all(path.startswith("valid/") for path in data.val.paths)
    (warning,) = data.warnings
    assert warning.startswith("1 images lie in more than one split")
    assert "(leakage): train/a/000.png = test/a/copy.png" in warning
    with pytest.raises(DataError, match=r"data\.val_seed must be left out .* got val_seed=0\. R"):
        _load(root, val_seed=0)


def test_names_order_and_place_of_files_change_nothing(photos: Path, tmp_path: Path) -> None:
    for path in photos.rglob("*.png"):
        copy = tmp_path / "elsewhere" / path.parent.name / f"x{99 - int(path.stem):02d}.png"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    one, two = _load(photos), _load(tmp_path / "elsewhere")
    assert one.fingerprint == two.fingerprint
    assert [split.contents for split in _splits(one)] == [s.contents for s in _splits(two)]


def test_fingerprint_follows_images_and_seed(photos: Path, tmp_path: Path) -> None:
    root = shutil.copytree(photos, tmp_path / "photos")
    prints = [_load(root).fingerprint, _load(root, split_seed=1).fingerprint]
    Image.new("RGB", (40, 40), "red").save(root / "a" / "new.png")
    assert len({*prints, _load(root).fingerprint}) == 3


def test_val_seed_moves_validation_and_never_the_test_split(photos: Path) -> None:
    plain = _load(photos)
    drawn = [_load(photos, val_seed=seed) for seed in range(6)]
    assert _paths(drawn[0]) == _paths(plain)
    assert drawn[0].fingerprint == plain.fingerprint
    for data in drawn:
        assert _paths(data)[2] == _paths(plain)[2]
        assert sorted(data.val.labels) == sorted(plain.val.labels)
        assert sorted(sum(_paths(data), [])) == sorted(sum(_paths(plain), []))
    assert len({data.val.paths for data in drawn}) == 6
    assert len({data.fingerprint for data in drawn}) == 6


def test_limit_takes_the_same_share_of_every_class(photos: Path) -> None:
    data = _load(photos, limit=9)
    assert Counter(data.train.labels.tolist()) == {0: 6, 1: 3}
    assert len(data.val) == 6
    assert data.warnings == ("few training images: a (6), b (3).",)


def test_real_photos_load() -> None:
    data = load_data(DataConfig(source=str(shared_data("hotdog"))), 128)
    assert [len(split) for split in _splits(data)] == [320, 80, 200]
    assert data.warnings == ()
    assert data.train.store.sizes.min() <= 128


def test_duplicates_in_one_folder_are_used_once(photos: Path, tmp_path: Path) -> None:
    root = shutil.copytree(photos, tmp_path / "photos")
    for i in range(10):
        shutil.copy(root / "a" / f"{i:03d}.png", root / "a" / f"copy{i}.png")
    data = _load(root)
    assert any("10 images are copies" in w for w in data.warnings)
    assert data.fingerprint == _load(photos).fingerprint


def test_an_image_in_two_classes_is_warned_of_and_in_one_split(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", {"a": 12, "b": 40})
    for i in range(6):
        shutil.copy(root / "a" / f"{i:03d}.png", root / "b" / f"same{i}.png")
    data = _load(root)
    assert data.warnings == ("6 images lie in more than one class; check their labels.",)
    train, val, test = (set(split.contents) for split in _splits(data))
    assert not train & val | train & test | val & test


def test_unreadable_images_are_listed_and_left_out_on_request(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", {"a": 12, "b": 12})
    for i in range(12):
        (root / "a" / f"bad{i:02d}.jpg").write_bytes(b"no image" + bytes([i]))
    with pytest.raises(DataError, match=r"12 of 36 images cannot be decoded: a/bad.* 2 more"):
        _load(root)
    data = _load(root, skip_unreadable=True)
    assert sum(map(len, _splits(data))) == 24
    assert any("12 images cannot be decoded and are left out" in w for w in data.warnings)


def test_a_class_without_a_readable_training_image_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for k, part in enumerate(("train", "val")):
        make_folder(root / part, {"a": 4, "b": 4}, seed=k)
    for path in (root / "train" / "b").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="must have images to train on .* none of b"):
        _load(root, skip_unreadable=True)


def test_fractions_that_leave_nothing_to_train_on_are_refused(photos: Path) -> None:
    with pytest.raises(DataError, match=r"val_fraction .* must be < 1, but got 0.5 \+ 0.5"):
        _load(photos, val_fraction=0.5, test_fraction=0.5)


def _save_grey(path: Path, value: int) -> None:
    """Write a flat image of 16 bits, with another value in one corner."""
    image = Image.new("I;16", (40, 40), value)
    image.putpixel((0, 0), 9)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def test_images_of_more_than_8_bits_share_the_range_of_the_training_images(
    tmp_path: Path, shown: Preprocessing
) -> None:
    for name, low in (("dark", 100), ("bright", 3000)):
        for value in range(low, low + 800, 40):
            _save_grey(tmp_path / "scans" / name / f"{value}.png", value)
    data = _load(tmp_path / "scans")
    values = [int(Path(path).stem) for path in data.train.paths]
    low, high = data.views.grey_range or (0, 0)
    assert (low, high) == (9, max(values))
    for split in _splits(data):
        value = np.array([int(Path(path).stem) for path in split.paths])
        expected = np.clip(np.round((value - low) / (high - low) * 255), 0, 255)
        views = eval_views(data, split, np.arange(len(split)), shown)
        assert np.array_equal(views[:, 0, 12, 12], expected)
        found = [split.store.image(int(i))[20, 20, 0] for i in split.indices]
        assert np.array_equal(found, expected)
    few = sum(value - low < 20 / 256 * (high - low) for value in values)
    assert few > 0
    assert data.warnings[0].startswith(f"{few} images of more than 8 bits keep fewer than 20 grey")


def test_images_of_more_than_8_bits_that_are_not_trained_on_are_scaled_and_named(
    tmp_path: Path, shown: Preprocessing
) -> None:
    for k, part in enumerate(("train", "val")):
        make_folder(tmp_path / "photos" / part, {"a": 10, "b": 10}, seed=k)
    assert _load(tmp_path / "photos").views.grey_range is None
    _save_grey(tmp_path / "photos" / "val" / "a" / "scan.png", 1000)
    data = _load(tmp_path / "photos")
    assert data.views.grey_range == (9, 1000)
    assert data.warnings[0].startswith("1 images have more than 8 bits and no training image has")
    at = data.val.paths.index("val/a/scan.png")
    views = eval_views(data, data.val, np.array([at]), shown)
    assert views[0, :, 12, 12].tolist() == [255, 255, 255]
