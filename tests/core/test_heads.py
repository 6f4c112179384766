"""Heads trained alone: against PyTorch's own layers and optimizers, and head against head."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from core.config import TrainConfig
from core.data.draws import batch_positions, epoch_order
from core.heads import Coordinates, Lane
from core.optim import lr_factor, make_optimizer, parameter_groups, set_lr

N, F, K = 37, 12, 3
BASE = TrainConfig(freeze_depth=5, epochs=3, batch_size=8, base_lr=0.02, head_lr_mult=2.0)


def _features(seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, N)
    features = scale * (rng.normal(size=(N, F)) + labels[:, None] * 0.5 + 2)
    return torch.from_numpy(features.astype(np.float32)), torch.from_numpy(labels)


def _first_layer() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(F, K)


def _by_pytorch(config: TrainConfig, features: Tensor, labels: Tensor) -> tuple[nn.Linear, float]:
    """Train a linear layer as any PyTorch loop does; return it and its last epoch's loss."""
    model = nn.Sequential(_first_layer())
    names = [name for name, _ in model.named_parameters()]
    groups = parameter_groups(model, names, ("0",), config)
    optimizer = make_optimizer(groups, config, torch.device("cpu"))
    step, total = 0, 0.0
    for epoch in range(config.epochs):
        batches = batch_positions(epoch_order(N, config.seed, epoch), config.batch_size)
        total = 0.0
        for positions in batches:
            rows = torch.from_numpy(positions)
            set_lr(optimizer, lr_factor(config, step, len(batches)))
            loss = cross_entropy(
                model(features[rows]),
                labels[rows],
                reduction="sum",
                label_smoothing=config.label_smoothing,
            )
            scale = 1.0 if config.loss_reduction == "sum" else 1 / len(rows)
            optimizer.zero_grad()
            (loss * scale).backward()
            if config.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            total += float(loss.detach())
            step += 1
        total /= sum(map(len, batches))
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    return layer, total


def _by_lane(
    configs: list[TrainConfig], features: Tensor, labels: Tensor
) -> tuple[Lane, list[list[float]]]:
    """Train heads together; return their lane and each epoch's losses."""
    layer = _first_layer()
    plain = Coordinates.unchanged(F, torch.device("cpu"))
    start = plain.into(layer.weight.detach(), layer.bias.detach())
    lane = Lane(configs, [start] * len(configs), configs[0].seed, N)
    table = plain.apply(features)
    losses = [
        lane.train_epoch(epoch, [table] * len(configs), labels).tolist()
        for epoch in range(configs[0].epochs)
    ]
    return lane, losses


CHANGES: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decay_all": True},
    {"momentum": 0.0},
    {"nesterov": True, "weight_decay": 0.01},
    {"loss_reduction": "sum", "base_lr": 0.001},
    {"label_smoothing": 0.2},
    {"clip_norm": 0.3},
    {"schedule": "one-cycle"},
    {"schedule": "step", "step_epochs": 1},
    {"warmup_epochs": 1.5},
    {"optimizer": "adamw", "weight_decay": 0.2},
    {"optimizer": "adamw", "label_smoothing": 0.1, "clip_norm": 0.5},
    {"batch_size": 6},  # 37 = 6 * 6 + 1: the last picture is left out
    {"batch_size": 37},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_head_learns_what_pytorch_s_own_layer_and_optimizer_learn(
    changes: dict[str, Any],
) -> None:
    config = dataclasses.replace(BASE, **changes)
    features, labels = _features(0)
    layer, loss = _by_pytorch(config, features, labels)
    lane, losses = _by_lane([config], features, labels)
    head = lane.weights[0]
    assert torch.allclose(head[:, :-1], layer.weight, atol=2e-5)
    assert torch.allclose(head[:, -1], layer.bias, atol=2e-5)
    assert losses[-1][0] == pytest.approx(loss, abs=1e-4)


