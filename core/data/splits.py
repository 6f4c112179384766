"""Images split for training, choosing and testing, by content and seed alone."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import platformdirs

from core.config import DataConfig, GreyRange, Preprocessing
from core.data.decode import Kind, View
from core.data.draws import IntArray
from core.data.image_store import EvalViews, ImageStore, Progress, build_stores
from core.data.partition import partition
from core.data.sources import DataError, Found, LabelledImage, find_images

# Below this many training images a class cannot be learned or judged; worth a warning. Assumption.
_FEW = 10
_MOST_LISTED = 10
# Of all levels: what is left of an image where others' values are far higher. Assumption.
_FEW_LEVELS = 20 / 256


@dataclass(frozen=True, slots=True)
class Split:
    """One part of the images: positions in a store, class numbers, and names, (N,) each.

    Training views are cut from the images in the store, which all parts share.
    """

    store: ImageStore
    indices: IntArray
    labels: IntArray
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def contents(self) -> list[str]:
        """Hash of each image's contents, (N,), as `partition` takes them."""
        return [self.store.contents[i] for i in self.indices]

    def take(self, rows: IntArray) -> "Split":
        """Return some of the images, by their rows in order."""
        paths = tuple(self.paths[row] for row in rows)
        return Split(self.store, self.indices[rows], self.labels[rows], paths)


@dataclass(frozen=True, slots=True)
class ImageData:
    """Labelled images, split.

    Attributes:
        classes: Class names in the order of class numbers.
        test: Images for the one final test; None where the source has none.
        views: The evaluation views of all images, in the order of the parts' store.
        fingerprint: SHA-256 over contents, labels and parts; it does not depend on file names.
        warnings: What the user should know.
    """

    source: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split | None
    views: EvalViews
    fingerprint: str
    warnings: tuple[str, ...]

    @property
    def development(self) -> Split:
        """All images but the test split: the training and then the validation images."""
        train, val = self.train, self.val
        return Split(
            train.store,
            np.concatenate([train.indices, val.indices]),
            np.concatenate([train.labels, val.labels]),
            train.paths + val.paths,
        )

    def folds(self, n_folds: int, seed: int) -> IntArray:
        """Return the fold of each image of `development`, (N,)."""
        whole = self.development
        return partition(whole.labels.tolist(), whole.contents, n_folds, seed)

    def with_fold(self, n_folds: int, seed: int, fold: int) -> "ImageData":
        """Return the images with one fold of `development` to choose by, and the rest to train."""
        fold_of, whole = self.folds(n_folds, seed), self.development
        mark = f"{self.fingerprint} {n_folds} {seed} {fold}"
        return replace(
            self,
            train=whole.take(np.flatnonzero(fold_of != fold)),
            val=whole.take(np.flatnonzero(fold_of == fold)),
            fingerprint=hashlib.sha256(mark.encode()).hexdigest(),
        )

    def with_share(self, fraction: float) -> "ImageData":
        """Return the images with this share of every class to learn from, two each at least.

        A smaller share is part of a larger one. They are the first by their contents, so
        that the first ones are a random sample.
        """
        if fraction == 1:
            return self
        # In a fold, images that were given as validation images come last.
        order = np.argsort(np.array(self.train.contents), kind="stable")
        labels = self.train.labels[order]
        rows = [order[labels == k] for k in np.unique(labels)]
        kept = [of_class[: max(2, round(fraction * len(of_class)))] for of_class in rows]
        return replace(self, train=self.train.take(np.sort(np.concatenate(kept))))


def cache_folder(config: DataConfig) -> Path:
    """Return the folder of decoded images and of the arrays that runs share."""
    return Path(config.cache_dir or platformdirs.user_cache_dir("frostline")).expanduser()


