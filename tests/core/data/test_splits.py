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
from support import make_folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("whole") / "photos", {"a": 20, "b": 10})


def _load(root: Path, most: int | None = None, **settings: object) -> ImageData:
    config = DataConfig(source=f"folder:{root}", cache_dir=str(root.parent / "cache"), **settings)
    return load_data(config, 40, most=most)


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
    whole, some = _load(photos), _load(photos, most=12)
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
    assert [len(paths) for paths in _paths(_load(root))] == [16, 4, 8]
    make_folder(root / "valid", {"a": 3, "b": 3}, seed=2)
    shutil.copy(root / "train" / "a" / "000.png", root / "test" / "a" / "copy.png")
    data = _load(root)
    assert [len(paths) for paths in _paths(data)] == [20, 6, 9]
    assert all(path.startswith("valid/") for path in data.val.paths)
    (warning,) = data.warnings
    assert warning.startswith("1 images lie in more than one split")
    assert "(leakage): train/a/000.png = test/a/copy.png" in warning


def test_names_order_and_place_of_files_change_nothing(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "elsewhere"
    for path in photos.rglob("*.png"):
        copy = root / path.parent.name / f"x{99 - int(path.stem):02d}.png"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    one, two = _load(photos), _load(root)
    assert one.fingerprint == two.fingerprint != _load(root, split_seed=1).fingerprint
    assert [split.contents for split in _splits(one)] == [s.contents for s in _splits(two)]
    Image.new("RGB", (40, 40), "red").save(root / "a" / "new.png")
    assert one.fingerprint != _load(root).fingerprint


@pytest.mark.parametrize("is_given", [False, True])
def test_each_image_of_development_is_validated_on_once_and_none_of_the_test_split(
    photos: Path, tmp_path: Path, is_given: bool
) -> None:
    if is_given:  # a given val/ is divided again with train/
        for k, part in enumerate(("train", "val", "test")):
            make_folder(tmp_path / "photos" / part, {"a": 10 + k, "b": 6 + k}, seed=k)
    data = _load(tmp_path / "photos" if is_given else photos)
    whole = data.development
    assert whole.paths == data.train.paths + data.val.paths
    parts = [data.with_fold(5, 3, fold) for fold in range(5)]
    for part in parts:
        assert sorted(part.train.paths + part.val.paths) == sorted(whole.paths)
        assert part.test is data.test
        counts = np.array([np.bincount(each.val.labels) for each in parts])
        assert (np.ptp(counts, axis=0) <= 1).all()
    assert sorted(path for part in parts for path in part.val.paths) == sorted(whole.paths)
    other = data.with_fold(5, 4, 0)
    assert other.val.paths != parts[0].val.paths
    assert len({part.fingerprint for part in (data, *parts, other)}) == 7


def test_shares_of_the_training_images_are_nested_and_the_same_of_each_class(photos: Path) -> None:
    data = _load(photos, test_fraction=0.1, val_fraction=0.1)
    assert data.with_share(1.0) is data
    whole, half, tenth = (data.with_share(share) for share in (1.0, 0.5, 0.01))
    assert set(tenth.train.paths) < set(half.train.paths) < set(whole.train.paths)
    counts = [np.bincount(part.train.labels).tolist() for part in (whole, half, tenth)]
    assert counts == [[16, 8], [8, 4], [2, 2]]
    assert half.val is data.val and half.test is data.test
    # In the images' order, so that the whole and its shares are read alike.
    assert [p for p in whole.train.paths if p in half.train.paths] == list(half.train.paths)


def test_images_kept_for_ablations_are_in_no_split_of_a_search_and_judge_an_ablation(
    photos: Path,
) -> None:
    plain, search = _load(photos), _load(photos, ablation_fraction=0.2)
    ablation = _load(photos, ablation_fraction=0.2, judged_by="ablation")
    apart = set(ablation.val.paths)
    assert len(apart) == 6 and search.test is not None and ablation.test is not None
    assert search.test.paths == ablation.test.paths == plain.test.paths
    assert set(ablation.train.paths) == set(search.development.paths)
    assert not apart & {*search.development.paths, *search.test.paths}
    assert apart | set(search.development.paths) == set(plain.development.paths)
    assert ablation.train.contents == sorted(ablation.train.contents)
    some = _load(photos, most=12, ablation_fraction=0.2)  # a first look sees none of them either
    assert not apart & set(some.development.paths)


def test_limit_takes_the_same_share_of_every_class(photos: Path) -> None:
    data = _load(photos, limit=9)
    assert Counter(data.train.labels.tolist()) == {0: 6, 1: 3}
    assert len(data.val) == 6
    assert data.warnings == ("few training images: a (6), b (3).",)


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
    for path in (root / "train" / "a").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="none of a, b"):
        _load(root, skip_unreadable=True)


def test_fractions_that_leave_nothing_to_train_on_are_refused(photos: Path) -> None:
    rule = r"data.test_fraction \+ data.ablation_fraction \+ data.val_fraction must be < 1"
    with pytest.raises(DataError, match=rf"{rule}, but got 0.4 \+ 0.2 \+ 0.4"):
        _load(photos, val_fraction=0.4, test_fraction=0.4, ablation_fraction=0.2)


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
