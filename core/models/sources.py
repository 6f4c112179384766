"""The libraries that backbones come from, behind one protocol."""

import difflib
import functools
import math
import os
import socket
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import timm
import torch
import torchvision
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from torchvision import models as zoo
from torchvision.models.vision_transformer import interpolate_embeddings

from core.config import Preprocessing

State = dict[str, Tensor]


class BackboneError(ValueError):
    """There is no such backbone, or it cannot be built as asked."""


@dataclass(frozen=True, slots=True)
class Classifier:
    """A network, on the CPU, and where its classifier is.

    Attributes:
        head: Names of its last linear layers (one, but for distilled networks).
    """

    model: nn.Module
    head: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WeightsEntry:
    """Pretrained weights that a library offers.

    Attributes:
        place: Where the library, or a user without a network, puts the file.
        origin: Where the file can be downloaded.
        cached: The file on this machine; None where it is still to be downloaded.
    """

    place: Path
    origin: str
    cached: Path | None


class Source(Protocol):
    """A library of backbones by its own names; a tag names one of several weights."""

    def names(self) -> Sequence[str]:
        """List all backbones."""

    def has(self, name: str) -> bool:
        """Say whether there is a backbone of this name."""

    def preprocessing(self, name: str, tag: str) -> Preprocessing:
        """Return the preprocessing that belongs to the weights."""

    def create(
        self, name: str, image_size: int, n_classes: int, is_pretrained: bool
    ) -> Classifier:
        """Build a network with random weights, as `create` does."""

    def weights(self, name: str, tag: str) -> WeightsEntry | None:
        """Describe pretrained weights; None if the backbone has none of this tag."""

    def read_weights(self, name: str, tag: str, image_size: int) -> State:
        """Read or download weights, positions for `image_size`; raises what the library does."""


class _Torchvision:
    """Classification models of torchvision."""

    def names(self) -> Sequence[str]:
        return list(zoo.list_models(module=zoo))

    def has(self, name: str) -> bool:
        return name in self.names()

    def preprocessing(self, name: str, tag: str) -> Preprocessing:
        if len(zoo.get_model_weights(name)) == 0:
            mean, std = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
            return Preprocessing(224, 256, mean, std, "bilinear")
        transforms = self._entry(name, tag).transforms()
        return Preprocessing(
            image_size=transforms.crop_size[0],
            resize_size=transforms.resize_size[0],
            mean=tuple(transforms.mean),
            std=tuple(transforms.std),
            interpolation="bicubic" if transforms.interpolation.value == "bicubic" else "bilinear",
        )

    def create(
        self, name: str, image_size: int, n_classes: int, is_pretrained: bool
    ) -> Classifier:
        extra: dict[str, Any] = {}
        if name in ("googlenet", "inception_v3"):
            # Their side heads' outputs would be a second loss.
            extra = {"aux_logits": False, "init_weights": not is_pretrained}
            if is_pretrained:  # these weights want their input rescaled
                extra["transform_input"] = True
        if name.startswith("vit_"):
            extra["image_size"] = image_size
        model = zoo.get_model(name, weights=None, num_classes=n_classes, **extra)
        linear, convolutions = (
            [layer for layer, module in model.named_modules() if isinstance(module, kind)]
            for kind in (nn.Linear, nn.Conv2d)
        )
        # SqueezeNet classifies by a 1x1 convolution.
        return Classifier(model, ((linear or convolutions)[-1],))

    def weights(self, name: str, tag: str) -> WeightsEntry | None:
        url = self._entry(name, tag).url
        place = _hub_file(Path(url).name)
        return WeightsEntry(place, url, place if place.is_file() else None)

    def read_weights(self, name: str, tag: str, image_size: int) -> State:
        state = self._entry(name, tag).get_state_dict(progress=False, check_hash=True)
        if name.startswith("vit_"):
            patch = state["conv_proj.weight"].shape[-1]
            state = interpolate_embeddings(image_size, patch, OrderedDict(state))
        return dict(state)

    def _entry(self, name: str, tag: str) -> Any:
        entries = zoo.get_model_weights(name)
        if tag not in entries.__members__:
            raise BackboneError(
                f"weights of {name} must be one of imagenet:TAG with TAG in "
                f"{', '.join(entries.__members__)}, but got {tag!r}."
            )
        return entries[tag]


