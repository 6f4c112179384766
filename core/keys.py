"""What decides an array's bits, as one text that is the same in every process.

A key that left out something that decides bits would serve wrong numbers, so keys hold contents
(of images as decoded, of frozen weights), never paths or times alone, and all of them name the
libraries, the processor and Frostline's own source. They are JSON, which refuses an object, whose
text would differ between processes.
"""

import dataclasses
import functools
import hashlib
import json
import os
import platform
from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.config import TrainConfig
from core.data.draws import IntArray
from core.data.image_store import ImageStore
from core.device import kernels_of
from core.models.builder import Network
from core.models.sources import library_versions

# Variables by which the mathematical libraries compute differently.
_DECIDING = ("ATEN_", "CUBLASLT_", "CUDNN_", "DNNL_", "MKL_", "NVIDIA_", "ONEDNN_", "TORCH_CUDNN_")
# Lines of /proc/cpuinfo by which libraries choose their kernels and block sizes.
_CPU_LINES = ("model name", "flags", "Features", "cache size")


def images_key(store: ImageStore, which: IntArray) -> str:
    """Name some images of a store as they were decoded, in this order."""
    content = store.checksums[which].tobytes() + store.sizes[which].tobytes()
    return f"{len(which)} {hashlib.sha256(content).hexdigest()}"


def prefix_key(
    config: TrainConfig,
    network: Network,
    device: torch.device,
    make_prefix: Callable[[], torch.nn.Module],
    layers: tuple[str, ...] = (),
) -> str:
    """Name what a network's frozen layers, as they were built, make of views on a device.

    `layers` are those whose pooled outputs are kept; none for the output of the last one.
    """
    shown, depth = network.preprocessing, config.freeze_depth
    place = (network.built_from, depth)
    if place not in _DIGESTS:
        _DIGESTS[place] = weights_digest(make_prefix().state_dict())
    computed = (config.amp, torch.get_num_threads(), kernels_of(device), surroundings())
    view = dataclasses.astuple(shown)
    return json.dumps((config.backbone, depth, layers, _DIGESTS[place], view, computed))


_DIGESTS: dict[Hashable, str] = {}
"""Digests of frozen weights; hashing 14 MB takes 12 ms, a third of a warm head-only run."""


def weights_digest(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 of tensors with their names, types and shapes."""
    found = hashlib.sha256()
    for name in sorted(state):
        values = state[name].detach().cpu().contiguous()
        found.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
        found.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def source_digest(folder: Path) -> str:
    """Digest all source of a package: what makes views and cuts networks is somewhere in it."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


# Taken when the source is loaded, since it may be replaced while a study runs.
SOURCE = source_digest(Path(__file__).parent)


@functools.cache
def surroundings() -> str:
    """Name what decides bits beside settings: libraries, processor, variables, our source."""
    variables = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(_DECIDING))
    libraries = [(name, str(version)) for name, version in library_versions().items()]
    has_mkldnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    capability = torch.backends.cpu.get_cpu_capability()
    found = (*libraries, np.__version__, capability, has_mkldnn, _processor(), *variables, SOURCE)
    return json.dumps(found)


def _processor() -> str:
    """Describe the processor; the first of several, which are alike."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = [line for line in lines if line.startswith(_CPU_LINES)]
    return "\n".join((platform.machine(), *kept))
