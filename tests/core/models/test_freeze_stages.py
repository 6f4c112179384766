import itertools

import pytest
import torch
from torch import nn

from core.config import MAX_FREEZE_DEPTH, TrainConfig
from core.models.builder import Network, build, stages_of
from core.models.freeze_stages import StagesError, describe_levels, find_stages, freeze, train_mode

FAMILIES = (
    ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "densenet121", "swin_t", "vgg11"]
    + ["squeezenet1_1", "googlenet", "regnet_y_400mf", "shufflenet_v2_x0_5"]
    + ["timm:tf_efficientnet_lite0", "timm:vit_tiny_patch16_224", "timm:convnext_pico"]
    + ["timm:deit_tiny_distilled_patch16_224", "timm:mixer_s32_224"]
)


def _small(name: str) -> int | None:
    return None if any(kind in name for kind in ("vit", "deit", "mixer")) else 64


def _build(name: str, classes: tuple[str, ...] = ("a", "b")) -> Network:
    return build(TrainConfig(backbone=name, weights="none", image_size=_small(name)), classes)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_level_of_every_family_freezes_strictly_more(name: str) -> None:
    model, stages = stages_of(name, _small(name))
    levels = describe_levels(model, stages)
    trained = [level.trained_parameters for level in levels]
    shares = [level.frozen_flops_share for level in levels]
    assert [level.depth for level in levels] == list(range(MAX_FREEZE_DEPTH + 1))
    assert all(a > b for a, b in itertools.pairwise(trained))
    assert all(a < b for a, b in itertools.pairwise(shares))
    assert shares[0] == 0
    assert trained[0] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "name",
    ["resnet18", "efficientnet_b0", "swin_t", "mobilenet_v3_small", "regnet_y_400mf"]
    + ["timm:tf_efficientnet_lite0", "timm:vit_tiny_patch16_224", "timm:convnext_pico"],
)
def test_a_level_near_the_top_leaves_a_tenth_of_the_forward_pass(name: str) -> None:
    _, stages = stages_of(name)
    shares = [stages.frozen_flops_share(depth) for depth in (1, 2, 3, 4)]
    assert 0.85 <= shares[3] <= 0.95
    assert shares[1] == pytest.approx(0.5, abs=0.1)


def test_levels_end_at_block_borders() -> None:
    levels = describe_levels(*stages_of("resnet18"))
    found = "; ".join(" ".join(level.newly_frozen) for level in levels)
    assert found == "; conv1 bn1 layer1; layer2; layer3; layer4.0; rest of layer4"


@pytest.mark.parametrize(
    ("name", "depth"),
    [("resnet18", 2), ("resnet18", MAX_FREEZE_DEPTH), ("swin_t", 2)]
    + [("timm:vit_tiny_patch16_224", 3), ("timm:tf_efficientnet_lite0", MAX_FREEZE_DEPTH)],
)
def test_frozen_prefix_is_bit_identical_after_training_steps(name: str, depth: int) -> None:
    torch.manual_seed(0)
    built = _build(name, ("a", "b", "c"))
    model, size = built.model, built.preprocessing.image_size
    freeze(model, built.stages, depth)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    is_head_alone = {n.rpartition(".")[0] for n in trainable} == set(built.head)
    assert is_head_alone is (depth == MAX_FREEZE_DEPTH)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        train_mode(model, built.stages, depth)
        logits = model(torch.randn(2, 3, size, size))
        nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
        optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(before[k], v)}
    parameters = dict(model.named_parameters())
    statistics = changed - parameters.keys()
    assert set() < changed & parameters.keys() <= set(trainable)
    frozen = tuple(f"{m}." for m in built.stages.eval_modules[depth])
    assert not [name for name in statistics if name.startswith(frozen)]
    assert depth < MAX_FREEZE_DEPTH or not statistics
    assert all(parameters[k].grad is None for k in parameters.keys() - set(trainable))


def test_frozen_dropout_and_stochastic_depth_are_off() -> None:
    built = _build("swin_t")
    train_mode(built.model, built.stages, MAX_FREEZE_DEPTH)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(built.model(images), built.model(images))


def test_network_without_cut_points_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
    with pytest.raises(StagesError, match="only 0 usable cut points"):
        find_stages(model, ("1",), 16)
