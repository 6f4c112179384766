"""Runs that train the head alone: one of them for `fit`, or a cohort for a study."""

from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from core.config import MAX_FREEZE_DEPTH, TrainConfig
from core.data.draws import batch_positions
from core.data.splits import ImageData
from core.evaluate import Evaluation
from core.features import Features, frozen_part
from core.feed import Feed
from core.heads import Coordinates, Lane
from core.metrics import Shared, TrainingDiverged
from core.models.builder import Network
from core.prefix_cache import PrefixCache
from core.probe import probe_head


def _lane_key(config: TrainConfig) -> Hashable:
    """Return what heads must agree in to take their steps together."""
    return (config.batch_size, config.optimizer, config.nesterov)


class HeadRuns:
    """Runs of one network on one sequence of views, of which the head alone is trained.

    Args:
        configs: The runs; they differ in what concerns their heads only.
        built: Each run's network, with the head that it starts from.
        data: Pictures.
        features: What the network makes of them.

    Attributes:
        members: Which of `configs` are still trained, in the order of all results.
    """

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        built: Sequence[Network],
        data: ImageData,
        features: Features,
    ) -> None:
        self._configs = list(configs)
        self._built = list(built)
        self._data = data
        self._features = features
        self._labels = torch.from_numpy(data.train.labels).to(features.device)
        self._coordinates: dict[bool, Coordinates] = {}
        self._val: dict[bool, Tensor] = {}
        lanes: dict[Hashable, list[int]] = {}
        for k, config in enumerate(configs):
            lanes.setdefault(_lane_key(config), []).append(k)
        self._in_lane = list(lanes.values())
        self._lanes: list[Lane] = []

    @property
    def members(self) -> list[int]:
        """The runs that are still trained, in the order of all results."""
        return [k for lane in self._in_lane for k in lane]

    def train_epoch(self, epoch: int) -> list[float]:
        """Train an epoch; return each member's mean loss a picture."""
        plain = self._features.train(epoch)
        if not self._lanes:
            self._start(plain)
        tables = {key: found.apply(plain) for key, found in self._coordinates.items()}
        losses: list[float] = []
        for lane in self._lanes:
            inputs = [tables[config.standardize] for config in lane.configs]
            losses += lane.train_epoch(epoch, inputs, self._labels).tolist()
        return losses

    def _start(self, plain: Tensor) -> None:
        """Lay out the heads, in coordinates that the first epoch's features decide."""
        for config in self._configs:
            if config.standardize not in self._coordinates:
                self._coordinates[config.standardize] = (
                    Coordinates.of(plain)
                    if config.standardize
                    else Coordinates.unchanged(plain.shape[1], plain.device)
                )
        for members in self._in_lane:
            configs = [self._configs[k] for k in members]
            heads = [self._first_head(k) for k in members]
            lane = Lane(configs, heads, configs[0].seed, len(self._data.train))
            self._lanes.append(lane)

    def _first_head(self, k: int) -> Tensor:
        config = self._configs[k]
        weight, bias = head_tensors(self._built[k], self._features.device)
        if config.head_init == "probe":
            weight, bias = probe(self._features, self._data)
        return self._coordinates[config.standardize].into(weight, bias)

    def evaluate(self) -> list[Evaluation]:
        """Evaluate each member on the validation split."""
        if not self._val:
            plain = self._features.val()
            self._val = {key: found.apply(plain) for key, found in self._coordinates.items()}
        found: list[Evaluation] = []
        for lane in self._lanes:
            inputs = [self._val[config.standardize] for config in lane.configs]
            found += lane.evaluate(inputs, self._data.val.labels)
        return found

    def lr_factors(self) -> list[float]:
        """Return each member's share of its peak learning rate at the last step."""
        return [factor for lane in self._lanes for factor in lane.factors]

    def leave(self, gone: Iterable[int]) -> None:
        """Go on without these runs."""
        out = set(gone)
        for at, (lane, members) in enumerate(zip(self._lanes, self._in_lane, strict=True)):
            if out.intersection(members):
                staying = [row for row, k in enumerate(members) if k not in out]
                lane.leave(staying)
                self._in_lane[at] = [members[row] for row in staying]
        kept = [pair for pair in zip(self._lanes, self._in_lane, strict=True) if pair[1]]
        self._lanes = [lane for lane, _ in kept]
        self._in_lane = [members for _, members in kept]

    def heads(self) -> list[tuple[Tensor, Tensor]]:
        """Return each member's weight, (K, F), and bias, (K,), for features as they are."""
        return [
            self._coordinates[config.standardize].back(head)
            for lane in self._lanes
            for config, head in zip(lane.configs, lane.weights, strict=True)
        ]

    def state(self) -> dict[str, Tensor]:
        """Return what a single run needs to go on later."""
        lane = self._lanes[0]
        coordinates = self._coordinates[lane.configs[0].standardize]
        return {**lane.state(), "mean": coordinates.mean, "std": coordinates.std}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on with a single run where `state` was taken."""
        config = self._configs[0]
        here = {name: tensor.to(self._features.device) for name, tensor in state.items()}
        lane = Lane([config], list(here["head"]), config.seed, len(self._data.train))
        lane.restore(here)
        self._coordinates = {config.standardize: Coordinates(here["mean"], here["std"])}
        self._lanes = [lane]


def trains_head_alone(config: TrainConfig) -> bool:
    """Say whether a run needs nothing of the network but its features.

    Not where a batch's pictures are blended, since features of a blend are no blend of features;
    nor where an average of the weights is kept.
    """
    own = config.mixup or config.cutmix or config.ema_decay is not None
    return config.freeze_depth == MAX_FREEZE_DEPTH and not own


def check_probe(
    config: TrainConfig, built: Network, device: torch.device | str = "cpu"
) -> nn.Module:
    """Return all of a network but its head, where a probe can be its head.

    Raises:
        ValueError: The head is not one linear layer.
    """
    prefix = frozen_part(built, config, torch.device(device))
    if prefix is None:
        raise ValueError(
            "head_init = probe needs a backbone whose head is one linear layer, but got "
            f"backbone={config.backbone!r}; use another head_init (--set train.head_init=default; "
            "the thaw sampler takes probe where none is given)."
        )
    return prefix


def start_from_probe(
    config: TrainConfig, built: Network, data: ImageData, feed: Feed, cache: PrefixCache | None
) -> None:
    """Set a network's head to the linear probe of its frozen features.

    Raises:
        ValueError: The head is not one linear layer.
    """
    prefix = check_probe(config, built, feed.device)
    weight, bias = probe(Features(config, built, data, feed, prefix, cache), data)
    layer = built.model.get_submodule(built.head[0])
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)


def head_tensors(built: Network, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a network's linear head: weight, (K, F), and bias, (K,)."""
    layer = built.model.get_submodule(built.head[0])
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach().to(device), layer.bias.detach().to(device)


