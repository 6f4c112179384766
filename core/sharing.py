"""One run's part in shared work: what it takes from the cache, and what it leaves there."""

import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.build import Built
from core.config import TrainConfig
from core.data import ImageData
from core.device import amp_dtype
from core.feed import Feed, eval_batches
from core.prefix_cache import PrefixCache
from core.split import Crossing, Halves, crossing_bytes


def can_share(config: TrainConfig, device: torch.device) -> bool:
    """Say whether a run's pixels and frozen outputs may be shared with others, to the bit.

    Not where a batch's pictures are blended (the blend is the run's own), where the evaluated
    weights are an average (rounding moves frozen ones too), where the network is compiled, or
    where gradients are accumulated over parts of a batch. On a GPU nothing is shared yet.
    """
    own = config.mixup or config.cutmix or config.ema_decay is not None or config.compile
    whole = config.micro_batch_size in (None, config.batch_size)
    return device.type == "cpu" and not own and whole and amp_dtype(config.amp, device) is None


@dataclass(slots=True)
class Batch:
    """A training batch.

    Attributes:
        inputs: Normalised pictures, (N, 3, S, S), or what crosses the cut.
        labels: Class numbers, (N,).
        is_crossing: Whether `inputs` are what crosses.
    """

    inputs: Any
    labels: Tensor
    is_crossing: bool


class _Making:
    """An entry in the making: it is kept when it is whole, or given up."""

    def __init__(self, cache: PrefixCache, key: Hashable) -> None:
        self.cache = cache
        self.key = key
        self.batches: list[Any] | None = []
        self.size_bytes = 0
        self.made_s = 0.0

    def add(self, batch: Any, size_bytes: int, seconds: float) -> None:
        """Add a batch, unless there is no room for it."""
        self.made_s += seconds
        self.size_bytes += size_bytes
        if self.batches is None:
            return
        self.batches.append(batch)
        if not self.cache.reserve(self.key, self.size_bytes, self.made_s):
            self.give_up()

    def finish(self) -> None:
        """Leave the entry in the cache."""
        if self.batches is not None:
            self.cache.put(self.key, self.batches, self.size_bytes, self.made_s)
            self.batches = None

    def give_up(self) -> None:
        """Forget the batches, if there are any left."""
        if self.batches is not None:
            self.cache.release(self.key)
            self.batches = None


class Sharing:
    """Reads and fills the cache for one run.

    Attributes:
        saved_s: Seconds that reading saved since the last `take_saved`.
    """

    def __init__(
        self,
        cache: PrefixCache,
        config: TrainConfig,
        built: Built,
        data: ImageData,
        feed: Feed,
        halves: Halves | None,
    ) -> None:
        self.cache = cache
        self.config = config
        self.data = data
        self.feed = feed
        self.halves = halves
        self.saved_s = 0.0
        spec = feed.spec
        pictures = (data.fingerprint, str(data.train.store.folder))
        # A view is a function of (seed, epoch, picture), the order too; batches are cut from it.
        self._views: Hashable = ("views", pictures, spec, config.seed, config.batch_size)
        self._val_views: Hashable = (
            "val views",
            pictures,
            (spec.image_size, spec.resize_size, spec.interpolation),
        )
        self._prefix: Hashable = (
            config.backbone,
            _weights_key(built.weights),
            config.seed if built.weights == "none" else None,
            config.freeze_depth,
            built.preprocessing,
            config.channels_last,
            torch.get_num_threads(),
        )
        self._making: _Making | None = None
        # What crossed, as it was when it was kept: the suffix must not have written into it.
        self._crossed: list[tuple[Tensor, int]] = []
        self._is_written = False

    def train(self, epoch: int) -> Iterator[Batch]:
        """Iterate over an epoch's batches; of those that do not cross yet `keep` is told."""
        if self.halves is None:
            for images, labels in self._view_batches(epoch):
                yield Batch(self.feed.normalize(images), labels, False)
            return
        key = ("train", self._views, epoch, self._prefix)
        found = self._read(key)
        if found is not None:
            for crossing, labels in found:
                yield Batch(crossing, labels, True)
            return
        self._making = making = _Making(self.cache, key)
        self._crossed = []
        try:
            for images, labels in self._view_batches(epoch):
                yield Batch(self.feed.normalize(images), labels, False)
            self._is_written |= any(tensor._version != was for tensor, was in self._crossed)
            if not self._is_written:
                making.finish()
        finally:
            making.give_up()  # nothing is left to give up of a finished one
            self._crossed = []

    def keep(self, crossing: Crossing, labels: Tensor, seconds: float) -> None:
        """Remember what a batch's frozen layers gave, until the epoch is whole."""
        assert self._making is not None, "a batch crosses while its epoch is made"
        tensors = [value for value in crossing if isinstance(value, Tensor)]
        self._crossed += [(tensor, tensor._version) for tensor in tensors]
        self._making.add((crossing, labels), crossing_bytes(crossing), seconds)

    def _view_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over an epoch's views, uint8, from the cache or made and left there."""
        key = (self._views, epoch)
        found = self._read(key)
        if found is not None:
            yield from found
            return
        making = _Making(self.cache, key)
        batches = self.feed.views(epoch)
        try:
            while True:
                begin = time.perf_counter()
                batch = next(batches, None)
                seconds = time.perf_counter() - begin
                if batch is None:
                    break
                making.add(batch, batch[0].numel(), seconds)
                if self._making is not None:
                    self._making.made_s += seconds
                yield batch
            making.finish()
        finally:
            making.give_up()

    def val(self) -> Iterator[Any]:
        """Iterate over the validation split: normalised pictures, or what crosses the cut."""
        if self.halves is None:
            yield from map(self.feed.normalize, self._val_views_batches())
            return
        key = ("val", self._val_views, self._prefix)
        found = self._read(key)
        if found is not None:
            yield from found
            return
        kept: list[Crossing] = []
        made_s = 0.0
        for images in self._val_views_batches():
            begin = time.perf_counter()
            crossing = self.halves.prefix(self.feed.normalize(images))
            made_s += time.perf_counter() - begin
            kept.append(crossing)
            yield crossing
        if self._is_written:  # seen in training; inference tensors keep no count of writes
            return
        self.cache.put(key, kept, sum(map(crossing_bytes, kept)), made_s)

    def _val_views_batches(self) -> Iterator[Tensor]:
        found = self._read(self._val_views)
        if found is not None:
            yield from found
            return
        begin = time.perf_counter()
        kept = list(eval_batches(self.data.val, self.feed.spec, self.feed.device))
        made_s = time.perf_counter() - begin
        self.cache.put(self._val_views, kept, sum(images.numel() for images in kept), made_s)
        yield from kept

    def _read(self, key: Hashable) -> list[Any] | None:
        found = self.cache.get(key)
        if found is None:
            return None
        self.saved_s += found[1]
        return found[0]

    def take_saved(self) -> float:
        """Return the seconds saved since the last call."""
        saved, self.saved_s = self.saved_s, 0.0
        return saved


def _weights_key(source: str) -> Hashable:
    """Tell weights apart: a file by its state too, since it may be replaced."""
    path = Path(source)
    if path.is_file():
        state = path.stat()
        return (source, state.st_mtime_ns, state.st_size)
    return source
