"""Where images come from: folders, torchvision's datasets, and the embedded digits."""

import difflib
import hashlib
import inspect
import os
import re
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from core.config import DataConfig
from core.data.decode import Raw
from core.device import usable_cores

_DIGIT_SIDE = 64
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "eval", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# Folders that archivers and file servers add.
_JUNK = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
# Control characters, which terminals obey, those that reorder a line, and bytes that are no UTF-8.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
    + (".ppm", ".pgm", ".pbm", ".pnm", ".avif")
)

# Folders of these names hold images of all classes; train2017 and train_images count, too.
_PARTS = frozenset((*_SPLITS, "images", "image", "imgs", "img", "jpegimages"))
_TABLES = (".csv", ".tsv", ".json", ".jsonl")
_ANNOTATIONS = {"annotations": (".xml", ".json"), "labels": (".txt",), "masks": _EXTENSIONS}


class DataError(ValueError):
    """The images cannot be used as they are; the message says which and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(_shown(message))


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One image before it is decoded.

    Attributes:
        content: SHA-256 of its contents, hexadecimal.
        path: What messages and reports call it.
        raw: Its file, the image itself, or what reads it out of a larger file.
        label: Class name.
        split: `train`, `val`, `test`, or None where the source has no splits.
    """

    content: str
    path: str
    raw: Raw | Callable[[], Raw]
    label: str
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What a source holds: images, class names in the order of the outputs, and warnings."""

    images: list[LabelledImage]
    classes: tuple[str, ...]
    warnings: list[str] = field(default_factory=list)


def _shown(text: str) -> str:
    """Write out what a terminal would obey and a file cannot hold, such as ESC."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def find_images(config: DataConfig) -> Found:
    """List a source's images.

    Raises:
        DataError: The source is unknown, missing, empty, or its folders do not agree.
    """
    kind, _, name = config.source.partition(":")
    if config.source == "digits":
        return _find_digits()
    if kind == "torchvision":
        return _find_in_torchvision(name, Path(config.root), config.download)
    return _find_in_folder(Path(name).expanduser())


def check_folder(root: Path) -> None:
    """Raise `DataError` where a data folder is missing, for another task, or has no folders."""
    if any("\ud800" <= c <= "\udfff" for c in str(root)):  # databases take UTF-8 only
        raise DataError(f"data folder {root} must have a path in UTF-8, but has not. Rename it.")
    if not root.exists():
        siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        close = difflib.get_close_matches(root.name, siblings, n=1)
        near = f" Did you mean {root.parent / close[0]}?" if close else ""
        raise DataError(f"data folder {root} must exist, but it does not.{near}")
    if not root.is_dir():
        raise DataError(f"data must be a folder of class folders, but {root} is a file.")
    _check_task(root)
    if not _subfolders(root):
        raise DataError(
            f"data folder {root} must hold one folder per class (or train, val, test with them "
            "inside), but it has no folders."
        )


def _check_task(root: Path) -> None:
    """Refuse data sets of other tasks, some of whose folders could be taken for classes."""
    rule = "data must be images sorted into one folder per class, but"
    parts = _parts_of(root)
    inner = [path for part in parts for path in _subfolders(part)]
    for path in inner:
        name, images = path.name.lower(), path.with_name("images")
        is_sorted = images not in inner or not set(_subfolders(images)) <= set(parts)
        if name not in _ANNOTATIONS or (name != "annotations" and is_sorted):
            continue
        files = (p for p in path.rglob("*") if p.suffix.lower() in _ANNOTATIONS[name])
        if found := next(files, None):
            raise DataError(
                f"{rule} {root} is for detection or segmentation ({found.relative_to(root)}), "
                "which are not supported. Sort the images, or what is cut out of them, into one "
                "folder per class and give the folder that holds these."
            )
    entries = [entry for part in parts for entry in _entries(part)]
    tables = [entry.name for entry in entries if Path(entry.name).suffix.lower() in _TABLES]
    if tables and set(inner) <= set(parts) and any(map(_is_image, entries)):
        raise DataError(
            f"{rule} {root} has its labels in a table ({tables[0]}); multi-label, regression and "
            "classification by table are not supported. Sort the images into one folder per class."
        )


