"""From a backbone's name to a network with a new head, ready to be fine-tuned."""

import functools
from dataclasses import dataclass, replace

import torch
from torch import nn

from core import weights as weights_
from core.backbones import check_backbone, create, preprocessing, scaled
from core.config import MAX_FREEZE_DEPTH, HeadInit, Preprocessing
from core.head import init_head
from core.stages import Stages, find_stages

_SOURCE_CLASSES = 1000


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

    Raises:
        BackboneError: Unknown backbone, or it cannot take that input size.
        WeightsError: Weights are missing or do not fit.
    """
    shown = input_of(backbone, weights, image_size, normalize)
    source = weights_.resolve(backbone, weights)
    is_pretrained = source != "none"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = create(backbone, shown.image_size, len(classes), is_pretrained=is_pretrained)
    source_head = None
    if is_pretrained:
        state = weights_.match_names(
            network,
            weights_.read_state(backbone, source, shown.image_size),
            source,
        )
        own = network.model.state_dict()
        heads = tuple(f"{name}." for name in network.head)
        source_head = {k: v for k, v in state.items() if k.startswith(heads)}
        kept = {k: own[k] for k in own if k.startswith(heads)}
        weights_.load(network.model, {**state, **kept})
    copied = init_head(network, head_init, seed, classes=classes, source=source_head)
    stages = _stages(backbone, shown.image_size, is_pretrained)
    return Built(network.model, network.head, shown, stages, source, copied)


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


def stages_of(backbone: str, image_size: int | None = None) -> tuple[nn.Module, Stages]:
    """Return a randomly initialised backbone with its stages, for showing them.

    Raises:
        BackboneError: Unknown backbone.
        StagesError: It cannot be divided into freeze levels.
    """
    shown = input_of(backbone, "auto", image_size)
    network = create(backbone, shown.image_size, _SOURCE_CLASSES, is_pretrained=False)
    return network.model, _stages(backbone, shown.image_size, False)
