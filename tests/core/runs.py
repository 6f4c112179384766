"""How tests train: a whole run, or one in pieces, and what is compared of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from core.config import TrainConfig
from core.data.splits import ImageData
from core.fit import fit
from core.metrics import Interrupted
from support import figures

Figures = list[dict[str, Any]]
Weights = dict[str, Tensor]


def train(config: TrainConfig, data: ImageData, **options: Any) -> Figures:
    """Return the figures of each epoch."""
    return [figures(metrics) for metrics in fit(config, data, **options)]


def train_in_pieces(
    config: TrainConfig, data: ImageData, state_file: Path, every: int, **options: Any
) -> Figures:
    """Stop after every so many steps or chunks, and continue from the state file alone."""
    found = []
    for _ in range(100):
        should_stop = partial(next, iter([False] * every), True)
        epochs = fit(config, data, state_file=state_file, should_stop=should_stop, **options)
        try:
            for metrics in epochs:
                found.append(figures(metrics))
            return found
        except Interrupted:
            assert state_file.is_file()
    raise AssertionError("it never ended")


def weights_of(folder: Path) -> Weights:
    """Return the tensors of a checkpoint."""
    return safetensors.torch.load_file(folder / "model.safetensors")


def are_equal(one: Weights, two: Weights) -> bool:
    """Return whether two networks are equal to the bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@contextmanager
def small_memory(
    most: int, is_phase: Callable[[], bool] = torch.is_grad_enabled
) -> Iterator[list[int]]:
    """Let layers run out of memory by more images in a phase; gives how many each of them saw."""
    seen: list[int] = []

    def refuse(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if is_phase() and isinstance(inputs[0], Tensor):  # not while the network is traced
            seen.append(len(inputs[0]))
            if len(inputs[0]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")

    hook = register_module_forward_pre_hook(refuse)
    try:
        yield seen
    finally:
        hook.remove()
