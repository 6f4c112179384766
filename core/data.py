"""Pictures split for training, choosing and testing, by content and seed alone."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs

from core.config import DataConfig
from core.labelled import Labelled
from core.pictures import DataError, IntArray, PictureStore, build_store
from core.sources import find_pictures

# Below this many training pictures a class cannot be learned or judged; worth a word. Assumption.
_FEW = 10
_TOLD = 10


@dataclass(frozen=True, slots=True)
class Split:
    """One part of the pictures.

    Attributes:
        name: `train`, `val` or `test`.
        store: Decoded pictures, shared by all parts.
        indices: Positions in the store, (N,).
        labels: Class numbers, (N,).
        paths: What reports call the pictures, (N,).
    """

    name: str
    store: PictureStore
    indices: IntArray
    labels: IntArray
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class ImageData:
    """Labelled pictures, split.

    Attributes:
        source: What `DataConfig.source` said.
        classes: Class names in the order of class numbers.
        train: Pictures to learn from.
        val: Pictures to choose by.
        test: Pictures for the one final look; None where the source has none.
        fingerprint: SHA-256 over contents, labels and parts; it does not depend on file names.
        warnings: What the user should know.
    """

    source: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split | None
    fingerprint: str
    warnings: tuple[str, ...]


def load_data(
    config: DataConfig, picture_size: int, progress: Callable[[int, int], None] | None = None
) -> ImageData:
    """Find, check, decode and split the pictures of a source.

    Args:
        config: Source and splits.
        picture_size: Shorter side at which pictures are kept where the configuration has none.
        progress: Told how many of how many pictures are decoded.

    Raises:
        DataError: The source cannot be used; says what to do.
    """
    found = find_pictures(config)
    notes = list(found.warnings)
    bound = config.picture_size or picture_size
    cache = Path(config.cache_dir or platformdirs.user_cache_dir("frostline"))
    items = [picture.item for picture in found.pictures]
    store, at, broken = build_store(items, bound, cache, progress)
    pictures = _readable(found.pictures, broken, config.skip_unreadable, notes)
    parts = _split(pictures, config, notes)
    _check_classes(parts["train"], found.classes)
    parts["train"] = _limited(parts["train"], config.limit)
    _warn_of_few(parts, found.classes, notes)
    number = {name: k for k, name in enumerate(found.classes)}
    splits = {
        name: Split(
            name,
            store,
            np.array([at[p.item.content] for p in part], dtype=np.int64),
            np.array([number[p.label] for p in part], dtype=np.int64),
            tuple(p.item.path for p in part),
        )
        for name, part in parts.items()
    }
    return ImageData(
        config.source,
        found.classes,
        splits["train"],
        splits["val"],
        splits.get("test"),
        _fingerprint(parts),
        tuple(notes),
    )


def _readable(
    pictures: list[Labelled], broken: dict[str, str], skip: bool, notes: list[str]
) -> list[Labelled]:
    bad = [p for p in pictures if p.item.content in broken]
    if not bad:
        return pictures
    told = "; ".join(f"{p.item.path} ({broken[p.item.content]})" for p in bad[:_TOLD])
    more = f" and {len(bad) - _TOLD} more" if len(bad) > _TOLD else ""
    if not skip:
        raise DataError(
            f"{len(bad)} of {len(pictures)} pictures cannot be decoded: {told}{more}. Remove or "
            "replace them, or leave them out with --set data.skip_unreadable=true."
        )
    notes.append(f"{len(bad)} pictures cannot be decoded and are left out: {told}{more}.")
    return [p for p in pictures if p.item.content not in broken]


def _split(
    pictures: list[Labelled], config: DataConfig, notes: list[str]
) -> dict[str, list[Labelled]]:
    """Divide pictures into parts, each in the order of contents."""
    pictures = sorted(pictures, key=lambda p: (p.item.content, p.label, p.item.path))
    parts: dict[str, list[Labelled]] = defaultdict(list)
    for picture in pictures:
        parts[picture.split or "all"].append(picture)
    _warn_of_copies(parts, notes)
    if "all" in parts:
        whole = _without_copies(parts.pop("all"), notes)
        shares = {"test": config.test_fraction, "val": config.val_fraction}
        if sum(shares.values()) >= 1:
            raise DataError(
                "data.val_fraction + data.test_fraction must be < 1, but got "
                f"{config.val_fraction:g} + {config.test_fraction:g}."
            )
        return _divide(whole, shares, _seeds(config))
    if "val" not in parts:
        whole = _without_copies(parts.pop("train"), notes)
        parts |= _divide(whole, {"val": config.val_fraction}, _seeds(config))
    elif config.val_seed is not None:
        raise DataError(
            f"data.val_seed must be left out where the source has a validation split of its own, "
            f"but got val_seed={config.val_seed!r}. Remove the key, or merge val/ into train/."
        )
    return dict(parts)


def _seeds(config: DataConfig) -> dict[str, int]:
    """Give each part that is drawn its seed; the test split never moves with the validation's."""
    val_seed = config.split_seed if config.val_seed is None else config.val_seed
    return {"test": config.split_seed, "val": val_seed}


