"""How fast a disk takes cache entries and gives them back: a short measured probe."""

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from core.entry_file import PARTIAL, Stored, Writer

# A tenth of a second for both probes on two busy cores; smaller ones measured delays, not rates.
_PROBE_BYTES = 8 << 20
_PROBES = 2


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast a disk is, bytes per second, with all that an entry's way there and back takes.

    Attributes:
        write: Of writing.
        read: Of reading, checking and handing over, from the disk itself where that can be told
            from the system's own cache.
    """

    write: float
    read: float


def measure_rates(folder: Path) -> Rates:
    """Write a few megabytes and read them back, from the disk where the system lets go of them.

    The better of two, since what else a machine does only makes it slower.

    Args:
        folder: Where; it exists.

    Raises:
        OSError: It cannot be written.
    """
    path = folder / f"{PARTIAL}probe-{os.getpid()}-{threading.get_ident()}"
    try:
        seconds = [_probe(path) for _ in range(_PROBES)]
    finally:
        path.unlink(missing_ok=True)
    write_s, read_s = map(min, zip(*seconds, strict=True))
    return Rates(write=_PROBE_BYTES / write_s, read=_PROBE_BYTES / read_s)


def _probe(path: Path) -> tuple[float, float]:
    """Return the seconds that writing and reading take."""
    batch = (torch.zeros(_PROBE_BYTES, dtype=torch.uint8),)
    begin = time.perf_counter()
    with Writer(path, lambda _: True) as writer:
        writer.append(batch)
        writer.commit("probe", 0.0, is_pooled=False)
    write_s = time.perf_counter() - begin
    _forget(path)
    begin = time.perf_counter()
    (found,) = Stored(path, "probe")[0]
    found.clone()
    return write_s, time.perf_counter() - begin


def _forget(path: Path) -> None:
    """Ask the system to drop its copy of a file, so that it is read from the disk."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