def probe(features: Features, data: ImageData) -> tuple[Tensor, Tensor]:
    """Return the linear probe of a network on the pictures: weight, (K, F), and bias, (K,)."""
    return features.probe(
        lambda: probe_head(
            features.plain(),
            torch.from_numpy(data.train.labels),
            features.val(),
            torch.from_numpy(data.val.labels),
            len(data.classes),
        )
    )


class HeadRun:
    """The one run of `fit` that trains the head alone.

    Args:
        config: The run.
        built: Its network; its head is replaced in what `snapshot` returns only.
        data: Pictures.
        features: What the network makes of them.
    """

    def __init__(
        self, config: TrainConfig, built: Network, data: ImageData, features: Features
    ) -> None:
        self.micro_batch_size = config.batch_size
        self.lr_factor = 0.0
        self._built = built
        self._features = features
        self._n_images = n_trained(config, len(data.train))
        self._runs = HeadRuns([config], [built], data, features)

    def train_epoch(self, epoch: int, _: Feed) -> tuple[float, float, int]:
        """Train one epoch.

        Returns:
            Mean training loss per picture, seconds spent on making views, and how many pictures
            there were.
        """
        [loss] = self._runs.train_epoch(epoch)
        [self.lr_factor] = self._runs.lr_factors()
        check_finite(loss, epoch)
        return loss, self._features.take_data(), self._n_images

    def evaluate(self, _: Feed) -> Evaluation:
        """Evaluate the head on the validation split."""
        return self._runs.evaluate()[0]

    def snapshot(self) -> dict[str, Tensor]:
        """Return the network's weights with this head."""
        [(weight, bias)] = self._runs.heads()
        return with_head(self._built, weight, bias)

    def take_shared(self) -> Shared:
        """Return what was read of shared work and left there since the last call."""
        return self._features.take_shared()

    def state(self) -> dict[str, Tensor]:
        """Return what the run needs to go on later."""
        return self._runs.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        self._runs.restore(state)


def with_head(built: Network, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Return a network's weights, on the CPU, with another head."""
    state = {name: tensor.detach().cpu() for name, tensor in built.model.state_dict().items()}
    name = built.head[0]
    return {**state, f"{name}.weight": weight.cpu(), f"{name}.bias": bias.cpu()}


def n_trained(config: TrainConfig, n_train: int) -> int:
    """Return how many pictures an epoch trains on: a last batch of one is left out."""
    return sum(map(len, batch_positions(np.arange(n_train), config.batch_size)))


def check_finite(loss: float, epoch: int) -> None:
    """Refuse a loss that is not a number.

    Raises:
        TrainingDiverged: It is not.
    """
    if not np.isfinite(loss):
        raise TrainingDiverged(
            f"the training loss is no longer finite at epoch {epoch}; lower base_lr or "
            "head_lr_mult, or set clip_norm."
        )
