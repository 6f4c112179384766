"""A backbone by its name: the network, its preprocessing, its classifier, its source classes."""

import difflib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import timm
import torch
import torchvision
from torch import nn
from torchvision import models as zoo

from core.config import Preprocessing

_TIMM = "timm:"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# torchvision's side networks for training from scratch; their outputs would be a second loss.
_WITHOUT_SIDE_HEADS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


class BackboneError(ValueError):
    """There is no such backbone, or it cannot be built as asked."""


@dataclass(frozen=True, slots=True)
class Network:
    """A classifier as its library builds it.

    Attributes:
        model: The network, on the CPU.
        head: Names of its last linear layers (one, but for distilled networks).
    """

    model: nn.Module
    head: tuple[str, ...]


@functools.cache
def backbone_names() -> tuple[str, ...]:
    """List every backbone: torchvision's by name, then timm's as `timm:NAME`."""
    ours = zoo.list_models(module=zoo)
    return (*ours, *(f"{_TIMM}{name}" for name in timm.list_models()))


def check_backbone(name: str) -> None:
    """Refuse a name that neither library knows.

    Raises:
        BackboneError: Unknown; names the nearest.
    """
    if name.startswith(_TIMM):
        known = timm.is_model(name.removeprefix(_TIMM))
    else:
        known = name in zoo.list_models(module=zoo)
    if not known:
        near = difflib.get_close_matches(name, backbone_names(), n=3, cutoff=0.5)
        hint = f" Near: {', '.join(near)}." if near else ""
        raise BackboneError(
            "backbone must be a torchvision classification model or timm:NAME, but got "
            f"backbone={name!r}.{hint} `python -m study backbones` lists all."
        )


def is_timm(name: str) -> bool:
    """Say whether a backbone comes from timm."""
    return name.startswith(_TIMM)


def timm_name(name: str) -> str:
    """Return a timm backbone's name without its prefix."""
    return name.removeprefix(_TIMM)


def torchvision_weights(name: str, tag: str = "DEFAULT") -> Any:
    """Return torchvision's weights entry of a backbone.

    Raises:
        BackboneError: The backbone has no such tag.
    """
    try:
        return zoo.get_model_weights(name)[tag]
    except KeyError as err:
        tags = ", ".join(zoo.get_model_weights(name).__members__)
        raise BackboneError(
            f"weights of {name} must be one of imagenet:TAG with TAG in {tags}, but got {tag!r}."
        ) from err


def preprocessing(name: str, tag: str = "DEFAULT") -> Preprocessing:
    """Return the input size, normalisation and interpolation that belong to the weights."""
    if is_timm(name):
        return _timm_preprocessing(name)
    entry = zoo.get_model_weights(name)
    if len(entry) == 0:
        return Preprocessing(224, 256, IMAGENET_MEAN, IMAGENET_STD, "bilinear")
    shown = torchvision_weights(name, tag).transforms()
    return Preprocessing(
        image_size=shown.crop_size[0],
        resize_size=shown.resize_size[0],
        mean=tuple(shown.mean),
        std=tuple(shown.std),
        interpolation=_interpolation(shown.interpolation.value),
    )


def _timm_preprocessing(name: str) -> Preprocessing:
    settings = timm.models.get_pretrained_cfg(timm_name(name))
    config = timm.data.resolve_data_config(pretrained_cfg=settings.to_dict() if settings else {})
    size = config["input_size"][1]
    return Preprocessing(
        image_size=size,
        resize_size=math.floor(size / config["crop_pct"]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=_interpolation(config["interpolation"]),
    )


def _interpolation(name: str) -> Literal["bilinear", "bicubic"]:
    return "bicubic" if name == "bicubic" else "bilinear"


def scaled(shown: Preprocessing, image_size: int | None, normalize: str) -> Preprocessing:
    """Apply a run's own image size (the resize follows in proportion) and normalisation."""
    if normalize == "none":
        shown = replace(shown, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    if image_size is None or image_size == shown.image_size:
        return shown
    resize = round(image_size * shown.resize_size / shown.image_size)
    return replace(shown, image_size=image_size, resize_size=resize)


def create(name: str, image_size: int, n_classes: int, *, is_pretrained: bool) -> Network:
    """Build a network with random weights and `n_classes` outputs.

    Args:
        name: Backbone.
        image_size: Side of the input; position embeddings get this size.
        n_classes: Outputs.
        is_pretrained: Build it as the pretrained weights want it (GoogLeNet and Inception then
            rescale their input).

    Raises:
        BackboneError: Unknown name, or the network cannot take that input size.
    """
    check_backbone(name)
    try:
        if is_timm(name):
            return _create_timm(timm_name(name), image_size, n_classes)
        model = _create_torchvision(name, image_size, n_classes, is_pretrained)
    except (AssertionError, ValueError, TypeError, RuntimeError) as err:
        raise BackboneError(
            f"backbone {name} cannot be built for image_size={image_size}: {err}. "
            "Leave image_size out, or take a multiple of its patch size."
        ) from err
    return Network(model, (_last_linear(model),))


def _create_timm(name: str, image_size: int, n_classes: int) -> Network:
    settings = timm.models.get_pretrained_cfg(name)
    sizes = settings.to_dict() if settings else {}
    fixed = sizes.get("fixed_input_size") and sizes.get("input_size", (0, 0))[1] != image_size
    extra = {"img_size": image_size} if fixed else {}
    model = timm.create_model(name, pretrained=False, num_classes=n_classes, **extra)
    found = model.get_classifier()
    layers = found if isinstance(found, tuple) else (found,)
    head = tuple(n for n, m in model.named_modules() if any(m is layer for layer in layers))
    return Network(model, head)


def _create_torchvision(
    name: str, image_size: int, n_classes: int, is_pretrained: bool
) -> nn.Module:
    extra = dict(_WITHOUT_SIDE_HEADS.get(name, {}))
    if extra and is_pretrained:
        extra.update(transform_input=True, init_weights=False)
    if name.startswith("vit_"):
        extra["image_size"] = image_size
    model: nn.Module = zoo.get_model(name, weights=None, num_classes=n_classes, **extra)
    return model


def _last_linear(model: nn.Module) -> str:
    """Find the classifier: the last linear layer, or 1x1 convolution where there is none."""
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    if not names:
        names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    return str(names[-1])


def head_layers(network: Network) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the head's layers with their names."""
    for name in network.head:
        yield name, network.model.get_submodule(name)


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """Return the 1,000 ImageNet class names in order, as torchvision writes them."""
    return tuple(zoo.get_model_weights("resnet18")["DEFAULT"].meta["categories"])


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide a run's numbers."""
    return {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }
