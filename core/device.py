"""The device a run computes on: choice, precision, determinism and memory."""

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.config import Amp

# cuBLAS reads it when its handle is made; without it its sums may change their order.
_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault(*_WORKSPACE)  # read once, when the first kernel runs
# mallopt's names for them, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_OWN_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
# Blocks up to this size are taken from the heap, and so much that is free at its end is kept.
_LARGEST_BLOCK, _KEPT_FREE = 1 << 30, (1 << 31) - 1


class DeviceError(ValueError):
    """The named device is not there."""


def choose_device(name: str) -> torch.device:
    """Return the device by name, or raise `DeviceError`; `auto` takes cuda, mps, cpu."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as err:
        raise DeviceError(
            f"device must be one that PyTorch finds here, but got device={name!r} "
            f"({str(err).splitlines()[0]}). Use auto or cpu."
        ) from err
    return device


def describe_device(device: torch.device) -> str:
    """Return the device's name for the record, such as `cuda: NVIDIA H200`."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return device.type


def kernels_of(device: torch.device) -> tuple[object, ...]:
    """Name what decides a device's numbers; a processor's are in `core.keys.surroundings`."""
    if device.type != "cuda":
        return (device.type,)
    cudnn: Any = torch.backends.cudnn  # it has no types
    return (
        device.type,
        torch.cuda.get_device_name(device),
        torch.version.cuda,
        cudnn.version(),
        cudnn.conv.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
        os.environ.get(*_WORKSPACE),
    )


def amp_dtype(amp: Amp, device: torch.device) -> torch.dtype | None:
    """Return the type of mixed precision, or None for float32.

    `auto` leaves a CPU in float32: there bf16's backward pass costs more than it saves (measured
    on an AMD EPYC with AVX-512 bf16).
    """
    if amp == "off" or (amp == "auto" and device.type == "cpu"):
        return None
    if amp == "fp16":
        return torch.float16
    # An older GPU only emulates bf16, slowly.
    if amp == "bf16" or device.type != "cuda" or torch.cuda.is_bf16_supported(False):
        return torch.bfloat16
    return torch.float16


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Make the device's kernels give the same numbers again, inside the block."""
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before = (cudnn.deterministic, cudnn.benchmark)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        # The backward passes of the other attention kernels add up in any order; PyTorch has
        # them deterministic only where every other operation must be, too.
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's generators inside the block, and leave them as they were after it."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory of the GPU in use so far, or what this process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def in_parts(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Return `forward` of inputs, (N, ...), in halves as often as memory runs out."""
    try:
        return forward(inputs)
    except torch.OutOfMemoryError:
        if len(inputs) == 1:
            raise
    # Not inside `except`: what the failed pass holds is free only now.
    return torch.cat([in_parts(forward, part) for part in inputs.chunk(2)])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked, so that a clock is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor, instead of giving it back at once.

    By default the kernel clears every page of each large activation: up to half of a training
    step's time on a CPU, for 9 to 16 % less memory (measured on EfficientNet-Lite0 at 224 px).
    Nothing is done where the allocator is another one, or the user set it.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _OWN_SETTINGS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK):
        mallopt(_TRIM_THRESHOLD, _KEPT_FREE)
