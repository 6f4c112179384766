"""Where pictures come from: folders, torchvision's data sets, and the embedded digits."""

import difflib
import hashlib
import importlib.util
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from core.config import DataConfig
from core.device import usable_cores
from core.pictures import DataError, Item

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
    + (".ppm", ".pgm", ".pbm", ".pnm", ".avif")
)
_DIGIT_SIDE = 64


@dataclass(frozen=True, slots=True)
class Labelled:
    """A picture with its class and, where the source is split, its split.

    Attributes:
        item: The picture.
        label: Class name.
        split: `train`, `val`, `test`, or None where the source has no splits.
    """

    item: Item
    label: str
    split: str | None


@dataclass(frozen=True, slots=True)
class Found:
    """What a source holds.

    Attributes:
        pictures: All of them.
        classes: Class names, in the order of the outputs.
        warnings: What the user should know.
    """

    pictures: list[Labelled]
    classes: tuple[str, ...]
    warnings: list[str] = field(default_factory=list)


def find_pictures(config: DataConfig) -> Found:
    """List a source's pictures.

    Raises:
        DataError: The source is unknown, missing, empty, or its folders do not agree.
    """
    kind, _, name = config.source.partition(":")
    if config.source == "digits":
        return _digits()
    if kind == "torchvision":
        return _torchvision(name, Path(config.root), config.download)
    path = Path(name if kind == "folder" else config.source).expanduser()
    return _folder(path)


def _folder(root: Path) -> Found:
    if not root.exists():
        raise DataError(_missing(root))
    if not root.is_dir():
        raise DataError(f"data must be a folder of class folders, but {root} is a file.")
    inner = _subfolders(root)
    if not inner:
        raise DataError(
            f"data folder {root} must hold one folder per class (or train, val, test with them "
            "inside), but it has no folders."
        )
    splits = {folder: SPLITS[folder.name.lower()] for folder in inner if _is_split(folder)}
    if splits and "train" in splits.values():
        return _split_folders(root, splits, inner)
    return _class_folders(root, {folder: None for folder in [root]}, [])


def _missing(root: Path) -> str:
    near = ""
    if root.parent.is_dir():
        names = [path.name for path in _subfolders(root.parent)]
        close = difflib.get_close_matches(root.name, names, n=1)
        near = f" Did you mean {root.parent / close[0]}?" if close else ""
    return f"data folder {root} must exist, but it does not.{near}"


def _subfolders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _is_split(folder: Path) -> bool:
    return folder.name.lower() in SPLITS


def _split_folders(root: Path, splits: dict[Path, str], inner: list[Path]) -> Found:
    others = [folder.name for folder in inner if folder not in splits]
    notes = [f"{root}: {', '.join(others)} lie beside train and are not read."] if others else []
    names = {folder: {p.name for p in _subfolders(folder)} for folder in splits}
    train = next(folder for folder, split in splits.items() if split == "train")
    for folder, found in names.items():
        if found != names[train]:
            raise DataError(_differing(train, names[train], folder, found))
    return _class_folders(root, dict(splits), notes)


def _differing(train: Path, wanted: set[str], folder: Path, found: set[str]) -> str:
    told = []
    if wanted - found:
        told.append(f"{folder} lacks {', '.join(sorted(wanted - found))}")
    if found - wanted:
        told.append(f"{train} lacks {', '.join(sorted(found - wanted))}")
    return (
        f"data splits must have the same class folders, but {'; '.join(told)}. Add the missing "
        "folders or rename them alike."
    )