def _parts_of(folder: Path) -> list[Path]:
    """Return a folder and, of those inside, such as train/images hold images of all classes."""
    inner = _subfolders(folder)
    parts = [folder]
    for path in inner:
        words = re.findall("[a-z]+", path.name.lower())
        if len(inner) == 1 or (words and _PARTS.issuperset(words)):
            parts += _parts_of(path)
    return parts


def _find_in_folder(root: Path) -> Found:
    """List the images of a folder of classes, or of splits with classes inside."""
    check_folder(root)
    notes: list[str] = []
    splits = _find_splits(root, notes)
    _check_same_classes(splits)
    for folder in dict.fromkeys((root, *splits)):
        loose = sum(map(_is_image, _entries(folder)))
        if loose:
            notes.append(f"{folder}: {loose} images lie beside the class folders, not read.")
    files = _list_files(splits, notes)
    classes = tuple(sorted({label for _, label, _ in files}))
    if len(classes) < 2:
        raise DataError(
            f"data must have at least two classes, but {root} has one ({classes[0]}). Put each "
            "class into its own folder; if they lie deeper, give the folder that holds them."
        )
    hashes = _hash_files([path for path, _, _ in files])
    images = []
    for (path, label, split), content in zip(files, hashes, strict=True):
        shown = _shown(path.relative_to(root).as_posix())
        images.append(LabelledImage(content, shown, path, label, split))
    return Found(images, classes, [_shown(note) for note in notes])


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """List a folder by name, but for hidden entries and what archivers add."""
    try:
        with os.scandir(folder) as found:
            kept = [e for e in found if not e.name.startswith(".") and e.name not in _JUNK]
        for entry in kept:
            if entry.is_symlink():
                entry.stat()  # raises where the link leads to nothing or to itself
    except OSError as err:
        raise DataError(
            f"{err.filename} must be readable, but is not: {err.strerror}. Correct its "
            "permissions or its link, or remove it."
        ) from err
    return sorted(kept, key=lambda entry: entry.name)


