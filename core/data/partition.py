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
    seed: int | Sequence[int],
    groups: Sequence[str] | None = None,
) -> IntArray:
    """Assign images to parts, each class in proportion, by contents and seed alone.

    Images with equal contents, or of one group, go to one part. Neither names nor order matter;
    a new image moves few others between fractions, but any between folds.

    Args:
        labels: Class of each image, (N,).
        contents: Hash of each image's contents, (N,).
        parts: Fractions of each class for the first parts, of which the last takes the rest: every
            part gets at least one of each class, and an image that has several classes is in the
            last. Or the number of folds, equal to within one image (or group) of each class.
        seed: The seed; or one per fraction, so that a part can move while those before it stay.
        groups: Group of each image, (N,).

    Returns:
        Part of each image, counted from 0, (N,).

    Raises:
        DataError: A class has fewer different images than there are fractions and a rest.
    """
    unit_of = contents if groups is None else _join(contents, groups)
    members: dict[str, list[int]] = defaultdict(list)
    classes_of: dict[str, set[Hashable]] = defaultdict(set)
    for i, (unit, content, label) in enumerate(zip(unit_of, contents, labels, strict=True)):
        members[unit].append(i)
        classes_of[content].add(label)
    by_class: dict[Hashable, list[str]] = defaultdict(list)
    for unit in sorted(members):
        counts = Counter(labels[i] for i in members[unit])
        by_class[min(counts, key=lambda label: (-counts[label], str(label)))].append(unit)
    sizes = {unit: len(images) for unit, images in members.items()}
    if isinstance(parts, int):
        assert isinstance(seed, int), "folds have one seed"
        part_of = _deal(by_class, sizes, parts, seed)
    else:
        seeds = [seed] * len(parts) if isinstance(seed, int) else seed
        torn = {u for u, c in zip(unit_of, contents, strict=True) if len(classes_of[c]) > 1}
        part_of = dict.fromkeys(torn, len(parts))
        for label, units in by_class.items():
            whole = [unit for unit in units if unit not in torn]
            part_of |= _cut(label, whole, sizes, parts, seeds)
    return np.array([part_of[unit] for unit in unit_of], dtype=np.int64)


def _join(contents: Sequence[str], groups: Sequence[str]) -> list[str]:
    """Return the smallest contents to which equal contents and groups tie each image, (N,)."""
    parent: dict[tuple[int, str], tuple[int, str]] = {}

    def root(node: tuple[int, str]) -> tuple[int, str]:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    for content, group in zip(contents, groups, strict=True):
        low, high = sorted((root((0, content)), root((1, group))))
        parent[high] = low
    return [root((0, content))[1] for content in contents]


def _cut(
    label: Hashable,
    units: list[str],
    sizes: dict[str, int],
    fractions: Sequence[float],
    seeds: Sequence[int],
) -> dict[str, int]:
    """Cut fractions off one class; the part of each of its units."""
    n_parts = len(fractions) + 1
    if units and len(units) < n_parts:
        raise DataError(
            f"class {label} must have at least {n_parts} different images to be split into "
            f"{n_parts} parts, but has {len(units)}. Add images or remove the class."
        )
    part_of = dict.fromkeys(units, len(fractions))
    total = sum(sizes[unit] for unit in units)
    rest = units
    for k, (fraction, seed) in enumerate(zip(fractions, seeds, strict=True)):
        rest = sorted(rest, key=lambda unit: _rank(unit, seed))
        ends = np.cumsum([sizes[unit] for unit in rest])
        n = int(np.searchsorted(ends, round(fraction * total))) + 1
        n = min(n, len(rest) - (len(fractions) - k))  # each later part gets one at least
        part_of |= dict.fromkeys(rest[:n], k)
        rest = rest[n:]
    return part_of


def _deal(
    by_class: dict[Hashable, list[str]], sizes: dict[str, int], n_folds: int, seed: int
) -> dict[str, int]:
    """Deal each class in turn, every unit to the fold that has the fewest of it, then of all."""
    fold_of: dict[str, int] = {}
    filled = [0] * n_folds
    for label in sorted(by_class, key=str):
        of_class = [0] * n_folds
        for unit in sorted(by_class[label], key=lambda unit: _rank(unit, seed)):
            fold = min(range(n_folds), key=lambda f: (of_class[f], filled[f]))
            fold_of[unit] = fold
            of_class[fold] += sizes[unit]
            filled[fold] += sizes[unit]
    return fold_of


def _rank(unit: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {unit}".encode()).digest()