def _without_copies(pictures: list[Labelled], notes: list[str]) -> list[Labelled]:
    """Keep one of each content and class, so that no copy falls into another part."""
    kept: dict[tuple[str, str], Labelled] = {}
    for picture in pictures:
        kept.setdefault((picture.item.content, picture.label), picture)
    n = len(pictures) - len(kept)
    if n:
        notes.append(f"{n} pictures are copies of others of their class; one of each is used.")
    return list(kept.values())


def _divide(
    pictures: list[Labelled], shares: dict[str, float], seeds: dict[str, int]
) -> dict[str, list[Labelled]]:
    """Take a share of every class for each named part; the rest is `train`.

    A picture's place follows from its contents and the part's seed, so that adding or renaming
    files moves as few others as can be. A picture that lies in several classes stays in `train`,
    where it cannot leak.
    """
    parts: dict[str, list[Labelled]] = {name: [] for name in ("train", *shares)}
    by_class: dict[str, list[Labelled]] = defaultdict(list)
    copies = Counter(picture.item.content for picture in pictures)
    for picture in pictures:
        if copies[picture.item.content] > 1:
            parts["train"].append(picture)
        else:
            by_class[picture.label].append(picture)
    for label, members in by_class.items():
        need = len(shares) + 1
        if len(members) < need:
            raise DataError(
                f"class {label} must have at least {need} different pictures to be split into "
                f"{', '.join(parts)}, but has {len(members)}. Add pictures or remove the class."
            )
        rest = members
        for k, (name, share) in enumerate(shares.items()):
            seed = seeds[name]
            rest = sorted(rest, key=lambda p: _lot(p.item.content, seed))
            left = len(shares) - k  # every later part and train get one at least
            n = min(max(1, round(share * len(members))), len(rest) - left)
            parts[name] += rest[:n]
            rest = rest[n:]
        parts["train"] += rest
    return {name: sorted(part, key=lambda p: p.item.content) for name, part in parts.items()}


def _check_classes(pictures: list[Labelled], classes: Iterable[str]) -> None:
    absent = sorted(set(classes) - {p.label for p in pictures})
    if absent:
        raise DataError(
            "every class must have pictures to train on that can be decoded, but there are none "
            f"of {', '.join(absent)}. Add some or remove the class."
        )


def _lot(content: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {content}".encode()).digest()


def _limited(pictures: list[Labelled], limit: int | None) -> list[Labelled]:
    """Keep the same share of every class, `limit` in all or a few less, two of each at least."""
    if limit is None or len(pictures) <= limit:
        return pictures
    left = Counter(p.label for p in pictures)
    quota = {label: max(2, n * limit // len(pictures)) for label, n in left.items()}
    kept = []
    for picture in pictures:
        if quota[picture.label] > 0:
            quota[picture.label] -= 1
            kept.append(picture)
    return kept


def _warn_of_copies(parts: dict[str, list[Labelled]], notes: list[str]) -> None:
    where: dict[str, dict[str, str]] = defaultdict(dict)
    labels: dict[str, set[str]] = defaultdict(set)
    for name, part in parts.items():
        for picture in part:
            where[picture.item.content].setdefault(name, picture.item.path)
            labels[picture.item.content].add(picture.label)
    shared = [list(places.values()) for places in where.values() if len(places) > 1]
    if shared:
        notes.append(
            f"{len(shared)} pictures lie in more than one split, so their scores are too good "
            f"(leakage): {' = '.join(shared[0])}"
            f"{f' and {len(shared) - 1} more' if len(shared) > 1 else ''}. Remove the copies."
        )
    torn = sum(len(found) > 1 for found in labels.values())
    if torn:
        notes.append(f"{torn} pictures lie in more than one class; check their labels.")


def _warn_of_few(
    parts: dict[str, list[Labelled]], classes: Iterable[str], notes: list[str]
) -> None:
    counts = Counter(p.label for p in parts["train"])
    few = [f"{label} ({counts[label]})" for label in classes if counts[label] < _FEW]
    if few:
        notes.append(f"few training pictures: {', '.join(few[:_TOLD])}.")


def _fingerprint(parts: dict[str, list[Labelled]]) -> str:
    lines = sorted(
        f"{name} {p.label} {p.item.content}" for name, part in parts.items() for p in part
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