def load_data(
    config: DataConfig,
    store_size: int,
    progress: Progress = None,
    shown: Sequence[Preprocessing] = (),
    most: int | None = None,
) -> ImageData:
    """Find, check, decode and split the images of a source.

    Args:
        config: Source and splits.
        store_size: Shorter side at which images are kept where the configuration has none.
        progress: Called with how many of how many images are decoded.
        shown: Evaluation views to make at once; others are made when they are needed.
        most: Sample about so many images, no image of the test split among them; None for all.

    Raises:
        DataError: The source cannot be used; says what to do.
    """
    found = find_images(config)
    if most is not None:
        found = _sampled(found, config, most)
        config = replace(config, limit=None, skip_unreadable=True, ablation_fraction=0.0)
    notes = found.warnings
    kinds: list[Kind] = [config.store_size or store_size, *dict.fromkeys(map(View.of, shown))]
    cache = cache_folder(config)
    store = build_stores(found.images, kinds, cache, progress)[0]
    images = _readable(found.images, store.broken, config.skip_unreadable, notes)
    parts = _split(images, config, notes)
    absent = sorted(set(found.classes) - {image.label for image in parts["train"]})
    if absent:
        raise DataError(
            "every class must have images to train on that can be decoded, but there are none "
            f"of {', '.join(absent)}. Add some or remove the class."
        )
    parts["train"] = _limited(parts["train"], config.limit)
    grey_range = _grey_range(parts["train"], store, notes)
    if grey_range:
        store = build_stores(found.images, kinds, cache, progress, grey_range)[0]
    counts = Counter(image.label for image in parts["train"])
    few = [f"{label} ({counts[label]})" for label in found.classes if counts[label] < _FEW]
    if few:
        notes.append(f"few training images: {', '.join(few[:_MOST_LISTED])}.")
    number = {name: k for k, name in enumerate(found.classes)}
    position = {content: i for i, content in enumerate(store.contents)}
    splits = {
        name: Split(
            store,
            np.array([position[image.content] for image in part], dtype=np.int64),
            np.array([number[image.label] for image in part], dtype=np.int64),
            tuple(image.path for image in part),
        )
        for name, part in parts.items()
    }
    lines = [f"{name} {i.label} {i.content}" for name, part in parts.items() for i in part]
    return ImageData(
        config.source,
        found.classes,
        splits["train"],
        splits["val"],
        splits.get("test"),
        EvalViews(found.images, store, cache, grey_range),
        hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest(),
        tuple(notes),
    )


def _grey_range(images: list[LabelledImage], store: ImageStore, notes: list[str]) -> GreyRange:
    """Return the lowest and highest value of images of more than 8 bits; None where none has.

    These are the training images, or all others where no training image has more.
    """
    ranges = {i.path: store.grey[i.content] for i in images if i.content in store.grey}
    if store.grey and not ranges:
        text = "images have more than 8 bits and no training image has: their own values become"
        notes.append(f"{len(store.grey)} {text} 0 to 255.")
    found = list((ranges or store.grey).values())
    if not found:
        return None
    low, high = min(lowest for lowest, _ in found), max(highest for _, highest in found)
    few = [path for path, own in ranges.items() if own[1] - own[0] < _FEW_LEVELS * (high - low)]
    if few:
        notes.append(
            f"{len(few)} images of more than 8 bits keep fewer than {_FEW_LEVELS * 256:.0f} grey "
            f"levels: the values of the training images, {low:g} to {high:g}, become 0 to 255 "
            f"({', '.join(few[:3])})."
        )
    return low, high


def _readable(
    images: list[LabelledImage], broken: dict[str, str], skip: bool, notes: list[str]
) -> list[LabelledImage]:
    bad = [image for image in images if image.content in broken]
    if not bad:
        return images
    listed = "; ".join(f"{i.path} ({broken[i.content]})" for i in bad[:_MOST_LISTED])
    more = f" and {len(bad) - _MOST_LISTED} more" if len(bad) > _MOST_LISTED else ""
    if not skip:
        raise DataError(
            f"{len(bad)} of {len(images)} images cannot be decoded: {listed}{more}. Remove or "
            "replace them, or leave them out with --set data.skip_unreadable=true."
        )
    notes.append(f"{len(bad)} images cannot be decoded and are left out: {listed}{more}.")
    return [image for image in images if image.content not in broken]


