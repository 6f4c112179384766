import pytest
import torch
from torch import nn

from core.build import build, stages_of
from core.config import MAX_FREEZE_DEPTH
from core.levels import describe_levels
from core.stages import StagesError, find_stages, freeze, train_mode

FAMILIES = [
    "resnet18",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "convnext_tiny",
    "densenet121",
    "vit_b_16",
    "swin_t",
    "vgg11",
    "squeezenet1_1",
    "googlenet",
    "regnet_y_400mf",
    "shufflenet_v2_x0_5",
    "timm:tf_efficientnet_lite0",
    "timm:vit_tiny_patch16_224",
    "timm:convnext_pico",
    "timm:deit_tiny_distilled_patch16_224",
    "timm:mixer_s32_224",
]


def _small(name: str) -> int | None:
    return None if "vit" in name or "deit" in name or "mixer" in name else 96


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_the_same_levels_and_each_freezes_strictly_more(name: str) -> None:
    model, stages = stages_of(name, _small(name))
    levels = describe_levels(model, stages)
    trained = [level.trained_parameters for level in levels]
    shares = [level.frozen_flops_share for level in levels]
    assert [level.depth for level in levels] == list(range(MAX_FREEZE_DEPTH + 1))
    assert all(a > b for a, b in zip(trained, trained[1:], strict=False))
    assert shares[0] == 0
    assert all(a < b for a, b in zip(shares, shares[1:], strict=False))
    assert trained[0] == sum(p.numel() for p in model.parameters())


def test_resnet_levels_are_its_stem_and_layers() -> None:
    model, stages = stages_of("resnet18", 64)
    named = [level.newly_frozen for level in describe_levels(model, stages)]
    assert named == [
        (),
        ("conv1", "bn1"),
        ("layer1",),
        ("layer2",),
        ("layer3",),
        ("layer4",),
    ]


def test_efficientnet_is_cut_at_block_borders_not_inside_widened_blocks() -> None:
    model, stages = stages_of("timm:tf_efficientnet_lite0", 64)
    named = [level.newly_frozen for level in describe_levels(model, stages)]
    assert named[2] == ("blocks.1",)
    assert named[4] == ("blocks.3", "blocks.4")


def test_vit_blocks_fall_into_groups_of_nearly_equal_length() -> None:
    _, stages = stages_of("timm:vit_tiny_patch16_224", None)
    trunk = stages.flops[:-1]
    assert max(trunk) < 2 * min(trunk)


@pytest.mark.parametrize("name", ["resnet18", "timm:vit_tiny_patch16_224"])
def test_top_level_trains_the_head_alone(name: str) -> None:
    built = build(name, "none", ("a", "b"), seed=0, image_size=_small(name))
    trainable = freeze(built.model, built.stages, MAX_FREEZE_DEPTH)
    assert {n.rpartition(".")[0] for n in trainable} == set(built.head)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenet_v3_small",
        "efficientnet_b0",
        "convnext_tiny",
        "densenet121",
        "vit_b_32",
        "swin_t",
        "timm:tf_efficientnet_lite0",
    ],
)
@pytest.mark.parametrize("depth", [2, MAX_FREEZE_DEPTH])
def test_frozen_prefix_is_bit_identical_after_training_steps(name: str, depth: int) -> None:
    torch.manual_seed(0)
    built = build(name, "none", ("a", "b", "c"), seed=0, image_size=None if "vit" in name else 64)
    model = built.model
    trainable = set(freeze(model, built.stages, depth))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    size = built.preprocessing.image_size
    for _ in range(2):
        train_mode(model, built.stages, depth)
        nn.functional.cross_entropy(
            model(torch.randn(2, 3, size, size)), torch.tensor([0, 1])
        ).backward()
        optimizer.step()
    frozen_modules = built.stages.eval_modules[depth]
    after = model.state_dict()
    parameters = dict(model.named_parameters())
    buffers = [k for k in after if k not in parameters]
    frozen_buffers = [k for k in buffers if k.startswith(tuple(f"{m}." for m in frozen_modules))]
    for key in [k for k in parameters if k not in trainable] + frozen_buffers:
        assert torch.equal(before[key], after[key]), key
    assert all(parameters[k].grad is None for k in parameters if k not in trainable)
    changed = [k for k in trainable if not torch.equal(before[k], after[k])]
    assert changed
    if depth == MAX_FREEZE_DEPTH:
        assert set(frozen_buffers) == {k for k in buffers if "head" not in k}


def test_frozen_dropout_and_stochastic_depth_are_off() -> None:
    built = build("swin_t", "none", ("a", "b"), seed=0, image_size=64)
    freeze(built.model, built.stages, MAX_FREEZE_DEPTH)
    train_mode(built.model, built.stages, MAX_FREEZE_DEPTH)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(built.model(images), built.model(images))


def test_unfreezing_again_trains_everything() -> None:
    built = build("resnet18", "none", ("a", "b"), seed=0, image_size=64)
    freeze(built.model, built.stages, MAX_FREEZE_DEPTH)
    trainable = freeze(built.model, built.stages, 0)
    assert trainable == [name for name, _ in built.model.named_parameters()]


def test_network_without_cut_points_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
    with pytest.raises(StagesError, match="only 0 usable cut points, but 4 are needed"):
        find_stages(model, ("1",), 16)