def _subfolders(root: Path) -> list[Path]:
    return [Path(entry.path) for entry in _entries(root) if entry.is_dir()]


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Tell by the name; what is no regular file is none, for reading a pipe would hang."""
    return Path(entry.name).suffix.lower() in _EXTENSIONS and entry.is_file()


def _is_flat(folder: Path) -> bool:
    return any(map(_is_image, _entries(folder))) and not _subfolders(folder)


def _label(folder: Path) -> str:
    # macOS decomposes accents.
    return _shown(unicodedata.normalize("NFC", folder.name))


def _names(folders: Iterable[Path]) -> str:
    return textwrap.shorten(", ".join(p.name for p in folders), 80, placeholder=" ...")


def _find_splits(root: Path, notes: list[str]) -> dict[Path, str | None]:
    """Return the split of each folder of classes: by its name, and by what the folder holds."""
    inner = _subfolders(root)
    splits: dict[Path, str | None] = {
        folder: _SPLITS[folder.name.lower()] for folder in inner if folder.name.lower() in _SPLITS
    }
    others = [folder for folder in inner if folder not in splits]
    if "train" not in splits.values() and others:
        return {root: None}
    if len(splits) == 1 and others and all(map(_is_flat, inner)):
        notes.append(f"{root}: {_names(splits)} is taken for a class, as {_names(others)}.")
        return {root: None}
    if "train" not in splits.values() or len(set(splits.values())) < len(splits):
        raise DataError(
            f"data folder {root} must have one train folder and one val and test folder at most, "
            f"but it has {_names(inner)}. Rename them to train, val, test."
        )
    read = {_unwrapped(folder): split for folder, split in splits.items()}
    for folder in [folder for folder in read if not _subfolders(folder)]:
        if read.pop(folder) == "train":
            raise DataError(
                f"{folder} must hold one folder per class, but it has no folders. Sort its images "
                "into class folders, or rename it if it is a class itself."
            )
        notes.append(f"{folder}: no class folders (unlabelled or empty), not read.")
    if others:
        notes.append(f"{root}: {_names(others)} lie beside train and are not read.")
    return read


def _unwrapped(split: Path) -> Path:
    """Open train/train, as archives often have it."""
    inner = _subfolders(split)
    return _unwrapped(inner[0]) if [p.name for p in inner] == [split.name] else split


def _check_same_classes(splits: Iterable[Path]) -> None:
    names = {folder: {_label(p) for p in _subfolders(folder)} for folder in splits}
    every = set[str]().union(*names.values())
    lacking = {folder: _names(map(Path, sorted(every - found))) for folder, found in names.items()}
    missing = "; ".join(f"{folder} lacks {lacks}" for folder, lacks in lacking.items() if lacks)
    if missing:
        raise DataError(
            f"data splits must have the same class folders, but {missing}. Add the missing "
            "folders, rename them alike, or move a split without labels elsewhere."
        )


def _check_class_folders(root: Path, folders: list[Path]) -> None:
    """Refuse classes of one name, and parts of a data set that would be taken for classes."""
    labels = Counter(map(_label, folders))
    if len(labels) < len(folders):
        raise DataError(
            f"class folders in {root} must look different, but {labels.most_common(1)[0][1]} look "
            f"like {labels.most_common(1)[0][0]}. Merge or rename them."
        )
    counts = Counter(inner.name for folder in folders for inner in _subfolders(folder))
    repeated = [root / name for name, n in counts.items() if n > 1]
    if len(repeated) > 1:
        raise DataError(
            f"folders in {root} must be classes or splits, but several of {_names(folders)} hold "
            f"the same folders ({_names(repeated)}). If these are the classes, rename the outer "
            "folders to train, val, test, or give one of them as data; if the outer ones are, "
            "move the images of the inner ones up."
        )


def _list_files(
    splits: Mapping[Path, str | None], notes: list[str]
) -> list[tuple[Path, str, str | None]]:
    """List images with class and split."""
    files: list[tuple[Path, str, str | None]] = []
    ignored: Counter[str] = Counter()
    deep = []
    for folder, split in splits.items():
        class_folders = _subfolders(folder)
        _check_class_folders(folder, class_folders)
        for class_folder in class_folders:
            found = list(_images_in(class_folder, ignored))
            if not found:
                raise DataError(
                    f"class folder {class_folder} must hold images, but has none "
                    f"({', '.join(sorted(_EXTENSIONS)[:6])} ... are read). Add some or remove it."
                )
            if all(path.parent != class_folder for path in found):
                deep.append(class_folder)
            files += [(path, _label(class_folder), split) for path in found]
    if deep:
        notes.append(f"{_names(deep)}: images lie in inner folders only, read as one class each.")
    if ignored:
        kinds = ", ".join(f"{n} {kind}" for kind, n in ignored.most_common(10))
        notes.append(f"{ignored.total()} files are no images and are not read: {kinds}.")
    return files


def _images_in(top: Path, ignored: Counter[str]) -> Iterator[Path]:
    """List a class's images, those of inner folders included, and count its other files."""
    pending = [top]
    while pending:
        for entry in _entries(pending.pop()):
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                pending.append(path)
            elif _is_image(entry):
                yield path
            elif entry.is_dir():  # it may lead back here, or to another class
                ignored["links to folders"] += 1
            else:
                kind = path.suffix.lower() or "without suffix"
                ignored[kind if entry.is_file() else "pipes, sockets or devices"] += 1


def _hash_files(paths: Sequence[Path]) -> list[str]:
    def digest(path: Path) -> str:
        try:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as err:
            raise DataError(f"image {path} cannot be read: {err.strerror or err}.") from err

    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(digest, paths))


def _hash_values(values: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _parts(key: str, train: Any = "train", test: Any = "test", **val: Any) -> dict[str, Any]:
    """Map each part's name to the arguments with which a dataset's constructor gives it."""
    return {name: {key: value} for name, value in {"train": train, **val, "test": test}.items()}


_TORCHVISION: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("SVHN", "STL10", "GTSRB", "Food101", "StanfordCars"), _parts("split")),
    **dict.fromkeys(
        ("RenderedSST2", "Flowers102", "FGVCAircraft", "DTD", "PCAM"), _parts("split", val="val")
    ),
    "Country211": _parts("split", val="valid"),
    "OxfordIIITPet": _parts("split", train="trainval"),
    "Imagenette": {"train": {"split": "train"}, "val": {"split": "val"}},
    **dict.fromkeys(
        ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "QMNIST", "USPS"),
        _parts("train", train=True, test=False),
    ),
    **dict.fromkeys(("EuroSAT", "Caltech101", "Caltech256", "SEMEION"), {"all": {}}),
}


