"""What names a cache entry: texts that are the same in every process that would compute the same.

A key that left out something that decides bits would serve wrong numbers, so keys hold contents
(of pictures as decoded, of frozen weights), never paths or times alone, and every text on disk is
followed by the libraries, the processor and this program's own source.
"""

import dataclasses
import functools
import hashlib
import os
import platform
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from core.config import TrainConfig
from core.data.splits import ImageData, Split
from core.models.builder import Network
from core.models.sources import library_versions
from core.models.weights import fingerprint

# Variables by which the mathematical libraries are told to compute differently.
_DECIDING = ("ATEN_", "CUBLASLT_", "CUDNN_", "DNNL_", "MKL_", "NVIDIA_", "ONEDNN_", "TORCH_CUDNN_")
# Lines of /proc/cpuinfo by which libraries choose their kernels and block sizes.
_CPU_LINES = ("model name", "flags", "Features", "cache size")


@dataclass(frozen=True, slots=True)
class ContentKey:
    """A key that names contents; entries under such keys alone go to disk.

    Attributes:
        text: The same in every process that would compute the same.
    """

    text: str

    @classmethod
    def of(cls, *parts: object) -> Self:
        """Make a key of numbers, texts, None, and tuples and dataclasses of them.

        Raises:
            TypeError: A part is something else, whose text would differ between processes.
        """
        return cls(_text(parts))


def _text(part: object) -> str:
    if part is None or type(part) in (bool, int, float, str):
        return repr(part)
    if isinstance(part, ContentKey):
        return part.text
    if isinstance(part, tuple):
        return f"({','.join(map(_text, part))})"
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        named = [f"{f.name}={_text(getattr(part, f.name))}" for f in dataclasses.fields(part)]
        return f"{type(part).__name__}({','.join(named)})"
    raise TypeError(f"a key must hold numbers and texts, but got a {type(part).__name__}.")


def _source_digest() -> str:
    """Digest this package's source: whatever makes views or cuts networks is somewhere in it."""
    source = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        source.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return source.hexdigest()[:32]


# Taken when the source is loaded, since it may be replaced while a study runs.
_SOURCE = _source_digest()


@functools.cache
def surroundings() -> str:
    """Tell what decides bits beside a key: libraries, processor, variables, our own source."""
    variables = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(_DECIDING))
    return _text(
        (
            *((name, str(version)) for name, version in library_versions().items()),
            ("numpy", np.__version__),
            ("capability", torch.backends.cpu.get_cpu_capability()),
            ("processor", _digest(_processor())),
            # PyTorch leaves it without types.
            ("mkldnn", torch.backends.mkldnn.is_available()),  # type: ignore[no-untyped-call]
            ("variables", *variables),
            ("source", _SOURCE),
        )
    )


def _processor() -> str:
    """Describe the processor; the first of several, which are alike."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = [line for line in lines if line.startswith(_CPU_LINES)]
    return "\n".join((platform.machine(), *kept))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def pictures_key(data: ImageData, split: Split) -> Hashable:
    """Name a split's pictures as they were decoded, in their order, with their labels."""
    store = split.store
    found = hashlib.sha256()
    for part in (store.checksums[split.indices], store.sizes[split.indices], split.labels):
        found.update(np.ascontiguousarray(part).data)
    return (data.fingerprint, found.hexdigest())


def prefix_key(config: TrainConfig, built: Network, depth: int | None = None) -> Hashable:
    """Name what a network's frozen layers make of views.

    Args:
        config: The run.
        built: Its network; layers frozen at `depth` are as they were built.
        depth: The freeze level; None for the run's own.
    """
    level = config.freeze_depth if depth is None else depth
    origin = _origin(config, built)
    source = (origin, config.backbone, built.preprocessing.image_size)
    known = _known_digests.setdefault(source, {}) if origin is not None else {}
    return (
        "frozen",
        config.backbone,
        level,
        _frozen_digest(built, level, known),
        built.preprocessing,
        config.channels_last,
        torch.get_num_threads(),
    )


_known_digests: dict[Hashable, dict[str, str]] = {}
"""Digests of frozen tensors by where the network came from and the tensor's name.

Hashing takes 12 ms for 14 MB (measured), which would be a third of a warm head-only trial.
"""


def _origin(config: TrainConfig, built: Network) -> Hashable:
    """Name where a network's values come from; None where only they themselves tell."""
    if built.weights == "none":
        head = built.model.get_parameter(f"{built.head[0]}.weight")
        return ("seed", config.seed, len(head))  # a wider head may draw before the trunk does
    return fingerprint(config.backbone, built.weights)


def _frozen_digest(built: Network, depth: int, known: dict[str, str]) -> str:
    """Return the SHA-256 of all tensors that a freeze level keeps as they are."""
    found = hashlib.sha256()
    for name, tensor in sorted(_frozen_tensors(built, depth), key=lambda pair: pair[0]):
        if name not in known:
            known[name] = _tensor_digest(tensor)
        found.update(f"{name} {known[name]} ".encode())
    return found.hexdigest()


def _tensor_digest(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{values.dtype} {tuple(values.shape)}".encode())
    found.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _frozen_tensors(built: Network, depth: int) -> Iterator[tuple[str, Tensor]]:
    stages = built.stages
    modules = tuple(f"{name}." for name in stages.eval_modules[depth])
    for name, parameter in built.model.named_parameters():
        if stages.stage_of.get(name, depth) < depth:
            yield name, parameter
    for name, buffer in built.model.named_buffers():
        if name.startswith(modules):
            yield name, buffer
