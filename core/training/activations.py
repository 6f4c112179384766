"""What the trainer is fed behind a frozen prefix: rows of arrays that runs share.

A frozen prefix turns a view of a split into an array of one row per image, in the images' order.
It is always computed in the same chunks, whatever the batch size and wherever the array lies, so
that equal settings give equal bits: cached or not, in any process, with any number of workers.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from core.cache import ArrayCache
from core.config import MAX_FREEZE_DEPTH, TrainConfig
from core.data.draws import IntArray
from core.data.splits import ImageData, Split
from core.device import amp_dtype, in_parts
from core.keys import images_key, prefix_key
from core.metrics import Interrupted
from core.models.builder import Network
from core.models.freeze_stages import Stages
from core.models.fx_graph import fold_norms
from core.models.layers import find_layers, tap
from core.models.partition import MakePrefix, check_head
from core.training.batches import Views, in_order

# Images that go through the prefix at once. On two cores 16, 32 and 64 were equally fast, and took
# 1.1, 1.5 and 2.8 GB (EfficientNet-Lite2, 260 px); 256 on a GPU is an assumption.
_CHUNK_CPU, _CHUNK_GPU = 16, 256
# A row is kept where computing it takes so many FLOPs for each of its bytes: reading it back then
# saves more than it costs. Between levels 2 and 3 of EfficientNet-Lite0 (518 and 1,830), whose
# warm runs were measured 1.33 and 1.61 times as fast; below, gains were within the noise.
_FLOPS_PER_BYTE = 1000


def is_kept(stages: Stages, config: TrainConfig) -> bool:
    """Return whether rows are worth keeping at the configuration's freeze level.

    The rule is static, so that the way a run is computed depends on its settings alone, and a run
    can be continued on another device.
    """
    depth = config.freeze_depth
    if depth == 0 or config.mixup or config.cutmix:  # blends of images are a batch's own
        return False
    if depth == MAX_FREEZE_DEPTH:
        return True
    return sum(stages.flops[:depth]) >= _FLOPS_PER_BYTE * 4 * stages.numels[depth - 1]


@dataclass(frozen=True, slots=True)
class Run:
    """What a run is computed from, and what says that it must stop."""

    config: TrainConfig
    network: Network
    data: ImageData
    cache: ArrayCache
    should_stop: Callable[[], bool]

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.model.parameters()).device

    def pulse(self) -> None:
        """Raise `Interrupted` where the run must stop; called per step and chunk of images."""
        if self.should_stop():
            raise Interrupted


def evaluation_features(run: Run) -> Tensor:
    """Return what a solved head sees of the training and then the validation images, (N, F).

    The pooled outputs of several layers are kept as one array, the last layer's at its end.

    Raises:
        BackboneError: The head is not one linear layer.
    """
    config, network, data = run.config, run.network, run.data
    check_head(network, config)
    layers = find_layers(network)
    run = replace(run, config=replace(config, freeze_depth=MAX_FREEZE_DEPTH))
    rows = Activations(run, lambda: tap(network.model, layers), layers)
    n_last = network.model.get_parameter(f"{network.head[0]}.weight").shape[1]

    def read(split: Split) -> Tensor:
        everything = torch.arange(len(split))
        found = rows.evaluation_rows(split)(everything)
        if config.mirrored:
            found = (found + rows.evaluation_rows(split, is_mirrored=True)(everything)) / 2
        return found if config.features == "several" else found[:, -n_last:]

    return torch.cat([read(data.train), read(data.val)])


class Activations:
    """Batches of rows behind a frozen prefix, as `Views` gives images.

    `layers` name those whose pooled outputs the rows are.
    """

    def __init__(self, run: Run, make_prefix: MakePrefix, layers: tuple[str, ...] = ()) -> None:
        config, device = run.config, run.device
        self._run = run
        self._views = Views(config, run.network.preprocessing, run.data, device)
        self._chunk = _CHUNK_CPU if device.type == "cpu" else _CHUNK_GPU
        self._make_prefix = make_prefix
        self._prefix: nn.Module | None = None
        self._key = prefix_key(config, run.network, device, make_prefix, layers)
        dtype = amp_dtype(config.amp, device)
        self._autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
        self._labels = torch.from_numpy(run.data.train.labels)
        self._val: dict[bool, Callable[[Tensor], Tensor]] = {}

    def train(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over an epoch's rows (N, ...) and labels (N,) from a batch on."""
        views = self._run.config.views
        rows = self._train_rows(epoch % views if views else epoch)
        for positions in map(torch.from_numpy, self._views.order(epoch)[first:]):
            labels = self._labels[positions].to(self._run.device, non_blocking=True)
            yield self._ready(rows(positions)), labels

    def val(self, *, is_mirrored: bool = False) -> Iterator[Tensor]:
        """Iterate over the validation split's rows, or its mirror images', in its order."""
        split = self._run.data.val
        if is_mirrored not in self._val:
            self._val[is_mirrored] = self.evaluation_rows(split, is_mirrored=is_mirrored)
        for positions in in_order(len(split), self._chunk):
            yield self._ready(self._val[is_mirrored](torch.from_numpy(positions)))

    def _ready(self, rows: Tensor) -> Tensor:
        rows = rows.to(self._run.device, non_blocking=True)
        return rows.permute(0, 3, 1, 2) if rows.ndim == 4 else rows

    def _train_rows(self, draw: int) -> Callable[[Tensor], Tensor]:
        config, shown, split = self._run.config, self._views.shown, self._run.data.train
        if config.augment == "none":  # the evaluation view, the same in every epoch
            return self.evaluation_rows(split)
        crop = (shown.image_size, shown.interpolation, config.crop_scale, config.flip)
        policy = (config.augment, config.rand_magnitude if config.augment == "rand" else None)
        images = images_key(split.store, split.indices)
        key = (images, crop, policy, self._views.is_made_on_device, config.seed, draw)
        return self._rows(split, key, lambda chunks: self._views.train_inputs(draw, chunks))

    def evaluation_rows(
        self, split: Split, *, is_mirrored: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """Return what gives the rows of a split's evaluation views at some positions."""
        store = self._run.data.views.store(
            self._views.shown, lambda done, total: self._run.pulse()
        )
        views = images_key(store, split.indices)

        def inputs(chunks: list[IntArray]) -> Iterator[Tensor]:
            for images in self._views.eval_inputs(split, chunks):
                yield images.flip(-1) if is_mirrored else images

        return self._rows(split, (views, is_mirrored), inputs)

    def _rows(
        self,
        split: Split,
        view: tuple[object, ...],
        inputs: Callable[[list[IntArray]], Iterator[Tensor]],
    ) -> Callable[[Tensor], Tensor]:
        n = len(split)
        chunks = in_order(n, self._chunk)
        key = json.dumps((view, self._key))
        array = self._run.cache.get(key, n, lambda: self._computed(inputs(chunks)))
        if array is not None:
            return lambda positions: array[positions]  # a copy, so nothing writes into the array

        def compute(positions: Tensor) -> Tensor:
            needed, place = torch.unique(positions // self._chunk, return_inverse=True)
            found = list(self._computed(inputs([chunks[k] for k in needed.tolist()])))
            starts = torch.tensor([0, *map(len, found)]).cumsum(0)
            return torch.cat(found)[starts[place] + positions % self._chunk]

        return compute

    def _computed(self, inputs: Iterator[Tensor]) -> Iterator[Tensor]:
        """Send chunks through the prefix; rows of images come out channels last, on the CPU."""
        if self._prefix is None:
            self._prefix = fold_norms(self._make_prefix())
        for images in inputs:
            self._run.pulse()
            with torch.no_grad(), self._autocast:
                rows = in_parts(self._prefix, images)
            yield (rows.permute(0, 2, 3, 1) if rows.ndim == 4 else rows).contiguous().cpu()