def _find_in_torchvision(name: str, root: Path, download: bool) -> Found:
    """List the images of a torchvision dataset."""
    if name not in _TORCHVISION:
        close = difflib.get_close_matches(name, _TORCHVISION, n=2, cutoff=0.4)
        near = f" Near: {', '.join(close)}." if close else ""
        raise DataError(
            f"data.source must name a torchvision dataset, but got torchvision:{name}.{near} "
            f"Known: {', '.join(sorted(_TORCHVISION))}."
        )
    images: list[LabelledImage] = []
    classes: tuple[str, ...] = ()
    for part, options in _TORCHVISION[name].items():
        dataset = _open_dataset(name, root, download, options)
        contents, raws, labels = _listed(dataset)
        named = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
        # Some name none; Imagenette's are tuples of synonyms.
        found = named or range(max(labels) + 1)
        names = (" ".join(n) if isinstance(n, tuple) else str(n) for n in found)
        classes = classes or tuple(map(_shown, names))
        split = None if part == "all" else part
        for i, (content, raw, k) in enumerate(zip(contents, raws, labels, strict=True)):
            images.append(LabelledImage(content, f"{name}/{part}/{i}", raw, classes[k], split))
    return Found(images, classes)


def _open_dataset(name: str, root: Path, download: bool, options: dict[str, Any]) -> Any:
    from torchvision import datasets

    build: Callable[..., Any] = getattr(datasets, name)
    if "download" in inspect.signature(build).parameters:
        options = {**options, "download": download}
    try:
        return build(root=str(root), **options)
    except (RuntimeError, OSError, ImportError, ValueError) as err:
        first = str(err).splitlines()[0]
        raise DataError(
            f"torchvision dataset {name} must lie in {root} (data.root), but it cannot be "
            f"opened: {first} Set data.download = true to let torchvision fetch it."
        ) from err


def _listed(dataset: Any) -> tuple[list[str], Sequence[Raw | Callable[[], Raw]], list[int]]:
    """List contents, images as `LabelledImage.raw`, and class numbers of a dataset.

    Hashing files is about a hundred times faster than decoding them, and done at every start; a
    dataset that is held in memory or in one file is decoded.
    """
    pairs = getattr(dataset, "samples", None) or getattr(dataset, "_samples", None)
    if pairs is None:
        files = getattr(dataset, "_image_files", None) or getattr(dataset, "_images", None)
        pairs = list(zip(files or (), getattr(dataset, "_labels", None) or (), strict=False))
    if len(pairs) == len(dataset) and all(Path(path).is_file() for path, _ in pairs):
        paths = [Path(path) for path, _ in pairs]
        return _hash_files(paths), paths, [int(k) for _, k in pairs]

    def look(i: int) -> tuple[str, int]:
        image, label = dataset[i]
        return _hash_values(image), int(label)

    with ThreadPoolExecutor(usable_cores()) as pool:
        contents, labels = zip(*pool.map(look, range(len(dataset))), strict=True)
    return list(contents), [lambda i=i: dataset[i][0] for i in range(len(dataset))], list(labels)


def _find_digits() -> Found:
    from sklearn.datasets import load_digits

    loaded = load_digits()
    names = tuple(str(k) for k in loaded.target_names)
    images = []
    for i, (grey, label) in enumerate(zip(loaded.images, loaded.target, strict=True)):
        image = Image.fromarray(np.round(grey * (255 / 16)).astype(np.uint8))  # 8 x 8, 0 to 16
        image = image.resize((_DIGIT_SIDE, _DIGIT_SIDE), Image.Resampling.BICUBIC)
        images.append(LabelledImage(_hash_values(grey), f"digits/{i}", image, names[label]))
    return Found(images, names)
