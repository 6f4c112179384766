"""What a frozen network makes of pictures, (N, F): all that training the head alone looks at."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from core.config import MAX_FREEZE_DEPTH, TrainConfig
from core.data.draws import batch_positions, epoch_order
from core.data.splits import ImageData
from core.device import SHARING_DEVICES, amp_dtype, deterministic, kernels_of
from core.entry_keys import ContentKey, pictures_key, prefix_key
from core.evaluate import IntArray
from core.feed import Feed, eval_batches
from core.metrics import Shared
from core.models.builder import Network
from core.models.freeze_stages import freeze
from core.prefix_cache import PrefixCache
from core.split import crossing_bytes, split_network
from core.tally import Tally

# What goes through the network at once. It is not the run's own batch size, so that runs of any
# batch size have the same features, bit by bit.
_BATCH = 64


def feature_config(config: TrainConfig, n_train: int) -> TrainConfig:
    """Return the configuration whose batches the features are made from.

    A last batch of one picture would be left out, so the batch size is one that leaves none.
    """
    sizes = range(min(_BATCH, n_train), 1, -1)
    size = next((size for size in sizes if n_train % size != 1), n_train)
    return replace(config, batch_size=size, micro_batch_size=None)


class Features:
    """Features of one network on one run's views; made when asked for, and kept by the cache.

    What the cache keeps lies in the host's memory or on disk, wherever it was computed.

    Args:
        config: The run.
        built: Its network.
        data: Pictures.
        feed: Views, in the batches of `feature_config`.
        prefix: Its frozen part, from `frozen_part`.
        cache: Where features are kept for other runs; None keeps nothing.

    Attributes:
        device: Where the features lie for the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        built: Network,
        data: ImageData,
        feed: Feed,
        prefix: nn.Module,
        cache: PrefixCache | None,
    ) -> None:
        self._prefix = prefix
        self._data = data
        self._feed = feed
        is_kept = cache is not None and feed.device.type in SHARING_DEVICES
        self._tally = Tally(cache) if cache is not None and is_kept else None
        self._seed = config.seed
        self.device = feed.device
        dtype = amp_dtype(config.amp, feed.device)
        self._autocast = torch.autocast(feed.device.type, dtype=dtype, enabled=dtype is not None)
        self._key = ContentKey.of(
            "features",
            pictures_key(data, data.train),
            pictures_key(data, data.val),
            prefix_key(config, built, MAX_FREEZE_DEPTH),
            str(dtype),
            kernels_of(feed.device),
            feed.makes_views_there,
        )
        self._data_s = 0.0

    def train(self, epoch: int) -> Tensor:
        """Return the features of an epoch's training views in the pictures' order, (N, F)."""
        feed, n = self._feed, len(self._data.train)

        def make() -> tuple[Tensor, ...]:
            views = (images for images, _ in feed.views(epoch))
            order = batch_positions(epoch_order(n, self._seed, epoch), feed.batch_size)
            return (self._cross(views, np.concatenate(order)),)

        return self._kept(("train", feed.train_spec(epoch), self._seed, epoch), make)[0]

    def val(self) -> Tensor:
        """Return the features of the validation views, (N, F)."""
        return self._plain("val")

    def plain(self) -> Tensor:
        """Return the features of the training pictures' evaluation views, (N, F)."""
        return self._plain("train")

    def _plain(self, name: str) -> Tensor:
        split = self._data.val if name == "val" else self._data.train
        spec = self._feed.spec
        shape = (spec.image_size, spec.resize_size, spec.interpolation)
        return self._kept(
            (f"plain {name}", shape),
            lambda: (
                self._cross(eval_batches(split, spec, self._feed.device), np.arange(len(split))),
            ),
        )[0]

    def probe(self, fit: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return the linear probe's weight, (K, F), and bias, (K,); `fit` makes it."""
        spec = self._feed.spec
        weight, bias = self._kept(("probe", spec.image_size, spec.resize_size), fit)
        return weight, bias

    def _kept(
        self, what: tuple[object, ...], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        key = ContentKey.of(self._key, *what)
        found = self._tally.get(key) if self._tally else None
        if found is not None:
            return tuple(tensor.to(self.device) for tensor in found.batches[0])
        begin = time.perf_counter()
        tensors = make()
        made_s = time.perf_counter() - begin
        if self._tally is not None:
            kept = tuple(tensor.cpu() for tensor in tensors)
            self._tally.put(key, [kept], crossing_bytes(kept), made_s)
        return tuple(tensor.to(self.device) for tensor in tensors)

    def _cross(self, batches: Iterable[Tensor], order: IntArray) -> Tensor:
        """Return the features of pictures that come in this order, in the pictures' order."""
        found: Tensor | None = None
        at = 0
        waiting = iter(batches)
        with torch.no_grad(), self._autocast, deterministic(self.device):
            while True:
                begin = time.perf_counter()
                images = next(waiting, None)
                self._data_s += time.perf_counter() - begin
                if images is None:
                    break
                rows = self._prefix(self._feed.normalize(images))[0].float()
                if found is None:
                    found = rows.new_empty(len(order), rows.shape[1])
                places = torch.from_numpy(order[at : at + len(rows)])
                found[places.to(rows.device)] = rows
                at += len(rows)
        assert found is not None and at == len(order), "every picture came once"
        return found

    def take_shared(self) -> Shared:
        """Return what was read of shared work and left there since the last call."""
        return self._tally.take() if self._tally else Shared()

    def take_data(self) -> float:
        """Return the seconds spent on views since the last call."""
        spent, self._data_s = self._data_s, 0.0
        return spent


def frozen_part(built: Network, config: TrainConfig, device: torch.device) -> nn.Module | None:
    """Return all of a network but its head, if the head is one linear layer behind a flat tensor.

    Args:
        built: The network; it is moved to the device.
        config: The run.
        device: Where it computes.

    Returns:
        None where the head is something else (a 1x1 convolution, two heads), or where the part
        before it is not the same in training and in evaluation.
    """
    if len(built.head) != 1 or not _is_linear(built.model.get_submodule(built.head[0])):
        return None
    freeze(built.model, built.stages, MAX_FREEZE_DEPTH)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model: nn.Module = built.model.to(device).to(memory_format=layout)
    halves = split_network(model, built.stages, MAX_FREEZE_DEPTH, freeze_statistics=True)
    if halves is None:
        return None
    behind = [node.op for node in halves.train_suffix.graph_module.graph.nodes]
    return halves.prefix if behind == ["placeholder", "call_module", "output"] else None


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and layer.bias is not None
