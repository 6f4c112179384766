import pytest
import torch
from torch import Tensor

from core.config import TrainConfig
from core.models.builder import build
from core.models.layers import Mirrored, find_layers, solved_network, tap

POSITIONS = {"resnet18": (2, 3), "timm:vit_tiny_patch16_224": (1,)}


@pytest.mark.parametrize(
    ("backbone", "outputs"),
    [
        ("resnet18", ["layer2", "layer3", "layer4.0"]),
        ("timm:vit_tiny_patch16_224", ["blocks.5", "blocks.8", "blocks.10"]),
    ],
)
def test_features_are_the_means_over_positions_of_layers_and_then_what_the_head_sees(
    backbone: str, outputs: list[str]
) -> None:
    network = build(TrainConfig(backbone=backbone, weights="none"), ("a", "b"))
    model, size = network.model.eval(), network.preprocessing.image_size
    images = torch.randn(2, 3, size, size)
    seen: dict[str, Tensor] = {}
    model.get_submodule(network.head[0]).register_forward_pre_hook(
        lambda _, given: seen.update(last=given[0])
    )
    for name in outputs:
        model.get_submodule(name).register_forward_hook(
            lambda _, __, value, name=name: seen.update({name: value})
        )
    layers = find_layers(network)
    with torch.no_grad():
        model(images)
        means = [seen[name].mean(POSITIONS[backbone]) for name in outputs]
        found = tap(model, layers)(images)
        parts = [tap(model, [name])(images) for name in layers]
    assert len(layers) == 4
    assert torch.equal(found, torch.cat(parts, 1))
    assert torch.equal(parts[-1], seen["last"])
    for part, mean in zip(parts[:-1], means, strict=True):
        torch.testing.assert_close(part, mean)


def test_a_mirrored_network_does_not_see_sides() -> None:
    network = build(TrainConfig(backbone="timm:test_resnet", weights="none"), ("a", "b"))
    images, layers = torch.randn(2, 3, 64, 64), find_layers(network)
    head = torch.nn.Linear(tap(network.model, layers)(images).shape[1], 2)
    plain = solved_network(network.model, layers, head).eval()
    for model, is_blind in ((plain, False), (Mirrored(plain), True)):
        assert torch.allclose(model(images), model(images.flip(-1)), atol=1e-6) == is_blind
