"""Train heads alone: linear layers on a frozen network's features, many of them in one pass.

A head-only run never needs the network again once it has its features, so it is trained by what is
here, by itself as a cohort of one or together with others. Every product is taken head by head and
everything else element by element, so a head's numbers do not depend on the company it keeps. Each
head's tensors begin on a boundary of 64 bytes, since a matrix product may round otherwise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.config import TrainConfig
from core.data.draws import batch_positions, epoch_order
from core.evaluate import Evaluation, IntArray, count_confusion
from core.optim import lr_factor

_BETA2, _EPS = 0.999, 1e-8  # AdamW's, PyTorch's defaults
_CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s
_ALIGNED = 16  # float32 numbers in 64 bytes
# Without it heads on 40 pictures, seen at two sizes, reached losses of 14 instead of 0.6.
_LEAST_SHARE = 0.05
_AT_ONCE = 64  # features that are measured together; a power of two


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where features are standardised to, and how a head goes there and back.

    Attributes:
        mean: Of each feature, (F,).
        std: Deviation of each feature, (F,), but at least a twentieth of the median one, so that
            a feature that hardly moves here does not explode where it does; 1 where all are 0.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Coordinates":
        """Measure training features, (N, F), a few at a time: exact copies are twice as large."""
        # Apple's GPUs have no 64-bit numbers.
        there = features.cpu() if features.device.type == "mps" else features
        means, stds = [], []
        for part in torch.split(there, _AT_ONCE, dim=1):
            exact = part.double()
            means.append(exact.mean(dim=0))
            stds.append(exact.std(dim=0, correction=0))
        mean, std = torch.cat(means), torch.cat(stds)
        std = std.clamp(min=_LEAST_SHARE * std.median())
        std = torch.where(std > 0, std, torch.ones_like(std))
        return cls(mean.float().to(features.device), std.float().to(features.device))

    @classmethod
    def unchanged(cls, n_features: int, device: torch.device) -> "Coordinates":
        """Leave features as they are."""
        return cls(torch.zeros(n_features, device=device), torch.ones(n_features, device=device))

    def apply(self, features: Tensor) -> Tensor:
        """Standardise features, (N, F), and put a column of ones behind them, (N, F + 1)."""
        n, width = features.shape
        found = features.new_ones(n, width + 1)
        torch.sub(features, self.mean, out=found[:, :-1])
        found[:, :-1] /= self.std
        return found

    def into(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Write a head of plain features, (K, F) and (K,), as one of ours, (K, F + 1)."""
        return torch.cat([weight * self.std, (bias + weight @ self.mean)[:, None]], dim=1)

    def back(self, head: Tensor) -> tuple[Tensor, Tensor]:
        """Fold a head, (K, F + 1), into weight and bias for plain features."""
        weight = head[:, :-1] / self.std
        return weight, head[:, -1] - weight @ self.mean


