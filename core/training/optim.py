"""Parameter groups, optimizers, and learning-rate schedules as plain functions of the step."""

import math
from fnmatch import fnmatch

import torch
from torch import nn

from core.config import TrainConfig
from core.models.builder import Network
from core.models.sources import Classifier

# one-cycle as in Smith & Topin 2018 with PyTorch's defaults: up over 30 % of the run from 1/25 of
# the peak, then down to 1e-4 of the start, both along a cosine.
_CYCLE_UP = 0.3
_CYCLE_START = 1 / 25
_CYCLE_END = 1e-4 / 25


def parameter_groups(
    module: nn.Module, network: Network | Classifier, config: TrainConfig
) -> list[dict[str, object]]:
    """Sort the parameters that want a gradient into an optimizer's groups, each with `peak_lr`.

    The module's parameters have the network's own names. The backbone learns at `base_lr`, the
    head at `base_lr * head_lr_mult`. Unless `decay_all`, only weight matrices are decayed: norms,
    biases, tokens, position embeddings, layer scales and what timm itself spares are not.
    """
    heads = tuple(f"{name}." for name in network.head)
    spared: set[str] = getattr(network.model, "no_weight_decay", set)()  # names and patterns
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            # Layer scales, (C, 1, 1), and tokens, (1, 1, C), have more than one dimension, too,
            # but no family of timm or torchvision calls one a weight.
            is_matrix = parameter.ndim >= 2 and "weight" in name.rpartition(".")[2]
            is_decayed = is_matrix and not any(fnmatch(name, pattern) for pattern in spared)
            key = (name.startswith(heads), is_decayed or config.decay_all)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "name": f"{'head' if is_head else 'backbone'}{'' if is_decayed else ', no decay'}",
            "lr": (peak := config.base_lr * (config.head_lr_mult if is_head else 1.0)),
            "peak_lr": peak,
            "weight_decay": config.weight_decay if is_decayed else 0.0,
        }
        for (is_head, is_decayed), parameters in sorted(groups.items())
    ]


def make_optimizer(
    groups: list[dict[str, object]], config: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """Build the optimizer over parameter groups; fused where the device has it."""
    fused = True if device.type == "cuda" else None
    if config.optimizer == "sgd":
        momentum, nesterov = config.momentum, config.nesterov
        return torch.optim.SGD(groups, config.base_lr, momentum, nesterov=nesterov, fused=fused)
    betas = (config.momentum, 0.999)
    return torch.optim.AdamW(groups, lr=config.base_lr, betas=betas, fused=fused)


def lr_factor(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return what share of its peak, in [0, 1], every learning rate is at a step, from 0."""
    total = config.epochs * steps_per_epoch
    if config.schedule == "one-cycle":
        return _one_cycle(step / max(1, total - 1))
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "cosine":
        return _cosine(1.0, 0.0, (step - warmup) / max(1, total - warmup))
    if config.schedule == "step":
        return config.step_gamma ** (step // steps_per_epoch // config.step_epochs)
    return 1.0


def _one_cycle(progress: float) -> float:
    if progress < _CYCLE_UP:
        return _cosine(_CYCLE_START, 1.0, progress / _CYCLE_UP)
    return _cosine(1.0, _CYCLE_END, (progress - _CYCLE_UP) / (1 - _CYCLE_UP))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
