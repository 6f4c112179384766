"""Pictures in folders: one folder a class, alone or inside train, val and test."""

import difflib
import os
from collections import Counter
from functools import partial
from pathlib import Path

from core.labelled import Found, Labelled, hash_files
from core.pictures import DataError, Item

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
    + (".ppm", ".pgm", ".pbm", ".pnm", ".avif")
)


def check_folder(root: Path) -> None:
    """Refuse a data folder that is missing or holds no folders.

    Raises:
        DataError: It is missing, a file, or has no folders.
    """
    if not root.exists():
        raise DataError(_missing(root))
    if not root.is_dir():
        raise DataError(f"data must be a folder of class folders, but {root} is a file.")
    if not _subfolders(root):
        raise DataError(
            f"data folder {root} must hold one folder per class (or train, val, test with them "
            "inside), but it has no folders."
        )


def find_in_folder(root: Path) -> Found:
    """List the pictures of a folder of classes, or of splits with classes inside.

    Raises:
        DataError: It is missing or empty, or its folders do not agree.
    """
    check_folder(root)
    inner = _subfolders(root)
    splits = {folder: SPLITS[folder.name.lower()] for folder in inner if _is_split(folder)}
    if "train" in splits.values():
        return _split_folders(root, splits, inner)
    if len(splits) == len(inner):
        raise DataError(
            f"data folder {root} must have a train folder beside "
            f"{', '.join(folder.name for folder in splits)}, but it has none."
        )
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
        loose = sum(p.is_file() and p.suffix.lower() in _EXTENSIONS for p in folder.iterdir())
        if loose:
            notes.append(f"{folder}: {loose} pictures lie beside the class folders, not read.")
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
    hashes = hash_files([path for path, _, _ in files])
    pictures = [
        Labelled(Item(digest, _shown(path, root), partial(Path, path)), label, split)
        for (path, label, split), digest in zip(files, hashes, strict=True)
    ]
    return Found(pictures, classes, notes)


def _shown(path: Path, root: Path) -> str:
    """Name a picture for reports; bytes of its name that are no UTF-8 become question marks."""
    name = path.relative_to(root).as_posix()
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _pictures_in(folder: Path, ignored: Counter[str]) -> list[Path]:
    found = []
    _check_readable(folder)
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_dir():
            _check_readable(path)
        elif path.suffix.lower() in _EXTENSIONS:
            found.append(path)
        else:
            ignored[path.suffix.lower()] += 1
    return found


def _check_readable(folder: Path) -> None:
    """Refuse a folder whose files would be passed over in silence.

    Raises:
        DataError: Its files cannot be listed or opened.
    """
    if not os.access(folder, os.R_OK | os.X_OK):
        raise DataError(f"folder {folder} must be readable, but permission is denied.")
