"""A network in training: its steps, what it shares with others, its state."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy import random as nprandom
from numpy.random import Philox
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from core.config import TrainConfig
from core.data.splits import ImageData
from core.device import amp_dtype, synchronize
from core.evaluate import Evaluation, evaluate
from core.feed import Feed
from core.metrics import Shared, TrainingDiverged
from core.models.builder import Network
from core.models.freeze_stages import freeze, train_mode
from core.optim import lr_factor, make_optimizer, parameter_groups, set_lr
from core.prefix_cache import PrefixCache
from core.run_state import read_state, write_state
from core.sharing import Batch, Sharing
from core.split import Halves, split_network

# Reading a loss makes the host wait for a GPU; once in so many steps costs nothing measurable
# and still stops a diverged run within a fraction of a second.
_FINITE_CHECK_EVERY = 16
_TAG_MIX = 102


class NetworkRun:
    """A network with its optimizer, as it goes through the epochs of `fit`.

    Args:
        config: The run.
        built: Its network; it is moved to the device and trained in place.
        device: Where it is trained.

    Attributes:
        model: The network.
        step: Optimizer steps taken.
        lr_factor: Of the last step, in [0, 1]: rates are their peaks times this.
        micro_batch_size: Pictures per pass; less than asked for once memory ran out.
    """

    def __init__(self, config: TrainConfig, built: Network, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.stages = built.stages
        self.freeze_statistics = config.batch_norm == "frozen" or (
            config.batch_norm == "auto" and built.weights != "none"
        )
        trainable = freeze(built.model, built.stages, config.freeze_depth)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model: nn.Module = built.model.to(device).to(memory_format=layout)
        groups = parameter_groups(self.model, trainable, built.head, config)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(groups, config, device)
        self.forward: Any = torch.compile(self.model) if config.compile else self.model
        dtype = amp_dtype(config.amp, device)
        self.autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        self.ema = self._start_ema()
        self.micro_batch_size = config.micro_batch_size or config.batch_size
        self.step = 0
        self.lr_factor = 0.0
        self.sharing: Sharing | None = None
        self.halves: Halves | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def share(self, cache: PrefixCache, built: Network, data: ImageData, feed: Feed) -> None:
        """Take part in shared work: cut the network where its frozen part ends."""
        if self.config.freeze_depth:
            self.halves = split_network(
                self.model,
                self.stages,
                self.config.freeze_depth,
                freeze_statistics=self.freeze_statistics,
            )
        self.sharing = Sharing(cache, self.config, built, data, feed, self.halves)

    def take_shared(self) -> Shared:
        """Return what was read of shared work and left there since the last call."""
        return self.sharing.take() if self.sharing else Shared()

    def _start_ema(self) -> ModelEmaV3 | None:
        if self.config.ema_decay is None:
            return None
        return ModelEmaV3(self.model, decay=self.config.ema_decay, use_warmup=True)

    def _train_mode(self) -> None:
        train_mode(
            self.model,
            self.stages,
            self.config.freeze_depth,
            freeze_statistics=self.freeze_statistics,
        )

    def train_epoch(self, epoch: int, feed: Feed) -> tuple[float, float, int]:
        """Train one epoch.

        Returns:
            Mean training loss per picture, seconds spent waiting for pictures, and how many
            pictures there were.
        """
        self._train_mode()
        total = torch.zeros((), device=self.device)
        data_s, n_images = 0.0, 0
        batches = self._batches(epoch, feed)
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            data_s += time.perf_counter() - begin
            if batch is None:
                break
            images, labels = self._behind_prefix(batch), batch.labels
            self.lr_factor = lr_factor(self.config, self.step, feed.steps_per_epoch)
            set_lr(self.optimizer, self.lr_factor)
            total += self._train_batch(images, labels, epoch)
            n_images += len(labels)
            self.step += 1
            if self.device.type == "cpu" or self.step % _FINITE_CHECK_EVERY == 0:
                self._check_finite(total, epoch)
        self._check_finite(total, epoch)  # GPU sync
        synchronize(self.device)
        return float(total) / n_images, data_s, n_images

    def _batches(self, epoch: int, feed: Feed) -> Iterator[Batch]:
        if self.sharing is not None:
            yield from self.sharing.train(epoch)
            return
        for images, labels in feed.views(epoch):
            yield Batch(feed.normalize(images), labels, False)

    def _behind_prefix(self, batch: Batch) -> Any:
        """Return a batch's inputs; with shared work, what its frozen layers make of them."""
        if self.halves is None or self.sharing is None or batch.is_crossing:
            return batch.inputs
        begin = time.perf_counter()
        with torch.no_grad():
            crossing = self.halves.prefix(batch.inputs)
        self.sharing.keep(crossing, batch.labels, time.perf_counter() - begin)
        return crossing

    def _check_finite(self, total: Tensor, epoch: int) -> None:
        if not torch.isfinite(total):
            raise TrainingDiverged(
                f"the training loss is no longer finite at epoch {epoch}, step {self.step} "
                f"(base_lr={self.config.base_lr:g}, head_lr_mult={self.config.head_lr_mult:g}); "
                "lower base_lr, or set clip_norm."
            )

    def _train_batch(self, images: Any, labels: Tensor, epoch: int) -> Tensor:
        """Take one optimizer step; a GPU that runs out of memory gets half as much at a time."""
        mixed = self._mix(images, labels, epoch)
        while True:
            try:
                loss = self._accumulate(*mixed)
                break
            except torch.OutOfMemoryError:
                if self.micro_batch_size == 1:
                    raise
                self.optimizer.zero_grad(set_to_none=True)
                self.micro_batch_size = (min(self.micro_batch_size, len(labels)) + 1) // 2
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        if self.config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model, step=self.step + 1)
        return loss

    def _accumulate(self, images: Any, labels: Tensor, partners: Tensor, lam: float) -> Tensor:
        """Run forward and backward over micro-batches; return the summed loss, (), detached."""
        n = len(labels)
        total = torch.zeros((), device=self.device)
        smoothing = self.config.label_smoothing
        scale = 1.0 if self.config.loss_reduction == "sum" else 1.0 / n
        for at in range(0, n, self.micro_batch_size):
            part = slice(at, at + self.micro_batch_size)
            with self.autocast:
                logits = (
                    self.forward(images[part])
                    if self.halves is None
                    else self.halves.train_suffix(images)  # whole batches, or nothing is shared
                )
                loss = lam * cross_entropy(
                    logits, labels[part], reduction="sum", label_smoothing=smoothing
                )
                if lam < 1:
                    loss = loss + (1 - lam) * cross_entropy(
                        logits, partners[part], reduction="sum", label_smoothing=smoothing
                    )
            torch.autograd.backward(self.scaler.scale(loss * scale))
            total += loss.detach()
        return total

    def _mix(self, images: Any, labels: Tensor, epoch: int) -> tuple[Any, Tensor, Tensor, float]:
        """Blend each picture with its mirror in the batch (mixup), or paste a box of it (CutMix).

        The share is drawn from (seed, epoch, step) alone.
        """
        alpha = self.config.mixup or self.config.cutmix
        if not alpha:
            return images, labels, labels, 1.0
        key = np.random.SeedSequence((self.config.seed, _TAG_MIX, epoch, self.step))
        rng = nprandom.Generator(Philox(key))
        lam = float(rng.beta(alpha, alpha))
        if self.config.mixup:
            images = images.mul(lam).add_(images.flip(0), alpha=1 - lam)
        else:
            images, lam = _cut_mix(images, lam, rng)
        return images, labels, labels.flip(0), lam

    def evaluate(self, feed: Feed) -> Evaluation:
        """Evaluate the weights that would be kept on the validation split."""
        model = self.ema.module if self.ema is not None else self.model
        batches = feed.val() if self.sharing is None else self.sharing.val()
        if self.halves is not None:
            model = self.halves.eval_suffix
        with self.autocast:
            return evaluate(model, batches, feed.val_labels)

    def snapshot(self) -> dict[str, Tensor]:
        """Copy the weights that were evaluated to the CPU."""
        model = self.ema.module if self.ema is not None else self.model
        return {k: v.detach().to("cpu", copy=True) for k, v in model.state_dict().items()}

    def state(self) -> dict[str, Tensor]:
        """Return what later epochs depend on, by name; the tensors are the live ones."""
        average = self.ema.module if self.ema is not None else None
        self._train_mode()
        return {
            **read_state(self.model, average, self.optimizer, self.scaler),
            "step": torch.tensor(self.step),
            "micro_batch_size": torch.tensor(self.micro_batch_size),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over a state, before the first epoch.

        Raises:
            ValueError: It is not the state of such a run; nothing has been changed then.
            LookupError: The same.
        """
        step, micro_batch_size = int(state["step"]), int(state["micro_batch_size"])
        average = self.ema.module if self.ema is not None else None
        self._train_mode()
        write_state(state, self.model, average, self.optimizer, self.scaler)
        self.step, self.micro_batch_size = step, micro_batch_size


def _cut_mix(images: Tensor, lam: float, rng: nprandom.Generator) -> tuple[Tensor, float]:
    """Paste a box of the mirrored batch; return the pictures and the share left uncovered."""
    height, width = images.shape[-2:]
    cut = float(np.sqrt(1 - lam))
    row, column = int(rng.integers(height)), int(rng.integers(width))
    half_h, half_w = int(height * cut) // 2, int(width * cut) // 2
    rows = slice(max(0, row - half_h), min(height, row + half_h))
    columns = slice(max(0, column - half_w), min(width, column + half_w))
    mixed = images.clone()
    mixed[..., rows, columns] = images.flip(0)[..., rows, columns]
    covered = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, 1 - covered / (height * width)
