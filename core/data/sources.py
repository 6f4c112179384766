"""Where images come from: folders, torchvision's datasets, and the embedded digits."""

import difflib
import hashlib
import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from core.config import DataConfig
from core.data.decode import Raw
from core.device import usable_cores

_DIGIT_SIDE = 64
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
    + (".ppm", ".pgm", ".pbm", ".pnm", ".avif")
)


class DataError(ValueError):
    """The images cannot be used as they are; the message says which and what to do."""


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One image before it is decoded.

    Attributes:
        content: SHA-256 of its contents, hexadecimal.
        path: What messages and reports call it.
        read: Gives the file, the bytes or the image.
        label: Class name.
        split: `train`, `val`, `test`, or None where the source has no splits.
    """

    content: str
    path: str
    read: Callable[[], Raw]
    label: str
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What a source holds.

    Attributes:
        images: All of them.
        classes: Class names, in the order of the outputs.
        warnings: What the user should know.
    """

    images: list[LabelledImage]
    classes: tuple[str, ...]
    warnings: list[str] = field(default_factory=list)


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
    return _find_in_folder(Path(name if kind == "folder" else config.source).expanduser())


def check_folder(root: Path) -> None:
    """Raise `DataError` where a data folder is missing, a file, or has no folders."""
    if not root.exists():
        siblings = [p.name for p in _subfolders(root.parent)] if root.parent.is_dir() else []
        close = difflib.get_close_matches(root.name, siblings, n=1)
        near = f" Did you mean {root.parent / close[0]}?" if close else ""
        raise DataError(f"data folder {root} must exist, but it does not.{near}")
    if not root.is_dir():
        raise DataError(f"data must be a folder of class folders, but {root} is a file.")
    if not _subfolders(root):
        raise DataError(
            f"data folder {root} must hold one folder per class (or train, val, test with them "
            "inside), but it has no folders."
        )


def _find_in_folder(root: Path) -> Found:
    """List the images of a folder of classes, or of splits with classes inside."""
    check_folder(root)
    inner = _subfolders(root)
    named = {folder: _SPLITS.get(folder.name.lower()) for folder in inner}
    splits = {folder: split for folder, split in named.items() if split}
    if "train" not in splits.values():
        if len(splits) == len(inner):
            raise DataError(
                f"data folder {root} must have a train folder beside "
                f"{', '.join(folder.name for folder in splits)}, but it has none."
            )
        return _find_in_class_folders(root, {root: None}, [])
    others = [folder.name for folder in inner if folder not in splits]
    notes = [f"{root}: {', '.join(others)} lie beside train and are not read."] if others else []
    _check_same_classes(splits)
    return _find_in_class_folders(root, splits, notes)


def _subfolders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _check_same_classes(splits: Iterable[Path]) -> None:
    names = {folder: {p.name for p in _subfolders(folder)} for folder in splits}
    every = set[str]().union(*names.values())
    lacking = {folder: ", ".join(sorted(every - found)) for folder, found in names.items()}
    missing = "; ".join(f"{folder} lacks {lacks}" for folder, lacks in lacking.items() if lacks)
    if missing:
        raise DataError(
            f"data splits must have the same class folders, but {missing}. Add the missing "
            "folders or rename them alike."
        )


