"""The new classifier: its layers, and how they start."""

import torch
from torch import Tensor, nn

from core.backbones import Network, head_layers, imagenet_classes
from core.config import HeadInit


def init_head(
    network: Network,
    how: HeadInit,
    seed: int,
    *,
    classes: tuple[str, ...] = (),
    source: dict[str, Tensor] | None = None,
) -> int:
    """Initialise the head's layers in place, from the seed alone.

    Args:
        network: Network whose head has one row a target class.
        how: Initialisation; `source-classes` starts as `default` and then copies rows.
        seed: Seed of the random rows; the global generator is left as it was.
        classes: Target classes, in order.
        source: The source classifier's tensors by their full names; None if there is none.

    Returns:
        How many rows were copied from the source classifier.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _, layer in head_layers(network):
            _reset(layer, how)
    if how != "source-classes" or not source:
        return 0
    return _copy_rows(network, classes, source)


def _reset(layer: nn.Module, how: HeadInit) -> None:
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    layer.reset_parameters()
    if how == "xavier":
        nn.init.xavier_uniform_(layer.weight)
    elif how == "zero":
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _copy_rows(network: Network, classes: tuple[str, ...], source: dict[str, Tensor]) -> int:
    rows = matching_rows(classes, imagenet_classes())
    for name, layer in head_layers(network):
        for key in ("weight", "bias"):
            tensor = source.get(f"{name}.{key}")
            if tensor is None or tensor.shape[0] != len(imagenet_classes()):
                return 0
            with torch.no_grad():
                for target, origin in rows.items():
                    getattr(layer, key)[target] = tensor[origin]
    return len(rows)


def matching_rows(classes: tuple[str, ...], source: tuple[str, ...]) -> dict[int, int]:
    """Map target classes to source classes of the same name.

    Case, spaces, hyphens and underscores do not count: `Hot_Dog` is `hotdog`.
    """
    known = {_plain(name): i for i, name in reversed(list(enumerate(source)))}
    found = {i: known.get(_plain(name)) for i, name in enumerate(classes)}
    return {target: origin for target, origin in found.items() if origin is not None}


def _plain(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())
