import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.config import DataConfig
from core.data import ImageData, Split, load_data
from core.pictures import DataError
from support import make_folder, shared_data


def _load(root: Path, **settings: object) -> ImageData:
    config = DataConfig(source=f"folder:{root}", cache_dir=str(root.parent / "cache"), **settings)
    return load_data(config, 40)


def _contents(split: Split | None) -> list[tuple[int, bytes]]:
    assert split is not None
    pictures = [split.store.picture(int(i)).tobytes() for i in split.indices]
    return list(zip(split.labels.tolist(), pictures, strict=True))


def test_one_folder_is_split_three_ways_by_class(tmp_path: Path) -> None:
    data = _load(make_folder(tmp_path / "photos", {"ants": 20, "bees": 10}))
    assert data.classes == ("ants", "bees")
    assert data.test is not None
    counts = [Counter(split.labels.tolist()) for split in (data.train, data.val, data.test)]
    assert counts == [{0: 12, 1: 6}, {0: 4, 1: 2}, {0: 4, 1: 2}]
    everything = [c for s in (data.train, data.val, data.test) for c in _contents(s)]
    assert len(set(everything)) == 30
    named = [data.classes[k] for k in data.val.labels]
    assert [path.partition("/")[0] for path in data.val.paths] == named


def test_given_splits_are_kept_and_a_missing_val_is_made(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    make_folder(root / "train", {"a": 10, "b": 10})
    make_folder(root / "test", {"a": 4, "b": 4}, seed=1)
    data = _load(root)
    assert data.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (16, 4, 8)
    make_folder(root / "valid", {"a": 3, "b": 3}, seed=2)
    data = _load(root)
    assert data.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (20, 6, 8)
    assert all(path.startswith("valid/") for path in data.val.paths)


def test_names_order_and_place_of_files_change_nothing(tmp_path: Path) -> None:
    first = make_folder(tmp_path / "one" / "photos", {"a": 12, "b": 12})
    second = tmp_path / "two" / "elsewhere"
    for path in first.rglob("*.png"):
        copy = second / path.parent.name / f"x{99 - int(path.stem):02d}.png"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    one, two = _load(first), _load(second)
    assert one.fingerprint == two.fingerprint
    for name in ("train", "val", "test"):
        assert _contents(getattr(one, name)) == _contents(getattr(two, name))


def test_another_seed_splits_otherwise(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", {"a": 20, "b": 20})
    one, two = _load(root), _load(root, split_seed=1)
    assert one.fingerprint != two.fingerprint
    assert set(_contents(one.val)) != set(_contents(two.val))


def test_another_picture_changes_the_fingerprint(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", {"a": 6, "b": 6})
    before = _load(root).fingerprint
    Image.new("RGB", (40, 40), "red").save(root / "a" / "new.png")
    assert _load(root).fingerprint != before


def test_limit_takes_the_same_share_of_every_class(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", {"a": 40, "b": 20})
    data = _load(root, limit=18)
    assert Counter(data.train.labels.tolist()) == {0: 12, 1: 6}
    assert len(data.val) == 12


def test_digits_are_all_there() -> None:
    pytest.importorskip("sklearn", reason="the embedded digits come with scikit-learn")
    data = load_data(DataConfig(), 64)
    assert data.test is not None
    assert len(data.train) + len(data.val) + len(data.test) == 1797
    assert data.classes == tuple("0123456789")
    assert data.train.store.picture(0).shape == (64, 64, 3)


def test_real_photos_load() -> None:
    data = load_data(DataConfig(source=str(shared_data("hotdog"))), 128)
    assert data.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (320, 80, 200)
    assert data.warnings == ()
    assert data.train.store.sizes.min() <= 128


def test_copies_in_other_splits_are_told(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    make_folder(root / "train", {"a": 6, "b": 6})
    make_folder(root / "test", {"a": 3, "b": 3}, seed=1)
    shutil.copy(root / "train" / "a" / "000.png", root / "test" / "a" / "copy.png")
    (told,) = [w for w in _load(root).warnings if "leakage" in w]
    assert "1 pictures lie in more than one split" in told
    assert "train/a/000.png" in told


def test_copies_in_one_folder_stay_in_one_split(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", {"a": 10, "b": 10})
    for i in range(10):
        shutil.copy(root / "a" / f"{i:03d}.png", root / "a" / f"copy{i}.png")
    data = _load(root)
    assert any("10 pictures are copies" in w for w in data.warnings)
    assert len(data.train) == 12


def test_a_picture_in_two_classes_is_told(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", {"a": 10, "b": 10})
    shutil.copy(root / "a" / "000.png", root / "b" / "same.png")
    assert any("1 pictures lie in more than one class" in w for w in _load(root).warnings)


def test_other_files_are_counted_and_hidden_ones_ignored(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", {"a": 6, "b": 6})
    (root / "a" / "notes.txt").write_text("x")
    (root / "b" / "labels.csv").write_text("x")
    (root / "b" / ".DS_Store").write_text("x")
    (root / ".git").mkdir()
    assert _load(root).warnings[0] == ("2 files are no pictures and are not read: 1 .txt, 1 .csv.")


def _broken(tmp_path: Path) -> Path:
    root = make_folder(tmp_path / "photos", {"a": 12, "b": 12})
    for i in range(12):
        (root / "a" / f"bad{i:02d}.jpg").write_bytes(b"no picture" + bytes([i]))
    return root


def test_unreadable_pictures_are_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"12 of 36 pictures cannot be decoded: a/bad.* 2 more"):
        _load(_broken(tmp_path))


def test_unreadable_pictures_are_left_out_on_request(tmp_path: Path) -> None:
    data = _load(_broken(tmp_path), skip_unreadable=True)
    assert len(data.train) + len(data.val) + len(data.test or ()) == 24
    assert any("12 pictures cannot be decoded and are left out" in w for w in data.warnings)


def test_missing_folder_names_the_nearest(tmp_path: Path) -> None:
    make_folder(tmp_path / "hotdogs", {"a": 1})
    with pytest.raises(DataError, match=r"must exist, but it does not. Did you mean .*hotdogs"):
        _load(tmp_path / "hotdog")


def test_a_class_folder_that_cannot_be_read_is_not_called_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "photos", {"red": 3, "blue": 3})
    locked = tmp_path / "photos" / "blue"
    readable = os.access  # root may read everything, so the mode alone would prove nothing
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked and readable(path, mode))
    with pytest.raises(DataError, match=r"blue must be readable, but permission is denied"):
        load_data(DataConfig(source=f"folder:{tmp_path / 'photos'}"), 40)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({}, "must hold one folder per class"),
        ({"a": 5}, r"must have at least two classes, but .* has one \(a\)"),
        ({"a": 5, "b": 0}, "class folder .*b must hold pictures, but has none"),
        ({"a": 5, "b": 2}, "class b must have at least 3 different pictures"),
    ],
)
def test_folders_that_cannot_be_used_are_told(
    tmp_path: Path, classes: dict[str, int], message: str
) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    with pytest.raises(DataError, match=message):
        _load(make_folder(root, classes))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "photos"
    path.write_text("x")
    with pytest.raises(DataError, match="is a file"):
        _load(path)


def test_splits_with_other_classes_are_told(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    make_folder(root / "train", {"a": 6, "b": 6})
    make_folder(root / "test", {"a": 3, "c": 3}, seed=1)
    with pytest.raises(DataError, match=r"test lacks b; .*train lacks c"):
        _load(root)


def test_small_classes_are_told(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", {"a": 40, "b": 6})
    assert any(w == "few training pictures: b (4)." for w in _load(root).warnings)


def test_unknown_data_set_names_the_nearest() -> None:
    with pytest.raises(DataError, match="torchvision:CIFAR1.*Near: CIFAR1"):
        load_data(DataConfig(source="torchvision:CIFAR1"), 32)


def test_data_set_that_is_not_there_is_not_downloaded(tmp_path: Path) -> None:
    config = DataConfig(source="torchvision:CIFAR10", root=str(tmp_path))
    with pytest.raises(DataError, match=r"CIFAR10 must lie in .*data.download = true"):
        load_data(config, 32)


def test_a_torchvision_data_set_that_is_there_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "eurosat" / "2750"
    for name in ("Forest", "River", "Highway"):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.jpg")
    config = DataConfig(
        source="torchvision:EuroSAT", root=str(tmp_path), cache_dir=str(tmp_path / "cache")
    )
    data = load_data(config, 64)
    assert data.classes == ("Forest", "Highway", "River")
    assert len(data.train) + len(data.val) + len(data.test or ()) == 18


def test_a_data_set_that_lists_its_files_gives_the_same_labels(tmp_path: Path) -> None:
    base = tmp_path / "dtd" / "dtd"
    make_folder(base / "images", {"dotted": 9, "banded": 9}, suffix="jpg")
    (base / "labels").mkdir()
    for k, part in enumerate(("train", "val", "test")):
        names = [f"{c}/{i:03d}.jpg" for c in ("dotted", "banded") for i in range(3 * k, 3 * k + 3)]
        (base / "labels" / f"{part}1.txt").write_text("\n".join(names))
    config = DataConfig(
        source="torchvision:DTD", root=str(tmp_path), cache_dir=str(tmp_path / "cache")
    )
    data = load_data(config, 40)
    assert data.classes == ("banded", "dotted")
    assert (len(data.train), len(data.val), len(data.test or ())) == (6, 6, 6)
    for index, label in zip(data.train.indices, data.train.labels, strict=True):
        # make_folder brightens channel 0 of its first class (dotted), 1 of its second (banded).
        assert data.train.store.picture(int(index)).mean((0, 1))[:2].argmin() == label


def test_a_picture_in_two_classes_is_never_in_two_splits(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", {"a": 12, "b": 40})
    for i in range(6):
        shutil.copy(root / "a" / f"{i:03d}.png", root / "b" / f"same{i}.png")
    for seed in range(5):
        data = _load(root, split_seed=seed)
        assert data.test is not None
        parts = [{pixels for _, pixels in _contents(s)} for s in (data.train, data.val, data.test)]
        assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]


def test_shares_that_leave_nothing_to_train_on_are_told(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", {"a": 10, "b": 10})
    with pytest.raises(DataError, match=r"val_fraction .* must be < 1, but got 0.5 \+ 0.5"):
        _load(root, val_fraction=0.5, test_fraction=0.5)


def test_val_and_test_without_train_are_told(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for part in ("val", "test"):
        make_folder(root / part, {"a": 3, "b": 3})
    with pytest.raises(DataError, match="must have a train folder beside test, val"):
        _load(root)


def test_pictures_beside_the_class_folders_are_told(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", {"a": 6, "b": 6})
    shutil.copy(root / "a" / "000.png", root / "loose.png")
    assert "1 pictures lie beside the class folders, not read" in _load(root).warnings[0]


def test_a_class_without_a_readable_training_picture_is_told(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for k, part in enumerate(("train", "val")):
        make_folder(root / part, {"a": 4, "b": 4}, seed=k)
    for path in (root / "train" / "b").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match="must have pictures to train on .* none of b"):
        _load(root, skip_unreadable=True)


def test_names_that_are_no_utf8_are_shown_all_the_same(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", {"a": 6, "b": 6})
    try:
        os.rename(root / "a" / "000.png", os.fsencode(root / "a") + b"/\xff.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    data = _load(root)
    paths = [p for s in (data.train, data.val, data.test) if s is not None for p in s.paths]
    assert [p.encode() for p in paths if "\ufffd" in p] == ["a/\ufffd.png".encode()]