def _find_in_class_folders(
    root: Path, splits: Mapping[Path, str | None], notes: list[str]
) -> Found:
    files: list[tuple[Path, str, str | None]] = []
    ignored: Counter[str] = Counter()
    for folder, split in splits.items():
        loose = sum(p.is_file() and p.suffix.lower() in _EXTENSIONS for p in folder.iterdir())
        if loose:
            notes.append(f"{folder}: {loose} images lie beside the class folders, not read.")
        for class_folder in _subfolders(folder):
            found = _images_in(class_folder, ignored)
            if not found:
                raise DataError(
                    f"class folder {class_folder} must hold images, but has none "
                    f"({', '.join(sorted(_EXTENSIONS)[:6])} ... are read). Add some or remove it."
                )
            files += [(path, class_folder.name, split) for path in found]
    classes = tuple(sorted({label for _, label, _ in files}))
    if len(classes) < 2:
        raise DataError(
            f"data must have at least two classes, but {root} has "
            f"{f'one ({classes[0]})' if classes else 'none'}. Put each class into its own folder."
        )
    if ignored:
        kinds = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in ignored.items())
        notes.append(f"{sum(ignored.values())} files are no images and are not read: {kinds}.")
    hashes = _hash_files([path for path, _, _ in files])
    images = []
    for (path, label, split), content in zip(files, hashes, strict=True):
        # Bytes of a name that are no UTF-8 are shown as question marks.
        name = path.relative_to(root).as_posix().encode("utf-8", "surrogateescape")
        shown = name.decode("utf-8", "replace")
        images.append(LabelledImage(content, shown, partial(Path, path), label, split))
    return Found(images, classes, notes)


def _images_in(folder: Path, ignored: Counter[str]) -> list[Path]:
    """List a class folder's images, inner folders included, and count its other files."""

    def refuse(err: OSError) -> None:
        why = f"folder {err.filename} must be readable, but is not: {err.strerror}."
        raise DataError(why) from err

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in sorted(names) if not name.startswith(".")):
            if path.suffix.lower() in _EXTENSIONS:
                found.append(path)
            else:
                ignored[path.suffix.lower()] += 1
    return found


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
        contents, reads, labels = _listed(dataset)
        named = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
        # Some name none; Imagenette's are tuples of synonyms.
        found = named or range(max(labels) + 1)
        classes = classes or tuple(" ".join(n) if isinstance(n, tuple) else str(n) for n in found)
        split = None if part == "all" else part
        for i, (content, read, k) in enumerate(zip(contents, reads, labels, strict=True)):
            images.append(LabelledImage(content, f"{name}/{part}/{i}", read, classes[k], split))
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


def _listed(dataset: Any) -> tuple[list[str], list[Callable[[], Any]], list[int]]:
    """List contents, readers and class numbers of a dataset's images.

    Hashing files is about a hundred times faster than decoding them, and done at every start; a
    dataset that is held in memory or in one file is decoded.
    """
    pairs = getattr(dataset, "samples", None) or getattr(dataset, "_samples", None)
    if pairs is None:
        files = getattr(dataset, "_image_files", None) or getattr(dataset, "_images", None)
        pairs = list(zip(files or (), getattr(dataset, "_labels", None) or (), strict=False))
    if len(pairs) == len(dataset) and all(Path(path).is_file() for path, _ in pairs):
        paths = [Path(path) for path, _ in pairs]
        return _hash_files(paths), [partial(Path, p) for p in paths], [int(k) for _, k in pairs]

    def look(i: int) -> tuple[str, int]:
        image, label = dataset[i]
        return _hash_values(image), int(label)

    def read(i: int) -> Any:
        return dataset[i][0]

    with ThreadPoolExecutor(usable_cores()) as pool:
        contents, labels = zip(*pool.map(look, range(len(dataset))), strict=True)
    return list(contents), [partial(read, i) for i in range(len(dataset))], list(labels)


def _find_digits() -> Found:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as err:
        raise DataError(
            'data.source = "digits" needs scikit-learn, which is not installed: '
            'pip install "frostline[demo]". Or name your own images: --data PATH.'
        ) from err
    loaded = load_digits()
    names = tuple(str(k) for k in loaded.target_names)
    images = [
        LabelledImage(_hash_values(grey), f"digits/{i}", partial(_enlarge, grey), names[label])
        for i, (grey, label) in enumerate(zip(loaded.images, loaded.target, strict=True))
    ]
    return Found(images, names)


def _enlarge(grey: Any) -> Image.Image:
    """Turn a digit of 8 x 8 values from 0 to 16 into an image."""
    image = Image.fromarray(np.round(grey * (255 / 16)).astype(np.uint8))
    return image.resize((_DIGIT_SIDE, _DIGIT_SIDE), Image.Resampling.BICUBIC)
