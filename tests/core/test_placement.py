"""Heads on a GPU that is not there: PyTorch's fake tensors know their device and no values.

An operation on tensors of two devices fails among them as it would on a GPU, and so does one that
reads a value as a number of Python's, for which the host would wait.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from core.config import DataConfig, TrainConfig
from core.data.splits import ImageData, load_data
from core.device import kernels_of
from core.features import Features, feature_config, frozen_part
from core.feed import Feed
from core.fit import build_for
from core.heads import Coordinates, Lane
from core.models.builder import Network
from core.prefix_cache import PrefixCache
from support import make_folder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
N, WIDTH, CLASSES = 40, 16, 3
FROZEN = TrainConfig(
    backbone="resnet18", weights="none", image_size=32, freeze_depth=5, batch_size=8
)
HEAD = TrainConfig(batch_size=8, epochs=2, label_smoothing=0.1)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_heads_train_where_their_features_lie_and_read_no_value(optimizer: str) -> None:
    config = dataclasses.replace(HEAD, optimizer=optimizer)
    clipped = dataclasses.replace(config, clip_norm=1.0, loss_reduction="sum")
    with FakeTensorMode(allow_non_fake_inputs=True):
        features = torch.randn(N, WIDTH, device=CUDA)
        labels = torch.zeros(N, dtype=torch.long, device=CUDA)
        coordinates = Coordinates.of(features)
        start = coordinates.into(
            torch.randn(CLASSES, WIDTH, device=CUDA), torch.randn(CLASSES, device=CUDA)
        )
        table = coordinates.apply(features)
        lane = Lane([config, clipped], [start, start], 0, N)
        losses = lane.train_epoch(0, [table, table], labels)
        lane.leave([1])
        later = lane.train_epoch(1, [table], labels)
        found = [losses, later, lane.weights, *lane.state().values()]
        found += [*coordinates.back(lane.weights[0]), lane.logits([table])]
        places = {tensor.device.type for tensor in found if tensor.dim()}
        with pytest.raises(RuntimeError, match="same device"):
            lane.train_epoch(1, [table], labels.cpu())
    assert places == {"cuda"}
    assert (losses.shape, later.shape) == ((2,), (1,))


@pytest.fixture
def data(tmp_path: Path) -> ImageData:
    make_folder(tmp_path / "photos", {"red": 14, "blue": 13}, side=40)
    source = f"folder:{tmp_path / 'photos'}"
    return load_data(DataConfig(source=source, cache_dir=str(tmp_path / "cache")), 40)


@pytest.fixture
def network(data: ImageData) -> tuple[Network, nn.Module]:
    """A network, and all of it but its head."""
    built = build_for(FROZEN, data.classes)
    prefix = frozen_part(built, FROZEN, CPU)
    assert prefix is not None
    return built, prefix


def test_features_are_kept_by_the_host_and_used_on_the_device(
    data: ImageData, network: tuple[Network, nn.Module]
) -> None:
    built, prefix = network
    cache = PrefixCache(1 << 30)
    kept: list[Tensor] = []
    with Feed(feature_config(FROZEN, len(data.train)), built.preprocessing, data, CPU) as feed:
        features = Features(FROZEN, built, data, feed, prefix, cache)
        features.device = CUDA  # what the network makes of pictures comes from this processor
        with FakeTensorMode(allow_non_fake_inputs=True):
            made = [features.train(0), features.val(), features.plain()]
            probed = features.probe(
                lambda: (torch.zeros(2, 512, device=CUDA), torch.zeros(2, device=CUDA))
            )
            again = [features.train(0), features.val(), features.plain()]
            kept = [tensor for entry in cache._entries.values() for tensor in entry.batches[0]]
    assert {t.device.type for t in (*made, *probed, *again)} == {"cuda"}
    assert {t.device.type for t in kept} == {"cpu"}
    assert (len(kept), cache.hits, cache.misses) == (5, 3, 4)
    assert again[0].shape == (len(data.train), 512)


def test_features_are_known_by_what_computes_them(
    data: ImageData, network: tuple[Network, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    built, prefix = network
    keys = set()
    with Feed(feature_config(FROZEN, len(data.train)), built.preprocessing, data, CPU) as feed:
        for name, is_there in (("a", False), ("b", False), ("b", True), ("b", True)):
            monkeypatch.setattr("core.features.kernels_of", lambda _, name=name: ("cuda", name))
            monkeypatch.setattr(Feed, "makes_views_there", is_there)
            keys.add(Features(FROZEN, built, data, feed, prefix, None)._key)
    assert len(keys) == 3
    assert kernels_of(torch.device("cpu")) == ("cpu",)
