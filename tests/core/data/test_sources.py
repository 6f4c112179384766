import os
import re
import shutil
import struct
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from core.config import DataConfig
from core.data.decode import decode
from core.data.sources import DataError, Found, check_folder, find_images
from support import make_folder


def _find(root: Path) -> Found:
    return find_images(DataConfig(source=f"folder:{root}"))


def test_digits_are_all_there() -> None:
    found = find_images(DataConfig())
    assert (len(found.images), found.classes) == (1797, tuple("0123456789"))
    assert decode(found.images[0].raw, [64]).pixels[0].shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("Training", "validation", "TEST"), ("train/train", "val", "test/test")],
)
def test_images_carry_class_split_and_name(
    tmp_path: Path, train: str, val: str, test: str
) -> None:
    splits = {"train": train, "val": val, "test": test}
    for k, folder in enumerate(splits.values()):
        make_folder(tmp_path / folder, {"b": 1, "a": 1}, seed=k)
    found = _find(tmp_path)
    assert found.classes == ("a", "b")
    assert {(i.path, i.label, i.split) for i in found.images} == {
        (f"{folder}/{label}/000.png", label, split)
        for split, folder in splits.items()
        for label in "ab"
    }
    assert len({image.content for image in found.images}) == 6
    assert not found.warnings


def test_what_is_not_read_is_counted(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "train", {"a": 2, "b": 2}).parent
    (root / "extra").mkdir()
    shutil.copy(root / "train" / "a" / "000.png", root / "train" / "loose.png")
    (root / "train" / "a" / "notes.txt").write_text("x")
    (root / "train" / "b" / "labels.csv").write_text("x")
    (root / "train" / "b" / ".DS_Store").write_text("x")
    (root / "train" / ".git").mkdir()
    for folder in (root / "train", root / "train" / "a"):
        os.mkfifo(folder / "pipe.png")
    (root / "train" / "b" / "zero.jpg").symlink_to("/dev/zero")
    found = _find(root)
    assert len(found.images) == 4
    assert found.warnings == [
        f"{root}: extra lie beside train and are not read.",
        f"{root / 'train'}: 1 images lie beside the class folders, not read.",
        "4 files are no images and are not read: 2 pipes, sockets or devices, 1 .txt, 1 .csv.",
    ]


