"""From a backbone's name to a network with a new head, ready to be fine-tuned."""

import functools
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import nn

from core import weights as weights_
from core.backbones import Network, check_backbone, create, preprocessing, scaled
from core.config import MAX_FREEZE_DEPTH, HeadInit, Preprocessing
from core.device import keep_freed_memory
from core.head import init_head
from core.network_pool import NetworkPool, Start
from core.stages import Stages, find_stages

_SOURCE_CLASSES = 1000
# A dozen networks of a common size (ResNet-50 takes 102 MB); a ViT-L is built each time.
_POOL = NetworkPool(512 << 20)


@dataclass(frozen=True, slots=True)
class Built:
    """A network ready for training.

    Attributes:
        model: The network, on the CPU, its original parameter names kept.
        head: Names of the head's layers.
        preprocessing: How pictures become its input.
        stages: Its freeze levels.
        weights: Where its weights came from, resolved (`packaged`, `imagenet`, a path, `none`).
        n_source_rows: Head rows that started from the source classifier.
    """

    model: nn.Module
    head: tuple[str, ...]
    preprocessing: Preprocessing
    stages: Stages
    weights: str
    n_source_rows: int


def input_of(
    backbone: str, weights: str, image_size: int | None, normalize: str = "weights"
) -> Preprocessing:
    """Return a run's preprocessing without building the network.

    Raises:
        BackboneError: Unknown backbone or weights tag.
    """
    check_backbone(backbone)
    source = weights_.resolve(backbone, weights)
    tag = source.partition(":")[2] if source.startswith("imagenet:") else "DEFAULT"
    shown = preprocessing(backbone, tag)
    package = weights_.PACKAGES.get(backbone)
    if package is not None and source == "packaged":
        shown = replace(
            shown, mean=package.mean, std=package.std, interpolation=package.interpolation
        )
    return scaled(shown, image_size, normalize)


def build(
    backbone: str,
    weights: str,
    classes: tuple[str, ...],
    *,
    seed: int,
    image_size: int | None = None,
    normalize: str = "weights",
    head_init: HeadInit = "default",
    channels_last: bool = False,
) -> Built:
    """Build a network, load its weights, and give it a new head.

    Args:
        backbone: torchvision name or `timm:NAME`.
        weights: Source of the weights, as in `TrainConfig.weights`.
        classes: Target classes.
        seed: Seed of the head, and of the whole network when it starts from scratch.
        image_size: Side of the input; None for the weights' own.
        normalize: `weights` or `none`.
        head_init: How the head starts.
        channels_last: Lay its weights out channels last; the values are the same.

    Raises:
        BackboneError: Unknown backbone, or it cannot take that input size.
        WeightsError: Weights are missing or do not fit.
    """
    keep_freed_memory()  # a process that builds a network is about to compute with it
    shown = input_of(backbone, weights, image_size, normalize)
    source = weights_.resolve(backbone, weights)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    start = _start(backbone, source, shown.image_size, len(classes), seed, layout)
    network = start.network
    copied = init_head(network, head_init, seed, classes=classes, source=start.source_head)
    stages = _stages(backbone, shown.image_size, source != "none")
    return Built(network.model, network.head, shown, stages, source, copied)


def _start(
    backbone: str,
    source: str,
    image_size: int,
    n_classes: int,
    seed: int,
    layout: torch.memory_format,
) -> Start:
    """Return a network as it starts, its head apart: a copy where one like it was built before."""
    settings = (backbone, source, image_size, n_classes, layout)
    key = _origin(backbone, source, seed)
    if key is not None and (found := _POOL.take((key, *settings))) is not None:
        return found
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = create(backbone, image_size, n_classes, is_pretrained=source != "none")
    head = _load(network, backbone, source, image_size) if source != "none" else None
    network.model.to(memory_format=layout)
    start = Start(network, head)
    key = _origin(backbone, source, seed)  # again, since weights may have been downloaded
    if key is not None:
        _POOL.keep((key, *settings), start)
    return start


def _origin(backbone: str, source: str, seed: int) -> Hashable | None:
    """Name what a network's values come from; None where that is not there yet."""
    # Only what starts from scratch depends on the seed: a new head does, too, but it comes later.
    return seed if source == "none" else weights_.fingerprint(backbone, source)


def _load(network: Network, backbone: str, source: str, image_size: int) -> weights_.State:
    """Load a network's weights, but for its head; return the source's head."""
    state = weights_.match_names(
        network, weights_.read_state(backbone, source, image_size), source
    )
    own = network.model.state_dict()
    heads = tuple(f"{name}." for name in network.head)
    kept = {k: own[k] for k in own if k.startswith(heads)}
    weights_.load(network.model, {**state, **kept})
    return {k: v for k, v in state.items() if k.startswith(heads)}


@functools.lru_cache(maxsize=64)
def _stages(backbone: str, image_size: int, is_pretrained: bool) -> Stages:
    """Trace a backbone once; stages hold names only, so any weights share them."""
    with torch.random.fork_rng(devices=[]):
        network = create(backbone, image_size, _SOURCE_CLASSES, is_pretrained=is_pretrained)
    return find_stages(network.model, network.head, image_size)


def count_parameters(
    backbone: str, weights: str, image_size: int | None, depth: int, n_classes: int
) -> tuple[int, int]:
    """Return how many scalars a freeze level trains, and how many the network has."""
    shown = input_of(backbone, weights, image_size)
    is_pretrained = weights_.resolve(backbone, weights) != "none"
    sizes = list(_stages(backbone, shown.image_size, is_pretrained).sizes)
    # The stages were measured with the source's classes; a head's size goes with its classes.
    sizes[MAX_FREEZE_DEPTH] = sizes[MAX_FREEZE_DEPTH] * n_classes // _SOURCE_CLASSES
    return sum(sizes[depth : MAX_FREEZE_DEPTH + 1]), sum(sizes)


def stage_flops(backbone: str, weights: str, image_size: int | None) -> tuple[int, ...]:
    """Return the forward FLOPs of one picture in each stage, the head's (1,000 classes) last.

    Args:
        backbone: torchvision name or `timm:NAME`.
        weights: Source of the weights, as in `TrainConfig.weights`; none are read.
        image_size: Side of the input, pixels; None for the weights' own.

    Raises:
        BackboneError: Unknown backbone.
        StagesError: It cannot be divided into freeze levels.
    """
    side = input_of(backbone, weights, image_size).image_size
    is_pretrained = weights_.resolve(backbone, weights) != "none"
    return _stages(backbone, side, is_pretrained).flops


def stages_of(backbone: str, image_size: int | None = None) -> tuple[nn.Module, Stages]:
    """Return a randomly initialised backbone with its stages, for showing them.

    Raises:
        BackboneError: Unknown backbone.
        StagesError: It cannot be divided into freeze levels.
    """
    shown = input_of(backbone, "auto", image_size)
    network = create(backbone, shown.image_size, _SOURCE_CLASSES, is_pretrained=False)
    return network.model, _stages(backbone, shown.image_size, False)