class Blocks:
    """One matrix a head, (M, rows, columns), each in a block of its own.

    Attributes:
        flat: The blocks, (M, block); what lies behind a matrix is zero or without meaning.
        each: The matrices, (M, rows, columns), a view of `flat`.
    """

    def __init__(self, n: int, rows: int, columns: int, device: torch.device) -> None:
        block = -(-rows * columns // _ALIGNED) * _ALIGNED
        self.flat = torch.zeros(n, block, device=device)
        self.each = self.flat[:, : rows * columns].view(n, rows, columns)

    def like(self) -> "Blocks":
        """Return zeros of the same shape."""
        n, rows, columns = self.each.shape
        return Blocks(n, rows, columns, self.flat.device)

    def keep(self, rows: Tensor) -> "Blocks":
        """Return the blocks of some heads."""
        kept = Blocks(len(rows), self.each.shape[1], self.each.shape[2], self.flat.device)
        kept.flat.copy_(self.flat[rows])
        return kept


class Lane:
    """Heads that take their steps together: same batches, same kind of optimizer.

    Args:
        configs: One run a head; they agree in `lane_key`.
        heads: How each starts, (K, F + 1).
        seed: Of the order of the pictures.
        n_train: Training pictures.
    """

    def __init__(
        self, configs: Sequence[TrainConfig], heads: Sequence[Tensor], seed: int, n_train: int
    ) -> None:
        self.configs = list(configs)
        self.seed, self.n_train = seed, n_train
        n_classes, width = heads[0].shape
        self._weights = Blocks(len(heads), n_classes, width, heads[0].device)
        self._weights.each.copy_(torch.stack(list(heads)))
        self._momentum = self._weights.like()
        first = self.configs[0]
        self._square = self._weights.like() if first.optimizer == "adamw" else None
        self._is_nesterov = first.nesterov
        self._step = 0
        self.factors = [0.0] * len(self.configs)
        self._fill()

    @property
    def weights(self) -> Tensor:
        """The heads, (M, K, F + 1)."""
        return self._weights.each

    def _fill(self) -> None:
        """Lay out what differs from head to head, (M, 1), (M, 1, 1) or (M, block)."""
        device = self.weights.device

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, device=device).view(-1, 1)

        self._beta = column([c.momentum for c in self.configs])
        self._smoothing = column([c.label_smoothing for c in self.configs])[..., None]
        self._decay = self._weights.like()
        for matrix, config in zip(self._decay.each, self.configs, strict=True):
            matrix[:, :-1] = config.weight_decay
            matrix[:, -1] = config.weight_decay if config.decay_all else 0.0
        self._is_decayed = any(config.weight_decay > 0 for config in self.configs)

    def leave(self, staying: Sequence[int]) -> None:
        """Go on with these heads only."""
        rows = torch.tensor(list(staying), dtype=torch.long, device=self.weights.device)
        self.configs = [self.configs[k] for k in staying]
        self.factors = [self.factors[k] for k in staying]
        self._weights, self._momentum = self._weights.keep(rows), self._momentum.keep(rows)
        if self._square is not None:
            self._square = self._square.keep(rows)
        self._fill()

    def state(self) -> dict[str, Tensor]:
        """Return what later steps depend on."""
        state = {
            "head": self._weights.each,
            "momentum": self._momentum.each,
            "step": torch.tensor(self._step),
        }
        return state if self._square is None else {**state, "square": self._square.each}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken, with the same heads."""
        self._weights.each.copy_(state["head"])
        self._momentum.each.copy_(state["momentum"])
        if self._square is not None:
            self._square.each.copy_(state["square"])
        self._step = int(state["step"])

    def train_epoch(self, epoch: int, features: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Take an epoch's steps.

        Args:
            epoch: Counted from 0.
            features: For each head the epoch's features in the pictures' order, (N, F + 1); heads
                in the same coordinates share one tensor.
            labels: Class numbers in the pictures' order, (N,).

        Returns:
            Each head's mean loss a picture, (M,).
        """
        order = epoch_order(self.n_train, self.seed, epoch)
        batches = batch_positions(order, self.configs[0].batch_size)
        # All that comes from the host is sent before the first step: a GPU then never waits.
        device = self.weights.device
        sizes = [len(positions) for positions in batches]
        every_row = torch.from_numpy(np.concatenate(batches)).to(device)
        rates = self._rates(len(batches)).to(device)
        total = torch.zeros(len(self.configs), device=device)
        for rows, rate in zip(torch.split(every_row, sizes), rates, strict=True):
            parts = {id(table): table[rows] for table in features}
            images = [parts[id(table)] for table in features]
            total += self._take_step(images, labels[rows], rate)
            self._step += 1
        return total / sum(sizes)

    def _rates(self, n_steps: int) -> Tensor:
        """Return the learning rates of an epoch's steps, (steps, M, 1)."""
        rows = []
        for step in range(self._step, self._step + n_steps):
            self.factors = [lr_factor(config, step, n_steps) for config in self.configs]
            peaks = [config.base_lr * config.head_lr_mult for config in self.configs]
            rows.append([peak * f for peak, f in zip(peaks, self.factors, strict=True)])
        return torch.tensor(rows)[..., None]

    def _take_step(self, images: Sequence[Tensor], labels: Tensor, rate: Tensor) -> Tensor:
        """Take one optimizer step at rates (M, 1); return each head's summed loss, (M,)."""
        log_probs = self.logits(images).log_softmax(dim=2)  # (M, B, K)
        n, n_classes = len(labels), log_probs.shape[2]
        hot = torch.nn.functional.one_hot(labels, n_classes).to(log_probs.dtype)
        targets = hot * (1 - self._smoothing) + self._smoothing / n_classes
        loss = -(targets * log_probs).sum(dim=2).sum(dim=1)
        wrong = Blocks(len(images), n, n_classes, self.weights.device)
        wrong.each.copy_(log_probs.exp_().sub_(targets))
        gradient = self._weights.like()
        for k, (part, config) in enumerate(zip(images, self.configs, strict=True)):
            if config.loss_reduction == "mean":
                wrong.each[k] /= n
            torch.mm(wrong.each[k].t(), part, out=gradient.each[k])
            if config.clip_norm is not None:
                norm = torch.linalg.vector_norm(gradient.each[k])
                gradient.flat[k] *= (config.clip_norm / (norm + _CLIP_EPS)).clamp(max=1.0)
        self._update(gradient.flat, rate)
        return loss

    def logits(self, images: Sequence[Tensor]) -> Tensor:
        """Return what each head makes of its features, (M, B, K)."""
        found = Blocks(len(images), len(images[0]), self.weights.shape[1], self.weights.device)
        for k, part in enumerate(images):
            torch.mm(part, self.weights[k].t(), out=found.each[k])
        return found.each

    def _update(self, gradient: Tensor, rate: Tensor) -> None:
        """Move all heads along their gradients, (M, block), which are used up."""
        weights, momentum = self._weights.flat, self._momentum.flat
        if self._square is not None:
            self._update_adamw(gradient, rate, self._square.flat)
            return
        if self._is_decayed:
            gradient += weights * self._decay.flat
        momentum.mul_(self._beta).add_(gradient)
        if self._is_nesterov:
            gradient += momentum * self._beta
            weights -= gradient.mul_(rate)
        else:
            weights -= momentum * rate

    def _update_adamw(self, gradient: Tensor, rate: Tensor, square: Tensor) -> None:
        weights, momentum, taken = self._weights.flat, self._momentum.flat, self._step + 1
        weights *= 1 - rate * self._decay.flat
        momentum.mul_(self._beta).add_(gradient * (1 - self._beta))
        square.mul_(_BETA2).add_(gradient.square_().mul_(1 - _BETA2))
        scale = (square / (1 - _BETA2**taken)).sqrt_().add_(_EPS)
        weights -= momentum / (1 - self._beta**taken) / scale * rate

    def evaluate(self, features: Sequence[Tensor], labels: IntArray) -> list[Evaluation]:
        """Evaluate every head on a split's features, one (N, F + 1) a head."""
        log_probs = self.logits(features).log_softmax(dim=2).cpu().numpy()
        found = []
        for rows in log_probs:
            predicted = rows.argmax(axis=1).astype(np.int64)
            confusion = count_confusion(labels, predicted, rows.shape[1])
            found.append(Evaluation(labels, rows, confusion))
        return found