def test_a_missing_folder_names_the_nearest_and_a_file_is_none(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "hotdogs", {"a": 1}) / "a" / "000.png"
    with pytest.raises(DataError, match="000.png is a file"):
        _find(path)
    with pytest.raises(DataError, match=r"must exist, but it does not. Did you mean .*hotdogs"):
        _find(tmp_path / "hotdog")
    with pytest.raises(DataError, match=r"hot.udcff must have a path in UTF-8"):
        _find(tmp_path / "hot\udcff")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ((), "must hold one folder per class"),
        (("val/a", "test/a"), "must have one train folder .* it has test, val"),
        (("train/a", "train/b", "test/a", "test/c"), r"test lacks b; .*train lacks c"),
        (("train/a", "train/b", "training/a", "training/b"), "must have one train folder"),
        (("fold0/a", "fold0/b", "fold1/a", "fold1/b"), r"splits, .*fold0, fold1 .*\(a, b\).* val"),
        (("train", "test"), "train must hold one folder per class, but it has no folders"),
        (("photos/a", "photos/b"), r"two classes, .* has one \(photos\).*give the folder that"),
        (("caf\u00e9", "cafe\u0301"), "must look different, but 2 look like caf\u00e9"),
    ],
)
def test_folders_that_cannot_be_read_in_one_way_are_refused(
    tmp_path: Path, folders: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        _find(make_folder(tmp_path, dict.fromkeys(folders, 1)))


@pytest.mark.parametrize(
    ("folders", "file", "message"),
    [
        (("VOC2012/JPEGImages",), "VOC2012/Annotations/1.xml", "is for detection or segmentation"),
        (("train2017", "val2017"), "annotations/val.json", "is for detection or segmentation"),
        (("images/train", "images/val"), "labels/train/1.txt", "is for detection or segmentation"),
        (("train/images", "valid/images"), "train/labels/1.txt", r"\(train/labels/1.txt\)"),
        (("images", "masks"), "README", r"segmentation \(masks/000.png\)"),
        ((".",), "labels.csv", r"labels in a table \(labels.csv\); multi-label, regression"),
        (("train_images", "test_images"), "train.csv", r"labels in a table \(train.csv\)"),
        (("images/a", "images/b", "labels"), "labels/1.txt", None),
        (("cat", "dog"), "labels.csv", None),
    ],
)
def test_data_of_other_tasks_are_refused_by_name(
    tmp_path: Path, folders: tuple[str, ...], file: str, message: str | None
) -> None:
    make_folder(tmp_path, dict.fromkeys(folders, 1))
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("")
    with pytest.raises(DataError, match=message) if message else nullcontext():
        check_folder(tmp_path)


@pytest.mark.parametrize(
    ("folders", "classes", "notes"),
    [
        (("train", "bus", "car"), "bus car train", "train is taken for a class, as bus, car"),
        (("steam_train", "test_tube"), "steam_train test_tube", ""),
        (("train/a", "train/b", "test"), "a b", "test: no class folders .* not read"),
        (("a", "b", "__MACOSX/a", "a/@eaDir", ".ipynb_checkpoints"), "a b", ""),
        (("pets/cat", "pets/dog", "car"), "car pets", "pets: images lie in inner folders only"),
    ],
)
def test_what_is_read_and_what_is_not_is_said(
    tmp_path: Path, folders: tuple[str, ...], classes: str, notes: str
) -> None:
    found = _find(make_folder(tmp_path, dict.fromkeys(folders, 1)))
    assert " ".join(found.classes) == classes
    assert not any("@eaDir" in image.path for image in found.images)
    assert re.search(notes, "\n".join(found.warnings)) if notes else not found.warnings


def test_accents_match_across_splits(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train/caf\u00e9": 1, "train/b": 1, "test/cafe\u0301": 1, "test/b": 1})
    assert _find(tmp_path).classes == ("b", "caf\u00e9")


def test_links_to_images_are_read_and_links_to_folders_inside_a_class_are_not(
    tmp_path: Path,
) -> None:
    root = make_folder(tmp_path / "data", {"a": 2, "b": 2})
    elsewhere = make_folder(tmp_path / "more", {"session": 3}, seed=1) / "session"
    (root / "c").symlink_to(elsewhere)
    (root / "a" / "one.png").symlink_to(elsewhere / "000.png")
    for name, target in (("session", elsewhere), ("up", root), ("self", root / "a")):
        (root / "a" / name).symlink_to(target)
    found = _find(root)
    assert Counter(image.label for image in found.images) == {"a": 3, "b": 2, "c": 3}
    assert "not read: 3 links to folders." in found.warnings[0]


def test_links_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    root = make_folder(tmp_path, {"a": 1, "b": 1})
    link = root / "a" / "one.png"
    for target, why in ((root / "nowhere", "No such file"), (link, "Too many levels")):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with pytest.raises(DataError, match=f"one.png must be readable, but is not: {why}"):
            _find(root)


def test_names_are_shown_without_control_characters_and_stay_apart(tmp_path: Path) -> None:
    names = ("a", "\x1b[31mred", "\u202egnp", "\udcff", "\udcfe")  # the last two are bytes
    try:
        root = make_folder(tmp_path, {**dict.fromkeys(names, 1), "c\n": 0})
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(DataError, match=r"class folder .*/c\\n must hold images, but has none"):
        _find(root)
    (root / "c\n").rmdir()
    found = _find(root)
    assert found.classes == (r"\u202egnp", r"\udcfe", r"\udcff", r"\x1b[31mred", "a")
    assert {image.path for image in found.images} == {f"{c}/000.png" for c in found.classes}
    assert all(Path(str(image.raw)).is_file() for image in found.images)


def test_an_unknown_dataset_names_the_nearest_and_an_absent_one_is_not_downloaded(
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match="torchvision:CIFAR1.*Near: CIFAR1"):
        find_images(DataConfig(source="torchvision:CIFAR1"))
    with pytest.raises(DataError, match=r"CIFAR10 must lie in .*data.download = true"):
        find_images(DataConfig(source="torchvision:CIFAR10", root=str(tmp_path)))


def test_a_torchvision_dataset_without_splits_is_read(tmp_path: Path) -> None:
    make_folder(tmp_path / "eurosat" / "2750", {"Forest": 6, "River": 6, "Highway": 6})
    found = find_images(DataConfig(source="torchvision:EuroSAT", root=str(tmp_path)))
    assert found.classes == ("Forest", "Highway", "River")
    counts = Counter((image.label, image.split) for image in found.images)
    assert counts == {(label, None): 6 for label in found.classes}


def test_a_torchvision_dataset_with_splits_is_read(tmp_path: Path) -> None:
    base = tmp_path / "dtd" / "dtd"
    make_folder(base / "images", {"dotted": 9, "banded": 9}, suffix="jpg")
    (base / "labels").mkdir()
    for k, part in enumerate(("train", "val", "test")):
        names = [f"{c}/{i:03d}.jpg" for c in ("dotted", "banded") for i in range(3 * k, 3 * k + 3)]
        (base / "labels" / f"{part}1.txt").write_text("\n".join(names))
    found = find_images(DataConfig(source="torchvision:DTD", root=str(tmp_path)))
    assert found.classes == ("banded", "dotted")
    assert Counter(i.split for i in found.images) == {"train": 6, "val": 6, "test": 6}
    assert all(Path(str(image.raw)).parent.name == image.label for image in found.images)


def test_a_torchvision_dataset_in_one_file_is_decoded(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 28, 28), dtype=np.uint8)
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for part in ("train", "t10k"):
        stem = tmp_path / "MNIST" / "raw" / part
        images = struct.pack(">4I", 2051, 4, 28, 28) + pixels.tobytes()
        Path(f"{stem}-images-idx3-ubyte").write_bytes(images)
        Path(f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">2I4B", 2049, 4, 1, 2, 0, 1))
    found = find_images(DataConfig(source="torchvision:MNIST", root=str(tmp_path)))
    assert [image.path for image in found.images][3:5] == ["MNIST/train/3", "MNIST/test/0"]
    assert [image.label[0] for image in found.images[:4]] == ["1", "2", "0", "1"]
    read = found.images[1].raw
    assert callable(read)
    assert np.array_equal(decode(read(), [28]).pixels[0][..., 0], pixels[1])
    assert found.images[1].content == found.images[5].content != found.images[0].content
