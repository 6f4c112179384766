"""Arrays that runs share: memory-mapped `.npy` files in one folder, under one budget of bytes."""

import errno
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PARTIAL = "frostline-partial-"
"""How the names of files and folders begin that are not whole yet."""
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_log = logging.getLogger(__name__)
# An array used within the hour is likely to be read again by the study that made it, and views
# that do not fit would evict each other in a circle. Assumption.
_IN_USE_S = 3600.0
# A partial array this old was left by a killed process: writing one takes minutes. Assumption.
_ABANDONED_S = 24 * 3600.0


class ArrayCache:
    """Arrays by key, one file each; what does not fit the budget is temporary.

    Several processes may use one folder. Its files take `budget` bytes together at most; 0 makes
    every array temporary. `hits` and `misses` count arrays that were there and that were made,
    `saved_s` the seconds that making the former had taken.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder = folder
        self.budget = budget
        self.hits, self.misses, self.saved_s = 0, 0, 0.0
        prune(folder.glob(f"{PARTIAL}*"), 0, unused_s=_ABANDONED_S)

    def get(self, key: str, rows: int, make: Callable[[], Iterator[Tensor]]) -> Tensor | None:
        """Return the array of a key, (rows, ...); None where the disk is full.

        The key names everything that decides the array's bits. `make` gives its rows in order, in
        chunks on the CPU, where it is not there. Writing into the array changes no file.
        """
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        for path in sorted(self.folder.glob(f"{name}.*.npy")):
            try:
                array = _mapped(path, rows)
                os.utime(path)
            except (OSError, ValueError):  # gone or damaged
                _remove(path)
                continue
            self.hits += 1
            self.saved_s += int(path.name.split(".")[1]) / 1000
            return array
        self.misses += 1
        try:
            return self._write(name, rows, make)
        except OSError as err:
            if err.errno not in FULL_DISK:
                raise
            _log.warning("%s is full: frozen outputs are computed at each step.", self.folder)
            return None

    def _write(self, name: str, rows: int, make: Callable[[], Iterator[Tensor]]) -> Tensor:
        begin = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=PARTIAL, dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as file:
                size = 0
                for chunk in make():
                    # NumPy knows no bf16.
                    is_bf16 = chunk.dtype is torch.bfloat16
                    values = (chunk.view(torch.int16) if is_bf16 else chunk).numpy()
                    if not size:
                        shape = (rows, *values.shape[1:])
                        descr = np.lib.format.dtype_to_descr(values.dtype)
                        header = {"descr": descr, "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(file, header)
                        size = int(np.prod(shape)) * values.itemsize
                        left = self.budget - size
                        arrays = self.folder.glob("*.npy")
                        is_kept = left >= 0 and prune(arrays, left, unused_s=_IN_USE_S) <= left
                    file.write(np.ascontiguousarray(values).data)
                file.flush()
                if is_kept:
                    os.fsync(file.fileno())
            array = _mapped(Path(partial), rows)
            if is_kept:
                spent_ms = round(1000 * (time.perf_counter() - begin))
                os.replace(partial, self.folder / f"{name}.{spent_ms}.npy")
            return array
        finally:  # a temporary array lives on in its map
            Path(partial).unlink(missing_ok=True)


def _mapped(path: Path, rows: int) -> Tensor:
    values: Any = np.load(path, mmap_mode="c")  # copy on write: nobody can damage the file
    if len(values) != rows or path.stat().st_size != values.offset + values.nbytes:
        raise ValueError(f"{path} is not whole")
    array = torch.from_numpy(values)
    return array.view(torch.bfloat16) if array.dtype is torch.int16 else array


def prune(paths: Iterable[Path], budget: int, *, unused_s: float) -> int:
    """Remove files or folders, the least recently used first, until the rest fits the budget.

    What was used, by its time of modification, within `unused_s` stays, whatever it takes. Returns
    the bytes of what stays.
    """
    sizes = {path: size_bytes(path) for path in paths}
    taken = sum(sizes.values())
    for path in sorted(sizes, key=_used_at):
        if taken <= budget:
            break
        # Looked up again: another process may have used it by now.
        if time.time() - _used_at(path) >= unused_s and _remove(path):
            taken -= sizes[path]
    return taken


def size_bytes(path: Path) -> int:
    """Return what a file takes, or all files of a folder; 0 where it is gone."""
    try:
        if path.is_dir():
            return sum(inner.stat().st_size for inner in path.iterdir())
        return path.stat().st_size
    except OSError:
        return 0


def _used_at(path: Path) -> float:
    """Return when something was last used, seconds since 1970; now, where it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _remove(path: Path) -> bool:
    """Remove a file or folder, at once for whoever looks for it; False where that is refused."""
    try:
        if not path.is_dir():
            path.unlink()
            return True
        aside = path.with_name(f"{PARTIAL}{path.name}-{time.time_ns()}")
        os.replace(path, aside)
    except OSError:
        return not path.exists()  # another process was as fast
    shutil.rmtree(aside, ignore_errors=True)
    return True
