"""One run's part in shared work: what it takes from the cache, and what it leaves there."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.config import TrainConfig
from core.data.splits import ImageData
from core.device import amp_dtype
from core.entry_keys import ContentKey, pictures_key, prefix_key
from core.feed import Feed, eval_batches
from core.metrics import Shared
from core.models.builder import Network
from core.prefix_cache import PrefixCache
from core.segments import middle
from core.split import Crossing, Half, Halves
from core.tally import Making, Tally


def can_share(config: TrainConfig, device: torch.device) -> bool:
    """Say whether a run's pixels and frozen outputs may be shared with others, to the bit.

    Not where a batch's pictures are blended (the blend is the run's own), where the evaluated
    weights are an average (rounding moves frozen ones too), where the network is compiled, or
    where gradients are accumulated over parts of a batch. On a GPU, only the features of runs
    that train the head alone are shared so far (`core.features`).
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


@dataclass(slots=True)
class _Shallower:
    """An entry of a shallower level to start from.

    Attributes:
        batches: What crosses there, with labels behind it in training.
        built_s: Seconds that making them took.
        rest: The frozen layers from there to the run's own level.
    """

    batches: Iterable[Any]
    built_s: float
    rest: Half


class Sharing:
    """Reads and fills the cache for one run.

    Where what crosses the run's own cut is not there, but what crosses a shallower one is, the run
    starts from that: the layers between give the same bits as the whole prefix.

    Args:
        cache: What the runs share.
        config: The run.
        built: Its network, as it starts.
        data: Pictures.
        feed: Views of them.
        halves: The network cut at the run's freeze level; None where nothing is frozen, or where
            frozen outputs cannot be kept.
    """

    def __init__(
        self,
        cache: PrefixCache,
        config: TrainConfig,
        built: Network,
        data: ImageData,
        feed: Feed,
        halves: Halves | None,
    ) -> None:
        self.cache = cache
        self.config = config
        self.built = built
        self.data = data
        self.feed = feed
        self.halves = halves
        spec = feed.spec
        # A view is a function of (seed, epoch, picture), the order too; batches are cut from it.
        self._pictures = pictures_key(data, data.train)
        evaluation = (spec.image_size, spec.resize_size, spec.interpolation)
        self._val_views = ContentKey.of("val views", pictures_key(data, data.val), evaluation)
        depth = config.freeze_depth if halves is not None else 0
        self._prefixes = [prefix_key(config, built, low) for low in range(1, depth + 1)]
        self._tally = Tally(cache)
        self._making: Making | None = None
        # What crossed, as it was when it was kept: the suffix must not have written into it.
        self._crossed: list[tuple[Tensor, int]] = []
        self._is_written = False

    def _views_key(self, epoch: int) -> ContentKey:
        spec, config = self.feed.train_spec(epoch), self.config
        return ContentKey.of("views", self._pictures, spec, config.seed, config.batch_size, epoch)

    def _train_key(self, epoch: int, depth: int) -> ContentKey:
        return ContentKey.of("train", self._views_key(epoch), self._prefixes[depth - 1])

    def _val_key(self, depth: int) -> ContentKey:
        return ContentKey.of("val", self._val_views, self._prefixes[depth - 1])

    def train(self, epoch: int) -> Iterator[Batch]:
        """Iterate over an epoch's batches; of those that do not cross yet `keep` is told."""
        if self.halves is None:
            for images, labels in self._view_batches(epoch):
                yield Batch(self.feed.normalize(images), labels, False)
            return
        depth = self.config.freeze_depth
        key = self._train_key(epoch, depth)
        found = self._tally.get(key)
        if found is not None:
            for *crossing, labels in found.batches:
                yield Batch(tuple(crossing), labels, True)
            return
        start = self._shallower([self._train_key(epoch, low) for low in range(1, depth)])
        self._making = making = Making(self._tally, key)
        self._crossed = []
        try:
            if start is not None:
                yield from self._deeper(start)
            else:
                for images, labels in self._view_batches(epoch):
                    yield Batch(self.feed.normalize(images), labels, False)
            self._is_written |= any(tensor._version != was for tensor, was in self._crossed)
            if not self._is_written:
                making.finish()
        finally:
            making.give_up()  # nothing is left to give up of a finished one
            self._making = None
            self._crossed = []

    def keep(self, crossing: Crossing, labels: Tensor, seconds: float) -> None:
        """Remember what a batch's frozen layers gave, until the epoch is whole."""
        assert self._making is not None, "a batch crosses while its epoch is made"
        tensors = [value for value in crossing if isinstance(value, Tensor)]
        self._crossed += [(tensor, tensor._version) for tensor in tensors]
        self._making.add((*crossing, labels), seconds)

    def _shallower(self, keys: list[ContentKey]) -> _Shallower | None:
        """Return the deepest entry of those at levels 1, 2, ... that is there, if any."""
        assert self.halves is not None, "asked for by runs with a frozen prefix"
        for low in range(len(keys), 0, -1):
            if not self.cache.has(keys[low - 1]):
                continue
            rest = middle(
                self.built.model,
                self.halves.prefix,
                self.built.stages,
                low,
                self.config.freeze_depth,
            )
            found = self._tally.get(keys[low - 1]) if rest is not None else None
            if rest is not None and found is not None:
                return _Shallower(found.batches, found.built_s, rest)
        return None

    def _deeper(self, start: _Shallower) -> Iterator[Batch]:
        """Go on from what crosses a shallower cut."""
        assert self._making is not None, "an epoch is made"
        self._making.built_s += start.built_s
        for *crossing, labels in start.batches:
            begin = time.perf_counter()
            with torch.no_grad():
                deeper: Crossing = start.rest(*crossing)
            self.keep(deeper, labels, time.perf_counter() - begin)
            yield Batch(deeper, labels, True)

    def _view_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over an epoch's views, uint8, from the cache or made and left there."""
        key = self._views_key(epoch)
        found = self._tally.get(key)
        if found is not None:
            self._count_views(found.built_s)
            yield from found.batches
            return
        making = Making(self._tally, key)
        try:
            for batch, seconds in _timed(self.feed.views(epoch)):
                making.add(batch, seconds)
                self._count_views(seconds)
                yield batch
            making.finish()
        finally:
            making.give_up()

    def _count_views(self, seconds: float) -> None:
        """Count what views cost: who reads what crossed is spared that, too."""
        if self._making is not None:
            self._making.built_s += seconds

    def val(self) -> Iterator[Any]:
        """Iterate over the validation split: normalised pictures, or what crosses the cut."""
        if self.halves is None:
            yield from map(self.feed.normalize, self._val_view_batches())
            return
        depth = self.config.freeze_depth
        key = self._val_key(depth)
        found = self._tally.get(key)
        if found is not None:
            yield from found.batches
            return
        start = self._shallower([self._val_key(low) for low in range(1, depth)])
        making = Making(self._tally, key)
        making.built_s += start.built_s if start is not None else 0.0
        try:
            for crossing, seconds in _timed(self._val_crossings(start)):
                making.add(crossing, seconds)
                yield crossing
            if not self._is_written:  # seen in training; inference tensors count no writes
                making.finish()
        finally:
            making.give_up()

    def _val_crossings(self, start: _Shallower | None) -> Iterator[Crossing]:
        assert self.halves is not None, "asked for by runs with a frozen prefix"
        if start is not None:
            for crossing in start.batches:
                yield start.rest(*crossing)
            return
        for images in self._val_view_batches():
            yield self.halves.prefix(self.feed.normalize(images))

    def _val_view_batches(self) -> Iterator[Tensor]:
        found = self._tally.get(self._val_views)
        if found is not None:
            for (images,) in found.batches:
                yield images
            return
        making = Making(self._tally, self._val_views)
        try:
            for images, seconds in _timed(
                eval_batches(self.data.val, self.feed.spec, self.feed.device)
            ):
                making.add((images,), seconds)
                yield images
            making.finish()
        finally:
            making.give_up()

    def take(self) -> Shared:
        """Return what was read and left since the last call."""
        return self._tally.take()


def _timed(batches: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Iterate over batches with the seconds that making each took."""
    waiting = iter(batches)
    while True:
        begin = time.perf_counter()
        batch = next(waiting, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - begin