def _class_folders(root: Path, splits: dict[Path, str | None], notes: list[str]) -> Found:
    files: list[tuple[Path, str, str | None]] = []
    ignored: Counter[str] = Counter()
    for folder, split in splits.items():
        for class_folder in _subfolders(folder):
            found = _pictures_in(class_folder, ignored)
            if not found:
                raise DataError(
                    f"class folder {class_folder} must hold pictures, but has none "
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
        notes.append(f"{sum(ignored.values())} files are no pictures and are not read: {kinds}.")
    hashes = _hash_files([path for path, _, _ in files])
    pictures = [
        Labelled(Item(digest, _shown(path, root), partial(Path, path)), label, split)
        for (path, label, split), digest in zip(files, hashes, strict=True)
    ]
    return Found(pictures, classes, notes)


def _shown(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _pictures_in(folder: Path, ignored: Counter[str]) -> list[Path]:
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
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
            raise DataError(f"picture {path} cannot be read: {err.strerror or err}.") from err

    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(digest, paths))


def _digits() -> Found:
    if importlib.util.find_spec("sklearn") is None:
        raise DataError(
            'data.source = "digits" needs scikit-learn, which is not installed: '
            'pip install "frostline[demo]". Or name your own pictures: --data PATH.'
        )
    from sklearn.datasets import load_digits

    loaded = load_digits()
    names = tuple(str(k) for k in loaded.target_names)
    pictures = [
        Labelled(Item(_digest(grey), f"digits/{i}", partial(_digit, grey)), names[label], None)
        for i, (grey, label) in enumerate(zip(loaded.images, loaded.target, strict=True))
    ]
    return Found(pictures, names)


def _digest(values: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _digit(grey: Any) -> Image.Image:
    """Enlarge an 8 x 8 picture of values 0 to 16."""
    image = Image.fromarray(np.round(grey * (255 / 16)).astype(np.uint8))
    return image.resize((_DIGIT_SIDE, _DIGIT_SIDE), Image.Resampling.BICUBIC)


# How each data set's constructor names its parts; those that are not here take `train=`.
_SPLIT_NAMES: dict[str, dict[str, str]] = {
    "SVHN": {"train": "train", "test": "test"},
    "STL10": {"train": "train", "test": "test"},
    "GTSRB": {"train": "train", "test": "test"},
    "Food101": {"train": "train", "test": "test"},
    "StanfordCars": {"train": "train", "test": "test"},
    "RenderedSST2": {"train": "train", "val": "val", "test": "test"},
    "Flowers102": {"train": "train", "val": "val", "test": "test"},
    "FGVCAircraft": {"train": "train", "val": "val", "test": "test"},
    "DTD": {"train": "train", "val": "val", "test": "test"},
    "PCAM": {"train": "train", "val": "val", "test": "test"},
    "Country211": {"train": "train", "val": "valid", "test": "test"},
    "OxfordIIITPet": {"train": "trainval", "test": "test"},
    "Imagenette": {"train": "train", "val": "val"},
}
_BY_FLAG = ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "QMNIST", "USPS")
_UNSPLIT = ("EuroSAT", "Caltech101", "Caltech256", "SEMEION")


def dataset_names() -> tuple[str, ...]:
    """List the torchvision data sets that can be named."""
    return tuple(sorted([*_SPLIT_NAMES, *_BY_FLAG, *_UNSPLIT]))


def _torchvision(name: str, root: Path, download: bool) -> Found:
    if name not in dataset_names():
        close = difflib.get_close_matches(name, dataset_names(), n=2, cutoff=0.4)
        near = f" Near: {', '.join(close)}." if close else ""
        raise DataError(
            f"data.source must name a torchvision data set, but got torchvision:{name}.{near} "
            f"Known: {', '.join(dataset_names())}."
        )
    pictures: list[Labelled] = []
    classes: tuple[str, ...] = ()
    for split, options in _parts(name).items():
        part = _open_dataset(name, root, download, options)
        classes = classes or _class_names(part)
        for i in range(len(part)):
            image, label = part[i]
            content = _digest(np.asarray(image))
            item = Item(content, f"{name}/{split}/{i}", partial(_nth, part, i))
            pictures.append(Labelled(item, classes[int(label)], None if split == "all" else split))
    return Found(pictures, classes)


def _parts(name: str) -> dict[str, dict[str, Any]]:
    if name in _UNSPLIT:
        return {"all": {}}
    if name in _BY_FLAG:
        return {"train": {"train": True}, "test": {"train": False}}
    return {split: {"split": value} for split, value in _SPLIT_NAMES[name].items()}


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
            f"torchvision data set {name} must lie in {root} (data.root), but it cannot be "
            f"opened: {first} Set data.download = true to let torchvision fetch it."
        ) from err


def _class_names(part: Any) -> tuple[str, ...]:
    names = getattr(part, "classes", None) or getattr(part, "categories", None)
    if names:
        return tuple(" ".join(n) if isinstance(n, tuple) else str(n) for n in names)
    labels = {int(part[i][1]) for i in range(len(part))}
    return tuple(str(k) for k in range(max(labels) + 1))


def _nth(part: Any, i: int) -> Image.Image:
    image: Image.Image = part[i][0]
    return image