class _Timm:
    """Models of timm (PyTorch Image Models)."""

    def names(self) -> Sequence[str]:
        return list(timm.list_models())

    def has(self, name: str) -> bool:
        return bool(timm.is_model(name))

    def preprocessing(self, name: str, tag: str) -> Preprocessing:
        config = timm.data.resolve_data_config(pretrained_cfg=_settings(_tagged(name, tag)))
        size = config["input_size"][1]
        return Preprocessing(
            image_size=size,
            # VOLO at 448 and 512 px was tested with a black border; no photo is given one.
            resize_size=max(size, math.floor(size / config["crop_pct"])),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation="bicubic" if config["interpolation"] == "bicubic" else "bilinear",
            is_squashed=config["crop_mode"] == "squash",
        )

    def create(
        self, name: str, image_size: int, n_classes: int, is_pretrained: bool
    ) -> Classifier:
        extra = _sized(name, image_size)
        model = timm.create_model(name, pretrained=False, num_classes=n_classes, **extra)
        found = model.get_classifier()
        layers = found if isinstance(found, tuple) else (found,)
        head = tuple(n for n, m in model.named_modules() if any(m is layer for layer in layers))
        return Classifier(model, head)

    def weights(self, name: str, tag: str) -> WeightsEntry | None:
        tagged = _tagged(name, tag)
        if not timm.models.is_model_pretrained(tagged):
            return None
        place = _hub_file(f"{tagged}.safetensors")
        settings = _settings(tagged)
        if repository := settings.get("hf_hub_id"):
            origin = f"model.safetensors of Hugging Face {repository}"
            files = ("model.safetensors", "pytorch_model.bin")
            found = [try_to_load_from_cache(repository, file) for file in files]
            copies = [Path(file) for file in found if isinstance(file, str)]
        else:
            origin = settings["url"]
            copies = [_hub_file(Path(origin).name)]
        cached = next((copy for copy in [place, *copies] if copy.is_file()), None)
        return WeightsEntry(place, origin, cached)

    def read_weights(self, name: str, tag: str, image_size: int) -> State:
        entry = self.weights(name, tag)
        assert entry is not None, "the caller has asked"
        if entry.cached == entry.place:
            return dict(timm.models.load_state_dict(str(entry.place), weights_only=True))
        if entry.cached is None:
            _resolve_host(entry.origin)
        tagged = _tagged(name, tag)
        # timm only converts older files, and interpolates positions, when it builds a model.
        model = timm.create_model(tagged, pretrained=True, **_sized(tagged, image_size))
        return dict(model.state_dict())


def _settings(tagged: str) -> dict[str, Any]:
    try:
        settings = timm.models.get_pretrained_cfg(tagged)
    except RuntimeError as err:
        name, _, tag = tagged.partition(".")
        known = ", ".join(n.partition(".")[2] for n in timm.list_pretrained(f"{name}.*"))
        raise BackboneError(
            f"weights of timm:{name} must be one of imagenet:TAG with TAG in "
            f"{known or 'none'}, but got {tag!r}."
        ) from err
    return settings.to_dict() if settings else {}


def _sized(tagged: str, image_size: int) -> dict[str, int]:
    """Return the argument of a network that is built for one size and another is asked for."""
    settings = _settings(tagged)
    is_other = settings.get("fixed_input_size") and settings["input_size"][1] != image_size
    return {"img_size": image_size} if is_other else {}


def _tagged(name: str, tag: str) -> str:
    return name if tag == "DEFAULT" else f"{name}.{tag}"


# By the prefix of their backbones' names. A further library is a class and a line here.
SOURCES: Mapping[str, Source] = {"": _Torchvision(), "timm:": _Timm()}


def find_source(backbone: str) -> tuple[Source, str]:
    """Return a backbone's source and its name there; an unknown one is a `BackboneError`."""
    prefix = max((p for p in SOURCES if backbone.startswith(p)), key=len)
    source, name = SOURCES[prefix], backbone.removeprefix(prefix)
    if not source.has(name):
        near = difflib.get_close_matches(backbone, backbone_names(), n=3, cutoff=0.5)
        hint = f" Near: {', '.join(near)}." if near else ""
        raise BackboneError(
            "backbone must be a torchvision classification model or timm:NAME, but got "
            f"backbone={backbone!r}.{hint} `python -m study backbones` lists all."
        )
    return source, name


@functools.cache
def backbone_names() -> tuple[str, ...]:
    """List every backbone: torchvision's by name, then timm's as `timm:NAME`."""
    return tuple(f"{prefix}{name}" for prefix in SOURCES for name in SOURCES[prefix].names())


def create(backbone: str, image_size: int, n_classes: int, *, is_pretrained: bool) -> Classifier:
    """Build a network with random weights, as pretrained weights want it where `is_pretrained`.

    Raises:
        BackboneError: Unknown name, or the network cannot take that input size.
    """
    source, name = find_source(backbone)
    try:
        return source.create(name, image_size, n_classes, is_pretrained)
    except (AssertionError, ValueError, TypeError, RuntimeError) as err:
        raise BackboneError(
            f"backbone {backbone} cannot be built for image_size={image_size}: {err}. "
            "Leave image_size out, or take a multiple of its patch size."
        ) from err


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """Return the 1,000 ImageNet class names in order, as torchvision writes them."""
    return tuple(zoo.get_model_weights("resnet18")["DEFAULT"].meta["categories"])


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide a run's numbers."""
    return {module.__name__: module.__version__ for module in (torch, torchvision, timm)}


def _hub_file(name: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _resolve_host(origin: str) -> None:
    """Fail at once where there is no network: the hub's client would retry for 45 s (measured)."""
    if not (os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")):
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        socket.getaddrinfo(urlsplit(origin if "://" in origin else hub).hostname, 443)
