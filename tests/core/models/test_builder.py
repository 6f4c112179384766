from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from core.config import TrainConfig
from core.models.builder import Network, build, count_parameters, init_head
from core.models.sources import BackboneError, Classifier, create, imagenet_classes


def _classifier() -> Classifier:
    return create("resnet18", 64, 2, is_pretrained=False)


def _build(
    weights: object = "none", classes: tuple[str, ...] = ("a", "b"), **more: object
) -> Network:
    settings = {"backbone": "timm:test_resnet", "weights": str(weights), "image_size": 64} | more
    return build(TrainConfig(**settings), classes)


def test_xavier_keeps_its_bounds_and_zero_is_zero() -> None:
    network = _classifier()
    init_head(network, "xavier", 0)
    bound = (6 / (512 + 2)) ** 0.5
    assert 0.9 * bound < network.model.get_parameter("fc.weight").abs().max() <= bound
    init_head(network, "zero", 0)
    assert not any(p.any() for p in network.model.get_submodule("fc").parameters())
    heads = _build(backbone="timm:levit_128s", image_size=224, head_init="zero").model.head
    assert not heads.linear.weight.any() and heads.bn.weight.all()


def test_source_classes_copies_the_rows_of_equal_names_and_else_is_default() -> None:
    source = {"fc.weight": torch.randn(1000, 512), "fc.bias": torch.randn(1000)}
    network, without_source, plain = _classifier(), _classifier(), _classifier()
    classes = ("not_hotdog", "Hot_Dog")
    init_head(network, "source-classes", 0, classes=classes, source=source)
    init_head(without_source, "source-classes", 0, classes=classes)
    init_head(plain, "default", 0)
    row = imagenet_classes().index("hotdog")
    for name, tensor in source.items():
        copied, *others = (n.model.get_parameter(name) for n in (network, without_source, plain))
        assert torch.equal(*others)
        assert torch.equal(copied[1], tensor[row])
        assert torch.equal(copied[0], others[0][0])


def test_seed_decides_a_network_from_scratch_but_only_the_head_of_a_pretrained_one(
    weights_file: Path,
) -> None:
    changed = {}
    for weights in ("none", weights_file):
        one, two = (_build(weights, seed=seed).model.state_dict() for seed in (3, 4))
        changed[weights] = {name for name in one if not torch.equal(one[name], two[name])}
    assert "conv1.0.weight" in changed["none"]
    assert changed[weights_file] == {"fc.weight", "fc.bias"}


def test_weights_that_were_replaced_are_read_again(tmp_path: Path, weights_file: Path) -> None:
    path, name = tmp_path / "w.safetensors", "conv1.0.weight"
    state = safetensors.torch.load_file(weights_file)
    for value in (1.0, 2.0):
        state[name] = torch.full_like(state[name], value)
        path.unlink(missing_ok=True)
        safetensors.torch.save_file(state, path)
        assert (_build(path).model.get_parameter(name) == value).all()


def test_parameters_are_counted_with_the_runs_own_classes() -> None:
    built = _build(classes=("a", "b", "c"))
    head = built.model.get_submodule(built.head[0])
    total, last = (sum(p.numel() for p in part.parameters()) for part in (built.model, head))
    config = TrainConfig(backbone="timm:test_resnet", weights="none", image_size=64)
    assert count_parameters(config, 3) == (total, total)
    assert count_parameters(replace(config, freeze_depth=5), 3) == (last, total)


def test_input_size_that_a_backbone_cannot_take_is_refused() -> None:
    with pytest.raises(BackboneError, match="image_size=100"):
        build(TrainConfig(backbone="vit_b_16", weights="none", image_size=100), ("a", "b"))
