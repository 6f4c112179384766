"""One way to divide images: for splits, folds and whatever else holds some of them out."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from core.data.draws import IntArray
from core.data.sources import DataError


def partition(
    labels: Sequence[Hashable],
    contents: Sequence[str],
    parts: Sequence[float] | int,
    seed: int,
) -> IntArray:
    """Assign images to parts, each class in proportion, by contents and seed alone.

    Images with equal contents go to one part. Neither names nor order matter; a new image moves
    few others between fractions, but any between folds.

    Args:
        labels: Class of each image, (N,).
        contents: Hash of each image's contents, (N,).
        parts: Fractions of each class for the first parts, of which the last takes the rest: every
            part gets at least one of each class, and an image that has several classes is in the
            last. Or the number of folds, equal to within one image of each class.
        seed: Of the order in which images are dealt.

    Returns:
        Part of each image, counted from 0, (N,).

    Raises:
        DataError: A class has fewer different images than there are fractions and a rest.
    """
    labels_of: dict[str, Counter[Hashable]] = defaultdict(Counter)
    for content, label in zip(contents, labels, strict=True):
        labels_of[content][label] += 1
    by_class: dict[Hashable, list[str]] = defaultdict(list)
    for content in sorted(labels_of):
        counts = labels_of[content]
        by_class[min(counts, key=lambda label: (-counts[label], str(label)))].append(content)
    copies = {content: counts.total() for content, counts in labels_of.items()}
    if isinstance(parts, int):
        part_of = _deal(by_class, copies, parts, seed)
    else:
        torn = {content for content, counts in labels_of.items() if len(counts) > 1}
        part_of = dict.fromkeys(torn, len(parts))
        for label, members in by_class.items():
            whole = [content for content in members if content not in torn]
            part_of |= _cut(label, whole, copies, parts, seed)
    return np.array([part_of[content] for content in contents], dtype=np.int64)


def _cut(
    label: Hashable,
    contents: list[str],
    copies: dict[str, int],
    fractions: Sequence[float],
    seed: int,
) -> dict[str, int]:
    """Cut fractions off one class; the part of each of its contents."""
    n_parts = len(fractions) + 1
    if contents and len(contents) < n_parts:
        raise DataError(
            f"class {label} must have at least {n_parts} different images to be split into "
            f"{n_parts} parts, but has {len(contents)}. Add images or remove the class."
        )
    part_of = dict.fromkeys(contents, len(fractions))
    total = sum(copies[content] for content in contents)
    rest = _shuffled(contents, seed)
    for k, fraction in enumerate(fractions):
        ends = np.cumsum([copies[content] for content in rest])
        n = int(np.searchsorted(ends, round(fraction * total))) + 1
        n = min(n, len(rest) - (len(fractions) - k))  # each later part gets one at least
        part_of |= dict.fromkeys(rest[:n], k)
        rest = rest[n:]
    return part_of


def _deal(
    by_class: dict[Hashable, list[str]], copies: dict[str, int], n_folds: int, seed: int
) -> dict[str, int]:
    """Deal each class in turn, every image to the fold that has the fewest of it, then of all."""
    fold_of: dict[str, int] = {}
    filled = [0] * n_folds
    for label in sorted(by_class, key=str):
        of_class = [0] * n_folds
        for content in _shuffled(by_class[label], seed):
            fold = min(range(n_folds), key=lambda f: (of_class[f], filled[f]))
            fold_of[content] = fold
            of_class[fold] += copies[content]
            filled[fold] += copies[content]
    return fold_of


def _shuffled(contents: list[str], seed: int) -> list[str]:
    return sorted(contents, key=lambda c: hashlib.sha256(f"{seed} {c}".encode()).digest())
