"""What every source of pictures gives: pictures with class, split and a hash of their contents."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core.device import usable_cores
from core.pictures import DataError, Item


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


def hash_files(paths: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file, hexadecimal."""

    def digest(path: Path) -> str:
        try:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as err:
            raise DataError(f"picture {path} cannot be read: {err.strerror or err}.") from err

    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(digest, paths))


def digest_values(values: Any) -> str:
    """Return the SHA-256 of an array's values, hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
