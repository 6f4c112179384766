"""Is anything lost when a disk is full? `python benchmarks/full_disks.py` (root, Linux).

A study runs on ten small tmpfs mounts, which hold its database, its output, its cache, or all of
them, and are too small in different ways. The run must end with a message and status 1 or 2, then,
on a larger disk, the same command must finish it, with the figures of an undisturbed run. (Where
the database itself cannot be written, the process cannot sign off, and its trial runs again under
another number, as after a kill.)
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from study.record.record import Record

_SETTINGS = [
    *("--trials", "4", "--name", "s", "--cache", "40MB", "--set", "data.limit=200"),
    *("--set", "train.backbone=timm:test_resnet", "--set", "train.weights=none"),
    *("--set", "train.image_size=32", "--set", "train.epochs=3", "--set", "train.device=cpu"),
    *("--set", "search.pruner=none", "--set", "train.head_solver=sgd"),
    *("--set", "search.recipes=false"),
]
_SPACE = "[space]\nfreeze_depth = {low = 0, high = 5}\nbase_lr = {low = 1e-3, high = 1e-2}\n"
_KINDS = ("database", "output", "cache", "all")
# Kilobytes; an empty database takes about 400, a checkpoint 2,000, the images 22,000.
_DISKS = [("database", kb) for kb in (60, 300, 460)] + [("output", kb) for kb in (0, 900, 3000)]
_DISKS += [("cache", kb) for kb in (500, 15000)] + [("all", kb) for kb in (20000, 24500)]


def _study(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "study", *arguments]
    return subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=300)


def _figures(home: Path, storage: str) -> list[tuple[object, ...]]:
    with Record(str(home / storage)) as record:
        rows = record.trials(record.study("s").id)
        return [(row.params, row.value, row.score) for row in rows if row.state == "complete"]


def _run(home: Path, disk: Path, kind: str) -> tuple[list[str], str]:
    places = {k: disk / k if kind in (k, "all") else home / k for k in _KINDS[:3]}
    for place in places.values():
        place.mkdir(parents=True, exist_ok=True)
    (home / "study.toml").write_text(_SPACE)
    storage = str(places["database"] / "s.db")
    run = ["run", "--config", "study.toml", "--storage", storage, *_SETTINGS]
    run += ["--set", f"study.output={places['output']}"]
    return [*run, "--set", f"data.cache_dir={places['cache']}"], storage


def main() -> int:
    """Run all disks; return 1 where one lost something."""
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "plain")
        plain.mkdir()
        command, storage = _run(plain, plain, "none")
        longer = [*command[: command.index("4")], "8", *command[command.index("4") + 1 :]]
        _study(plain, *longer).check_returncode()
        expected = _figures(plain, storage)  # with those of a trial that another number drew
        for kind, size in _DISKS:
            home = Path(folder, f"{kind}-{size}")
            disk = home / "disk"
            disk.mkdir(parents=True)
            mount = ["mount", "-t", "tmpfs", "-o", f"size={max(size, 4)}k", "tmpfs", str(disk)]
            subprocess.run(mount, check=True)
            try:
                command, storage = _run(home, disk, kind)
                if size == 0:  # full from the start
                    (disk / "filler").write_bytes(b"\0" * os.statvfs(disk).f_bavail * 4096)
                ended = _study(home, *command)
                subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
                again = _study(home, *command)
                found = _figures(home, storage)
            finally:
                subprocess.run(["umount", str(disk)], check=True)
            said = ended.stderr.strip().splitlines()[-1:] or [""]
            is_right = "Traceback" not in ended.stderr + again.stderr
            is_right &= len(found) == 4 and all(row in expected for row in found)
            is_right &= ended.returncode in (0, 1, 2) and again.returncode == 0
            faults += not is_right
            print(
                f"{kind} {size} kB: status {ended.returncode}, then {again.returncode}; ", end=""
            )
            print("all figures equal" if is_right else f"FAULT {found}", f"({said[0][:150]})")
            sys.stdout.flush()
    print(f"{len(_DISKS)} disks, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
