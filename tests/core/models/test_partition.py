import copy
from dataclasses import replace

import pytest
import torch

from core.config import TrainConfig
from core.models.builder import build
from core.models.freeze_stages import train_mode
from core.models.fx_graph import fold_norms
from core.models.partition import cut

BASE = TrainConfig(weights="none", image_size=32)


@pytest.mark.parametrize(
    "backbone",
    ["timm:test_resnet", "mobilenet_v2", "squeezenet1_1", "timm:tf_efficientnet_lite0"]
    + ["timm:test_vit"],
)
def test_the_parts_do_exactly_what_the_network_does(backbone: str) -> None:
    images = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
    for depth in (2, 3, 5):
        config = replace(BASE, backbone=backbone, image_size=64, freeze_depth=depth)
        network = build(config, ("a", "b", "c"))
        make_prefix, suffix = cut(network, config)
        twin = copy.deepcopy(network.model)
        with torch.no_grad():
            rows = make_prefix()(images)
        evaluated = suffix.to_evaluate(suffix.module)
        assert torch.equal(evaluated.eval()(rows), twin.eval()(images))
        suffix.set_train_mode()
        train_mode(twin, network.stages, depth)
        torch.manual_seed(1)
        ours = suffix.module(rows)
        torch.manual_seed(1)
        assert torch.equal(ours, twin(images))
        state = twin.state_dict()
        for name, value in suffix.module.state_dict().items():
            assert torch.equal(value, state[name])  # batch norms moved alike


@pytest.mark.parametrize("backbone", ["timm:tf_efficientnet_lite0", "resnet18", "mobilenet_v2"])
def test_folded_norms_compute_the_same_and_leave_the_network_as_it_is(backbone: str) -> None:
    config = replace(BASE, backbone=backbone, image_size=64, freeze_depth=4)
    network = build(config, ("a", "b"))
    for layer in network.model.modules():  # statistics that a wrong fold would show
        if isinstance(layer, torch.nn.BatchNorm2d):
            for values in (layer.running_mean, layer.running_var, layer.weight):
                assert values is not None
                values.data.uniform_(0.5, 1.5)
    (make_prefix, _), before = cut(network, config), copy.deepcopy(network.model.state_dict())
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        expected = make_prefix()(images)
        folded = fold_norms(make_prefix())
        torch.testing.assert_close(folded(images), expected, rtol=1e-3, atol=1e-4)
    assert not [m for m in folded.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    after = network.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with torch.no_grad():
        assert torch.equal(make_prefix()(images), expected)


def test_a_cut_that_hands_over_the_batch_size_is_not_kept() -> None:
    swin = replace(BASE, backbone="swin_t", image_size=64)
    configs = [replace(swin, freeze_depth=depth) for depth in range(1, 6)]
    kept = [cut(build(config, ("a", "b")), config) is not None for config in configs]
    assert False in kept and kept[-1]
