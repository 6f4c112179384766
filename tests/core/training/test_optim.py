from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from core.config import MAX_FREEZE_DEPTH, TrainConfig
from core.models.builder import build
from core.models.freeze_stages import freeze
from core.models.sources import create
from core.training.optim import lr_factor, make_optimizer, parameter_groups, set_lr


def _groups(depth: int, **settings: object) -> tuple[list[dict[str, object]], torch.nn.Module]:
    config = TrainConfig(base_lr=0.01, head_lr_mult=10, weight_decay=1e-3, **settings)
    built = build(TrainConfig(backbone="resnet18", weights="none", image_size=64), ("a", "b"))
    freeze(built.model, built.stages, depth)
    return parameter_groups(built.model, built, config), built.model


@pytest.mark.parametrize("depth", range(MAX_FREEZE_DEPTH + 1))
def test_groups_are_together_exactly_the_trainable_parameters(depth: int) -> None:
    groups, model = _groups(depth)
    grouped = [id(p) for group in groups for p in group["params"]]
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(trainable)


def test_head_learns_faster_and_norms_and_biases_are_not_decayed() -> None:
    groups, model = _groups(0)
    named = {str(group["name"]): group for group in groups}
    assert set(named) == {"backbone", "backbone, no decay", "head", "head, no decay"}
    assert named["head"]["lr"] == pytest.approx(0.1)
    assert named["backbone"]["lr"] == 0.01
    assert named["backbone, no decay"]["weight_decay"] == 0
    assert all(p.ndim < 2 for p in named["backbone, no decay"]["params"])
    assert all(p.ndim >= 2 for p in named["backbone"]["params"])
    assert [tuple(p.shape) for p in named["head"]["params"]] == [(2, 512)]
    assert {group["weight_decay"] for group in _groups(0, decay_all=True)[0]} == {1e-3}
    optimizer = make_optimizer(groups, TrainConfig(), torch.device("cpu"))
    set_lr(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.005, 0.05}


@pytest.mark.parametrize(
    ("backbone", "size", "spared"),
    [
        ("convnext_tiny", 32, ("features.1.0.layer_scale",)),  # (C, 1, 1)
        ("vit_b_32", 32, ("class_token", "encoder.pos_embedding")),
        ("swin_v2_t", 32, ("features.1.0.attn.logit_scale",)),
        ("timm:test_vit", 160, ("cls_token", "pos_embed")),
        ("timm:fastvit_t8", 32, ("stages.0.blocks.0.token_mixer.layer_scale.gamma",)),
        ("timm:swinv2_tiny_window8_256", 256, ("layers.0.blocks.0.attn.cpb_mlp.0.weight",)),
        ("timm:resmlp_12_224", 224, ("blocks.0.norm1.alpha", "blocks.0.ls1")),
        ("timm:levit_128s", 224, ("stages.0.blocks.0.attn.attention_biases",)),
    ],
)
def test_only_weight_matrices_are_decayed(
    backbone: str, size: int, spared: tuple[str, ...]
) -> None:
    network = create(backbone, size, 2, is_pretrained=False)
    groups = parameter_groups(network.model, network, TrainConfig(weight_decay=0.1))
    found = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    parameters = dict(network.model.named_parameters())
    decayed = {name for name, p in parameters.items() if id(p) in found}
    assert set(spared) <= parameters.keys() - decayed
    modules = network.model.named_modules()
    kinds = (nn.Linear, nn.Conv2d)
    matrices = {f"{name}.weight" for name, layer in modules if isinstance(layer, kinds)}
    others = {name for name in matrices ^ decayed if not name.endswith("in_proj_weight")}
    assert all("cpb_mlp" in name for name in others)


@pytest.mark.parametrize(
    ("schedule", "of_pytorch", "tolerance"),
    [
        ("step", lambda o: lr_scheduler.StepLR(o, step_size=3 * 4, gamma=0.5), 1e-6),
        ("cosine", lambda o: lr_scheduler.CosineAnnealingLR(o, 9 * 4), 1e-6),
        # PyTorch's turning point, 0.3 * n - 1, is a little off ours.
        ("one-cycle", lambda o: lr_scheduler.OneCycleLR(o, 1.0, 37, cycle_momentum=False), 0.05),
    ],
)
def test_schedules_agree_with_pytorchs(
    schedule: str, of_pytorch: Callable[[Optimizer], LRScheduler], tolerance: float
) -> None:
    config = TrainConfig(epochs=9, schedule=schedule, step_epochs=3, step_gamma=0.5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = of_pytorch(optimizer)
    for step in range(9 * 4):
        expected = reference.get_last_lr()[0]
        assert lr_factor(config, step, 4) == pytest.approx(expected, abs=tolerance)
        optimizer.step()
        reference.step()


def test_warm_up_rises_linearly_to_the_peak() -> None:
    config = TrainConfig(epochs=4, schedule="constant", warmup_epochs=1)
    factors = [lr_factor(config, step, 4) for step in range(6)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


@given(
    schedule=st.sampled_from(["constant", "cosine", "one-cycle", "step"]),
    epochs=st.integers(1, 30),
    per_epoch=st.integers(1, 50),
    share=st.floats(0, 1),
    warmup=st.floats(0, 1),
)
def test_factor_is_always_between_zero_and_one(
    schedule: str, epochs: int, per_epoch: int, share: float, warmup: float
) -> None:
    config = TrainConfig(epochs=epochs, schedule=schedule, warmup_epochs=warmup)
    step = min(epochs * per_epoch - 1, int(share * epochs * per_epoch))
    assert 0 <= lr_factor(config, step, per_epoch) <= 1
