"""From a backbone's name to a network with a new head, ready to be fine-tuned."""

import copy
import functools
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import nn

from core.config import MAX_FREEZE_DEPTH, HeadInit, Preprocessing, TrainConfig
from core.device import keep_freed_memory
from core.models import weights as weights_
from core.models.freeze_stages import Stages, find_stages
from core.models.sources import Classifier, State, create, find_source, imagenet_classes

_SOURCE_CLASSES = 1000


@dataclass(frozen=True, slots=True)
class Network:
    """A network ready for training.

    Attributes:
        model: The network, on the CPU, its original parameter names kept.
        head: Names of the head's layers.
        weights: Where its weights came from, resolved (`packaged`, `imagenet`, a path, `none`).
        built_from: What decided its tensors but those of the head.
        layers: Nodes of its graph whose pooled outputs a solved head sees; none where its own
            head is used.
    """

    model: nn.Module
    head: tuple[str, ...]
    preprocessing: Preprocessing
    stages: Stages
    weights: str
    built_from: Hashable
    layers: tuple[str, ...] = ()


def input_of(
    backbone: str, weights: str, image_size: int | None, normalize: str = "weights"
) -> Preprocessing:
    """Return a run's preprocessing, by keys of `TrainConfig`, or raise `BackboneError`.

    The resize follows the image size in proportion.
    """
    source, name = find_source(backbone)
    weights = weights_.resolve(backbone, weights)
    found = source.preprocessing(name, weights_.imagenet_tag(weights) or "DEFAULT")
    if normalize == "none":
        found = replace(found, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    if image_size is None or image_size == found.image_size:
        return found
    resize = round(image_size * found.resize_size / found.image_size)
    return replace(found, image_size=image_size, resize_size=resize)


def build(config: TrainConfig, classes: tuple[str, ...]) -> Network:
    """Build a run's network (in channels-last layout), load its weights, and give it a new head.

    Raises:
        BackboneError: Unknown backbone, or it cannot take that input size.
        WeightsError: Weights are missing or do not fit.
        StagesError: It cannot be divided into freeze levels.
    """
    keep_freed_memory()  # a process that builds a network is about to compute with it
    backbone, seed = config.backbone, config.seed
    preprocessing = input_of(backbone, config.weights, config.image_size, config.normalize)
    size = preprocessing.image_size
    weights = weights_.resolve(backbone, config.weights)
    is_pretrained = weights != "none"
    # A weights file that was replaced is read again; from scratch, the seed makes the network.
    origin = weights_.fingerprint(backbone, weights) if is_pretrained else seed
    built_from = (backbone, weights, size, len(classes), origin)
    prototype, source_head = _prototype(*built_from)
    network = copy.deepcopy(prototype)
    network.model.to(memory_format=torch.channels_last)
    init_head(network, config.head_init, seed, classes=classes, source=source_head)
    stages = _stages(backbone, size, is_pretrained)
    return Network(network.model, network.head, preprocessing, stages, weights, built_from)


@functools.lru_cache(maxsize=4)  # a ViT-L takes 1.2 GB
def _prototype(
    backbone: str, weights: str, image_size: int, n_classes: int, origin: Hashable
) -> tuple[Classifier, State]:
    """Build a network to take copies from, and return its source's head by the tensors' names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(origin if isinstance(origin, int) else 0)
        network = create(backbone, image_size, n_classes, is_pretrained=weights != "none")
    if weights == "none":
        return network, {}
    state = weights_.read_state(backbone, weights, image_size)
    state = weights_.match_names(network, state, weights)
    heads = tuple(f"{name}." for name in network.head)
    own_head = {k: v for k, v in network.model.state_dict().items() if k.startswith(heads)}
    weights_.load(network.model, {**state, **own_head})
    return network, {k: v for k, v in state.items() if k.startswith(heads)}


def init_head(
    network: Classifier,
    how: HeadInit,
    seed: int,
    *,
    classes: tuple[str, ...] = (),
    source: State | None = None,
) -> None:
    """Initialise the head's layers in place, from the seed alone.

    `source-classes` starts as `default` and then copies the rows of source classes of the same
    names, where `source` has the source classifier's tensors by their full names.
    """
    layers = {name: network.model.get_submodule(name) for name in network.head}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = [part for layer in layers.values() for part in layer.modules()]
        # A norm may come before the linear layer.
        for part in [part for part in parts if isinstance(part, nn.Linear | nn.Conv2d)]:
            part.reset_parameters()
            if how == "xavier":
                nn.init.xavier_uniform_(part.weight)
            elif how == "zero":
                for parameter in part.parameters():
                    nn.init.zeros_(parameter)
    if how != "source-classes" or not source:
        return
    rows = matching_rows(classes, imagenet_classes())
    for name, layer in layers.items():
        for key, values in layer.state_dict().items():  # they share the parameters' memory
            origin = source.get(f"{name}.{key}")
            if origin is not None and len(origin) == len(imagenet_classes()):
                values[list(rows)] = origin[list(rows.values())].to(values.dtype)


def matching_rows(classes: tuple[str, ...], source: tuple[str, ...]) -> dict[int, int]:
    """Map target classes to the first source classes of the same name.

    Case, spaces, hyphens and underscores do not count: `Hot_Dog` is `hotdog`.
    """
    wanted, known = (
        ["".join(c for c in name.casefold() if c.isalnum()) for name in names]
        for names in (classes, source)
    )
    return {i: known.index(name) for i, name in enumerate(wanted) if name in known}


@functools.lru_cache(maxsize=64)
def _stages(backbone: str, image_size: int, is_pretrained: bool) -> Stages:
    """Trace a backbone once; stages hold names only, so any weights share them."""
    with torch.random.fork_rng(devices=[]):
        network = create(backbone, image_size, _SOURCE_CLASSES, is_pretrained=is_pretrained)
    return find_stages(network.model, network.head, image_size)


def count_parameters(config: TrainConfig, n_classes: int) -> tuple[int, int]:
    """Return how many scalars a run trains, and how many its network has."""
    backbone, weights, depth = config.backbone, config.weights, config.freeze_depth
    side = input_of(backbone, weights, config.image_size).image_size
    sizes = list(_stages(backbone, side, weights_.resolve(backbone, weights) != "none").sizes)
    # The stages were measured with the source's classes; a head's size goes with its classes.
    sizes[MAX_FREEZE_DEPTH] = sizes[MAX_FREEZE_DEPTH] * n_classes // _SOURCE_CLASSES
    return sum(sizes[depth : MAX_FREEZE_DEPTH + 1]), sum(sizes)


def stages_of(backbone: str, image_size: int | None = None) -> tuple[nn.Module, Stages]:
    """Return a randomly initialised backbone with its stages; it raises as `build`."""
    side = input_of(backbone, "auto", image_size).image_size
    network = create(backbone, side, _SOURCE_CLASSES, is_pretrained=False)
    return network.model, _stages(backbone, side, False)
