"""The one trainer: steps, evaluation and state of whatever is trained of a network."""

import dataclasses
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.transforms import v2

from core.config import TrainConfig
from core.data.draws import batch_positions
from core.device import amp_dtype, in_parts, synchronize
from core.metrics import Evaluation, IntArray, TrainingDiverged
from core.models.builder import Network
from core.models.partition import Trainable, whole
from core.training.activations import Activations, Run
from core.training.batches import Views
from core.training.optim import lr_factor, make_optimizer, parameter_groups, set_lr

# Reading a loss makes the host wait for a GPU; once in so many steps costs nothing measurable
# and still stops a diverged run within a fraction of a second.
_FINITE_CHECK_EVERY = 16


@dataclass(slots=True)
class Position:
    """How far a run has come, with the sums of its unfinished epoch."""

    total_steps: int = 0
    epoch: int = 0  # epochs done
    step: int = 0  # batches done of the next one, and their images
    n_images: int = 0
    data_s: float = 0.0  # waiting for them
    train_s: float = 0.0  # their steps


class Trainer:
    """Trains a module, on its device, on batches, step by step.

    Attributes:
        loss_sum: Sum of the losses of the epoch's images so far, ().
        micro_batch_size: Images per pass; less than asked for once memory ran out.
    """

    def __init__(self, run: Run, trained: Trainable, batches: Views | Activations) -> None:
        config, network, device = run.config, run.network, run.device
        self.position = Position()
        self.loss_sum = torch.zeros((), device=device)
        self.micro_batch_size = config.micro_batch_size or config.batch_size
        self._config, self._trained, self._device = config, trained, device
        self._batches, self._val_labels = batches, run.data.val.labels
        images = np.arange(len(run.data.train))
        self.steps_per_epoch = len(batch_positions(images, config.batch_size))
        module = self._module = trained.module
        groups = parameter_groups(module, network, config)
        self._optimizer = make_optimizer(groups, config, device)
        dtype = amp_dtype(config.amp, device)
        self._autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
        self._scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        self._ema: ModelEmaV3 | None = None
        if config.ema_decay is not None:
            self._ema = ModelEmaV3(module, decay=config.ema_decay, use_warmup=True)
        self._mix: Any = None
        if alpha := config.mixup or config.cutmix:
            kind = v2.MixUp if config.mixup else v2.CutMix
            self._mix = kind(alpha=alpha, num_classes=len(run.data.classes))
        self._kept = self._ema.module if self._ema is not None else module
        self._evaluated = trained.to_evaluate(self._kept)

    @property
    def lr_factor(self) -> float:
        """Share of their peaks that the learning rates had at the last step."""
        last = max(0, self.position.total_steps - 1)
        return lr_factor(self._config, last, self.steps_per_epoch)

    def train_epoch(self) -> Iterator[None]:
        """Train the rest of an epoch; gives control back after each step."""
        at = self.position
        self._trained.set_train_mode()
        batches = self._batches.train(at.epoch, at.step)
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            waited = time.perf_counter()
            if batch is None:
                break
            set_lr(self._optimizer, lr_factor(self._config, at.total_steps, self.steps_per_epoch))
            self.loss_sum += self._train_batch(*batch)
            at.n_images += len(batch[1])
            at.step += 1
            at.total_steps += 1
            if self._device.type == "cpu" or at.total_steps % _FINITE_CHECK_EVERY == 0:
                self._check_finite()
            at.data_s += waited - begin
            at.train_s += time.perf_counter() - waited
            yield
        begin = time.perf_counter()
        self._check_finite()  # GPU sync
        synchronize(self._device)
        at.train_s += time.perf_counter() - begin

    def end_epoch(self) -> None:
        """Go on to the next epoch."""
        self.position = Position(self.position.total_steps, self.position.epoch + 1)
        self.loss_sum = torch.zeros((), device=self._device)

    def _check_finite(self) -> None:
        if not torch.isfinite(self.loss_sum):
            raise TrainingDiverged(
                f"the training loss is no longer finite at epoch {self.position.epoch + 1}, step "
                f"{self.position.total_steps} (base_lr={self._config.base_lr:g}, "
                f"head_lr_mult={self._config.head_lr_mult:g}); lower base_lr, or set clip_norm."
            )

    def _train_batch(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Take one optimizer step; a GPU that runs out of memory gets half as much at a time."""
        if self._mix is not None:  # the labels become shares of classes
            inputs, labels = self._mix(inputs, labels)
        while True:
            try:
                loss = self._accumulate(inputs, labels)
                break
            except torch.OutOfMemoryError as err:
                self._halve(len(labels), err)
        if self._config.clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
            trained = [p for group in self._optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, self._config.clip_norm)
        try:
            self._scaler.step(self._optimizer)
        except torch.OutOfMemoryError as err:  # some weights are updated: no second try
            text = "the optimizer's state does not fit; set optimizer = sgd, or raise freeze_depth"
            raise torch.OutOfMemoryError(f"{text} ({err})") from err
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        if self._ema is not None:
            self._ema.update(self._module, step=self.position.total_steps + 1)
        return loss

    def _halve(self, n: int, err: torch.OutOfMemoryError) -> None:
        """Take half as many images at a time from now on, where that leaves enough of a batch."""
        half = (min(self.micro_batch_size, n) + 1) // 2
        # A later batch may be smaller: of three images, parts of two would leave one over.
        if half == self.micro_batch_size or not _is_enough(self._module, 3, half):
            text = f"even {self.micro_batch_size} of {n} images at a time do not fit ({err})"
            raise torch.OutOfMemoryError(text) from err
        self._optimizer.zero_grad(set_to_none=True)
        self.micro_batch_size = half

    def _accumulate(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Run forward and backward over micro-batches; return the summed loss, (), detached."""
        total = torch.zeros((), device=self._device)
        options: Any = {"reduction": "sum", "label_smoothing": self._config.label_smoothing}
        scale = 1.0 if self._config.loss_reduction == "sum" else 1.0 / len(labels)
        n_parts = -(-len(labels) // self.micro_batch_size)
        parts = zip(inputs.tensor_split(n_parts), labels.tensor_split(n_parts), strict=True)
        for images, targets in parts:  # their sizes differ by one at most
            with self._autocast:
                loss = cross_entropy(self._module(images), targets, **options)
            torch.autograd.backward(self._scaler.scale(loss * scale))
            total += loss.detach()
        return total

    def evaluate(self) -> Evaluation:
        """Evaluate the weights that would be kept on the validation split."""
        self._kept.eval()
        with self._autocast:
            logits = _logits_of(self._evaluated, self._batches.val())
            if self._config.mirrored:
                other = _logits_of(self._evaluated, self._batches.val(is_mirrored=True))
                logits = (logits + other) / 2
        return _judged(logits, self._val_labels)

    def snapshot(self) -> dict[str, Tensor]:
        """Copy the weights that were evaluated to the CPU, by their names in the network."""
        state = self._kept.state_dict()
        return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return all that later steps depend on, but for the random state; tensors are live."""
        return {
            "module": self._module.state_dict(),
            "ema": self._ema.module.state_dict() if self._ema is not None else {},
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "micro_batch_size": self.micro_batch_size,
            "position": dataclasses.asdict(self.position),
            "loss_sum": float(self.loss_sum),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of an equal run, before the first step."""
        self._module.load_state_dict(state["module"])
        if self._ema is not None:
            self._ema.module.load_state_dict(state["ema"])
        self._optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the run began on a device that needs none
            self._scaler.load_state_dict(state["scaler"])
        self.micro_batch_size = state["micro_batch_size"]
        self.position = Position(**state["position"])
        self.loss_sum = torch.tensor(state["loss_sum"], device=self._device)


def check_batches(config: TrainConfig, network: Network, n_images: int) -> None:
    """Check that a run's batches, and their parts, can be trained on; a solved head has none.

    Raises:
        ValueError: A batch has more images than there are, or a batch norm would see but one.
    """
    if config.is_solved:
        return
    batch_size, micro = config.batch_size, config.micro_batch_size or config.batch_size
    if batch_size > n_images:
        raise ValueError(
            f"train.batch_size must be <= the number of training images, {n_images}, but got "
            f"{batch_size=}. Set it smaller (--set train.batch_size={n_images})."
        )
    whole(network, config).set_train_mode()
    sizes = {len(batch) for batch in batch_positions(np.arange(n_images), batch_size)}
    if not all(_is_enough(network.model, n, micro) for n in sizes):
        raise ValueError(
            "train.batch_size and micro_batch_size must leave two images at a time or more, by "
            f"which batch norms are trained, but got {batch_size=} and micro_batch_size="
            f"{config.micro_batch_size or 'none'} for batches of {sorted(sizes)}. Set one higher, "
            "or batch_norm to frozen (--set train.batch_norm=frozen)."
        )


def _is_enough(module: nn.Module, n: int, micro_batch_size: int) -> bool:
    """Return whether parts of n images can train the module's batch norms, if any are trained."""
    least = n // -(-n // micro_batch_size)
    norms = (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return least > 1 or not any(norm.training for norm in norms)


def evaluate(model: nn.Module, batches: Iterable[Tensor], labels: IntArray) -> Evaluation:
    """Evaluate a network in eval mode on ready inputs, in the order of `labels`, (N,)."""
    return _judged(_logits_of(model, batches), labels)


def _logits_of(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    model.eval()
    with torch.inference_mode():
        return torch.cat([in_parts(model, inputs).float() for inputs in batches])


def _judged(logits: Tensor, labels: IntArray) -> Evaluation:
    return Evaluation(labels, logits.log_softmax(dim=1).cpu().numpy())  # the one transfer