_HEADS = st.fixed_dictionaries(
    {
        "base_lr": st.sampled_from([1e-4, 0.01, 0.3]),
        "head_lr_mult": st.sampled_from([1.0, 10.0]),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.3]),
        "decay_all": st.booleans(),
        "momentum": st.sampled_from([0.5, 0.9]),
        "schedule": st.sampled_from(["constant", "cosine", "one-cycle", "step"]),
        "label_smoothing": st.sampled_from([0.0, 0.1]),
        "loss_reduction": st.sampled_from(["mean", "sum"]),
        "clip_norm": st.sampled_from([None, 0.5]),
    }
)


@settings(max_examples=40, deadline=None, phases=[Phase.generate])
@given(
    heads=st.lists(_HEADS, min_size=1, max_size=9),
    optimizer=st.sampled_from(["sgd", "adamw"]),
    batch_size=st.sampled_from([5, 17, 36]),
    threads=st.sampled_from([1, 2]),
)
def test_a_head_s_numbers_do_not_depend_on_its_company(
    heads: list[dict[str, Any]], optimizer: Any, batch_size: int, threads: int
) -> None:
    configs = [
        dataclasses.replace(BASE, optimizer=optimizer, batch_size=batch_size, **head)
        for head in heads
    ]
    features, labels = _features(1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together, losses = _by_lane(configs, features, labels)
        for k, config in enumerate(configs):
            alone, own = _by_lane([config], features, labels)
            assert [row[k] for row in losses] == [row[0] for row in own]
            assert torch.equal(together.weights[k], alone.weights[0])
    finally:
        torch.set_num_threads(before)


def test_heads_that_leave_change_nothing_for_those_that_stay() -> None:
    rates = (0.01, 0.02, 0.05, 0.1)
    configs = [dataclasses.replace(BASE, base_lr=rate, optimizer="adamw") for rate in rates]
    features, labels = _features(2)
    table = Coordinates.unchanged(F, torch.device("cpu")).apply(features)
    again = Lane(configs, [torch.zeros(K, F + 1)] * 4, 0, N)
    stays = Lane(configs, [torch.zeros(K, F + 1)] * 4, 0, N)
    for epoch in range(3):
        again.train_epoch(epoch, [table] * 4, labels)
        stays.train_epoch(epoch, [table] * len(stays.configs), labels)
        if epoch == 0:
            stays.leave([1, 3])
    assert torch.equal(stays.weights, again.weights[[1, 3]])


def test_standardised_features_have_mean_zero_and_deviation_one() -> None:
    features, _ = _features(4, scale=30.0)
    features[:, 5] = 7.0  # one that never changes
    table = Coordinates.of(features).apply(features)
    assert torch.allclose(table[:, :-1].mean(dim=0), torch.zeros(F), atol=1e-5)
    moving = [f for f in range(F) if f != 5]
    assert torch.allclose(table[:, moving].std(dim=0, correction=0), torch.ones(F - 1), atol=1e-4)
    assert torch.equal(table[:, 5], torch.zeros(N))
    assert torch.equal(table[:, -1], torch.ones(N))


def test_a_head_folded_back_says_of_plain_features_what_it_said_of_standardised_ones() -> None:
    features, _ = _features(5, scale=4.0)
    coordinates = Coordinates.of(features)
    layer = _first_layer()
    head = coordinates.into(layer.weight.detach(), layer.bias.detach())
    ours = coordinates.apply(features) @ head.t()
    assert torch.allclose(ours, layer(features), atol=1e-4)
    weight, bias = coordinates.back(head)
    assert torch.allclose(weight, layer.weight, atol=1e-6)
    assert torch.allclose(bias, layer.bias, atol=1e-5)


def test_a_feature_that_hardly_moves_does_not_explode_on_other_views() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 9, generator=generator)
    features[:, 3] *= 1e-6
    features[:, 4] = 2.0
    found = Coordinates.of(features)
    inputs = found.apply(features + 0.5)
    assert inputs.abs().max() < 20
    rest = [0, 1, 2, 5, 6, 7, 8]
    assert torch.equal(found.std[rest], features.double().std(dim=0, correction=0).float()[rest])
    assert torch.equal(Coordinates.of(torch.zeros(4, 3)).std, torch.ones(3))