def _split(
    images: list[LabelledImage], config: DataConfig, notes: list[str]
) -> dict[str, list[LabelledImage]]:
    """Divide images into parts, each in the order of contents."""
    images = sorted(images, key=lambda image: (image.content, image.label, image.path))
    parts: dict[str, list[LabelledImage]] = defaultdict(list)
    for image in images:
        parts[image.split or "all"].append(image)
    _warn_of_copies(parts, notes)
    fractions = {
        "test": config.test_fraction if "all" in parts else 0.0,
        "ablation": config.ablation_fraction,
        "val": config.val_fraction if "val" not in parts else 0.0,
    }
    fractions = {name: fraction for name, fraction in fractions.items() if fraction}
    if sum(fractions.values()) >= 1:
        keys = " + ".join(f"data.{name}_fraction" for name in fractions)
        values = " + ".join(f"{fraction:g}" for fraction in fractions.values())
        raise DataError(f"{keys} must be < 1, but got {values}. Make one smaller.")
    if not fractions:
        return {"train": [], **parts}
    given = parts.pop("all" if "all" in parts else "train", [])
    different: dict[tuple[str, str], LabelledImage] = {}
    for image in given:
        different.setdefault((image.content, image.label), image)
    whole = list(different.values())
    if len(whole) < len(given):
        n = len(given) - len(whole)
        notes.append(f"{n} images are copies of others of their class; one of each is used.")
    labels, contents = [image.label for image in whole], [image.content for image in whole]
    part_of = partition(labels, contents, list(fractions.values()), config.split_seed)
    for k, name in enumerate((*fractions, "train")):
        parts[name] = [whole[i] for i in np.flatnonzero(part_of == k)]
    apart = parts.pop("ablation", [])
    if config.judged_by == "ablation":
        merged = parts["train"] + parts["val"]
        parts["train"] = sorted(merged, key=lambda image: (image.content, image.label, image.path))
        parts["val"] = apart
    return dict(parts)


def _sampled(found: Found, config: DataConfig, most: int) -> Found:
    """Keep the same share of every class and of both parts, but of the test split nothing."""
    parts = _split(found.images, config, [])
    parts.pop("test", None)
    n = sum(map(len, parts.values()))
    kept = [
        replace(image, split=name)
        for name, part in parts.items()
        for image in _limited(part, most * len(part) // n)
    ]
    return Found(kept, found.classes)


def _limited(images: list[LabelledImage], limit: int | None) -> list[LabelledImage]:
    """Keep the same share of every class, `limit` in all or a few less, two of each at least."""
    if limit is None or len(images) <= limit:
        return images
    counts = Counter(image.label for image in images)
    left = {label: max(2, n * limit // len(images)) for label, n in counts.items()}
    kept = []
    for image in images:
        if left[image.label] > 0:
            left[image.label] -= 1
            kept.append(image)
    return kept


def _warn_of_copies(parts: dict[str, list[LabelledImage]], notes: list[str]) -> None:
    where: dict[str, dict[str, str]] = defaultdict(dict)
    labels: dict[str, set[str]] = defaultdict(set)
    for name, part in parts.items():
        for image in part:
            where[image.content].setdefault(name, image.path)
            labels[image.content].add(image.label)
    shared = [list(places.values()) for places in where.values() if len(places) > 1]
    if shared:
        notes.append(
            f"{len(shared)} images lie in more than one split, so their scores are too good "
            f"(leakage): {' = '.join(shared[0])}"
            f"{f' and {len(shared) - 1} more' if len(shared) > 1 else ''}. Remove the copies."
        )
    torn = sum(len(found) > 1 for found in labels.values())
    if torn:
        notes.append(f"{torn} images lie in more than one class; check their labels.")
