"""torchvision's data sets by name."""

import difflib
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from core.device import usable_cores
from core.labelled import Found, Labelled, digest_values, hash_files
from core.pictures import DataError, Item

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


def find_in_torchvision(name: str, root: Path, download: bool) -> Found:
    """List the pictures of a torchvision data set.

    Raises:
        DataError: It is unknown, or not in `root`.
    """
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
        contents, reads, labels = _listed_files(part) or _listed_images(part)
        classes = classes or _class_names(part, labels)
        for i, (content, read, label) in enumerate(zip(contents, reads, labels, strict=True)):
            item = Item(content, f"{name}/{split}/{i}", read)
            pictures.append(Labelled(item, classes[label], None if split == "all" else split))
    return Found(pictures, classes)


Listed = tuple[list[str], list[Callable[[], Any]], list[int]]


def _listed_files(part: Any) -> Listed | None:
    """List a data set by its files: contents, readers, labels; None where it has no such list.

    Hashing files is about a hundred times faster than decoding them, and done at every start.
    """
    pairs = getattr(part, "samples", None) or getattr(part, "_samples", None)
    if pairs is None:
        files = getattr(part, "_image_files", None) or getattr(part, "_images", None)
        pairs = list(zip(files or (), getattr(part, "_labels", None) or (), strict=False))
    if len(pairs) != len(part) or not all(Path(path).is_file() for path, _ in pairs):
        return None
    paths = [Path(path) for path, _ in pairs]
    return hash_files(paths), [partial(Path, p) for p in paths], [int(k) for _, k in pairs]


def _listed_images(part: Any) -> Listed:
    """List a data set that is held in memory or in one file by decoding it."""
    images = [partial(_nth, part, i) for i in range(len(part))]
    with ThreadPoolExecutor(usable_cores()) as pool:
        contents = list(pool.map(lambda image: digest_values(np.asarray(image())), images))
    return contents, list(images), [int(part[i][1]) for i in range(len(part))]


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


def _class_names(part: Any, labels: list[int]) -> tuple[str, ...]:
    names = getattr(part, "classes", None) or getattr(part, "categories", None)
    if names:
        return tuple(" ".join(n) if isinstance(n, tuple) else str(n) for n in names)
    return tuple(str(k) for k in range(max(labels) + 1))


def _nth(part: Any, i: int) -> Image.Image:
    image: Image.Image = part[i][0]
    return image
