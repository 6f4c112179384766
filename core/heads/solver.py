"""Solve a linear head: multinomial logistic regression on standardised features.

The features are turned into the eigenbasis of their Gram matrix, where the Hessian is nearly
diagonal, so that L-BFGS scaled by that diagonal needs few steps. All folds share one matrix
product per step. Strengths are tried from the strongest on, each from the heads of the one before,
and only until the out-of-fold loss rises.

A strength is given as `decay`: the factor of half the squared weights beside the mean loss over
all N rows. scikit-learn's is C = 1 / (decay * N), and it is C that the folds and the last fit
share: a fit of n rows is penalised by 1 / (C * n).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

_DEFAULT_C = [10 ** (k / 2) for k in range(-8, 5)]  # 1e-4 to 100; 0.003 to 0.1 are usual
_RISE = 1.01  # a loss by so much above the least ends the path
_CHOICE_ROWS = 10_000  # the strength is chosen on so many rows at most
_LEAST_SPREAD = 0.05  # of the median; nearly constant features gave losses of 14 instead of 0.6
_CHUNK_ROWS = 4096
_HISTORY = 10
_MAX_STEPS = 500
_MAX_SEARCH = 12
_LOOSE = 3e-3  # norm of the scaled gradient, squared about twice the loss to gain: for the choice
_TIGHT = 2e-4  # for what is returned; within 1e-3 of scikit-learn's probabilities at tol=1e-6


@dataclass(frozen=True, slots=True)
class SolvedHead:
    """A solved head and how its strength was chosen.

    Attributes:
        weight: Of the head fitted on all rows, for features as they are, (K, F).
        bias: (K,).
        apart: Weight and bias of the head fitted on all rows but those of fold 0.
        oof_log_loss: Mean out-of-fold log-loss per strength tried, strongest first.
        oof_log_probs: Out-of-fold log-probabilities at the chosen strength, (N, K).
    """

    weight: Tensor
    bias: Tensor
    apart: tuple[Tensor, Tensor]
    oof_log_loss: dict[float, float]
    oof_log_probs: Tensor


def solve_head(
    features: Tensor,
    labels: Tensor,
    n_classes: int,
    fold_of: Tensor,
    decay: Sequence[float] | None = None,
    pulse: Callable[[], None] = lambda: None,
) -> SolvedHead:
    """Choose the strength by out-of-fold log-loss and fit all rows with it.

    Args:
        features: (N, F); float64 is solved in float64, everything else in float32.
        labels: Class numbers, (N,).
        n_classes: K, at least 2.
        fold_of: Fold number of each row, (N,).
        decay: Strengths to try. By default C from 1e-4 to 100 in half decades.
        pulse: Called at every step; what it raises ends the work.

    Raises:
        ValueError: For features that are not finite, or folds that leave nothing to fit.
    """
    n, device = len(features), features.device
    if not all(bool(part.isfinite().all()) for part in torch.split(features, _CHUNK_ROWS)):
        raise ValueError("features must be finite: they hold NaN or infinity")
    if device.type == "mps":  # has neither float64 nor eigh
        features = features.cpu()
    labels, fold_of = labels.to(features.device), fold_of.to(features.device)
    picked = _by_class(labels)[:: math.ceil(n / _CHOICE_ROWS)].sort().values
    n_folds = int(fold_of.max()) + 1
    masks = torch.stack([fold_of[picked] != k for k in range(n_folds)], dim=1)
    if n_folds < 2 or not bool(masks.any(dim=0).all()):
        raise ValueError(f"folds must leave rows to fit: {n_folds} folds of {n} rows")

    basis = _Basis(features, picked)
    hot = one_hot(labels, n_classes).to(basis.rows.dtype)
    both = torch.stack([masks.new_ones(n), fold_of != 0], dim=1)
    everything = _Fits(basis.scale, basis.rows, hot, both, pulse)
    rows, hot = (basis.rows, hot) if len(picked) == n else (basis.rows[picked], hot[picked])
    folds = _Fits(basis.scale, rows, hot, masks, pulse)
    path = [1 / (c * n) for c in _DEFAULT_C] if decay is None else decay
    found: dict[float, Tensor] = {}
    losses: dict[float, float] = {}
    heads = None
    for d in sorted(set(path), reverse=True):
        heads = found[d] = folds.solve(1 / (d * n), heads, _LOOSE)
        log_probs = _out_of_fold(rows, heads, fold_of[picked])
        losses[d] = -float((log_probs * hot).sum(dim=1).double().mean())
        if losses[d] > _RISE * min(losses.values()):
            break
    best = min(losses, key=lambda d: losses[d])
    c = 1 / (best * n)
    heads = folds.solve(c, found[best], _TIGHT)
    start = torch.stack([heads.mean(dim=1), heads[:, 0]], dim=1)
    final = everything.solve(c, start, _TIGHT)
    weight, bias = (part.to(device) for part in basis.back(final[:, 0]))
    apart = [part.to(device) for part in basis.back(final[:, 1])]
    others = [heads[:, k : k + 1] for k in range(1, n_folds)]
    if len(picked) < n:  # some rows alone chose; one fold after the other, which takes less memory
        for k, start in enumerate(others, start=1):
            fold = replace(everything, masks=(fold_of != k)[:, None])
            others[k - 1] = fold.solve(c, start, _TIGHT)
    heads = torch.cat([final[:, 1:], *others], dim=1)
    return SolvedHead(
        weight=weight,
        bias=bias,
        apart=(apart[0], apart[1]),
        oof_log_loss=losses,
        oof_log_probs=_out_of_fold(basis.rows, heads, fold_of).to(device),
    )


def _by_class(labels: Tensor) -> Tensor:
    """Order rows by class, at random within a class."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    shuffled = shuffled.to(labels.device)
    return shuffled[labels[shuffled].argsort(stable=True)]


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors; in float64 where float32 does not converge.

    A network on images far smaller than it was made for gives many features that are nearly equal.
    """
    try:
        found = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # missing in torch's types
        found = torch.linalg.eigh(gram.double())
    return found[0].to(gram.dtype), found[1].to(gram.dtype)


class _Basis:
    """Features standardised, in the eigenbasis of the Gram matrix of some of them.

    Attributes:
        rows: (N, D), the last column ones, those before it zeros up to a multiple of 16, with
            which products are up to half as fast again.
        scale: Mean square of each column, (D,).
    """

    def __init__(self, features: Tensor, picked: Tensor) -> None:
        n, n_features = features.shape
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        chunks = torch.split(features, _CHUNK_ROWS)
        mean = torch.stack([p.double().sum(dim=0) for p in chunks]).sum(dim=0) / n
        squares = torch.stack([(p.double() - mean).square().sum(dim=0) for p in chunks])
        std = (squares.sum(dim=0) / n).sqrt()
        # The median of those that vary: constant features are none of the scale of the others.
        varied = std[std > 1e-12]
        std = std.clamp(min=_LEAST_SPREAD * float(varied.median()) if len(varied) else 1.0)
        self._mean, self._std = mean, std

        def standardised(part: Tensor) -> Tensor:
            return (part.to(dtype) - mean.to(dtype)) / std.to(dtype)

        if n_features > n:  # the rows span n dimensions only
            span, upper = torch.linalg.qr(standardised(features).t())
            gram = upper @ upper.t()
        else:
            span = None
            gram = torch.zeros(n_features, n_features, dtype=dtype, device=features.device)
            for where in torch.split(picked, _CHUNK_ROWS):
                part = standardised(features[where])
                gram.addmm_(part.t(), part)
        values, turn = _eigh(gram / len(picked))
        self._vectors = turn if span is None else span @ turn
        rank, width = len(values), 16 * (len(values) // 16 + 1)
        self.rows = torch.zeros(n, width, dtype=dtype, device=features.device)
        for part, target in zip(chunks, torch.split(self.rows, _CHUNK_ROWS), strict=True):
            target[:, :rank] = standardised(part) @ self._vectors
        self.rows[:, -1] = 1
        self.scale = values.new_zeros(width)
        self.scale[:rank] = values.clamp(min=0)
        self.scale[-1] = 1

    def back(self, head: Tensor) -> tuple[Tensor, Tensor]:
        """Fold a head, (D, K), into weight and bias for plain features."""
        weight = (self._vectors @ head[: self._vectors.shape[1]]).t().double() / self._std
        bias = head[-1].double() - weight @ self._mean
        return weight.to(head.dtype), bias.to(head.dtype)


def _out_of_fold(rows: Tensor, heads: Tensor, fold_of: Tensor) -> Tensor:
    """Return each row's log-probabilities, (N, K), by its fold's head of (D, folds, K)."""
    found = rows.new_empty(len(rows), heads.shape[2])
    for k in range(heads.shape[1]):
        for where in torch.split((fold_of == k).nonzero()[:, 0], _CHUNK_ROWS):
            found[where] = (rows[where] @ heads[:, k]).log_softmax(dim=1)
    return found


@dataclass(frozen=True, slots=True)
class _Fits:
    """Fits of some of the rows each, side by side.

    Attributes:
        scale: Mean square of each column, (D,).
        rows: (N, D).
        hot: One-hot labels, (N, K).
        masks: The rows of each fit, (N, B).
        pulse: Called at every step.
    """

    scale: Tensor
    rows: Tensor
    hot: Tensor
    masks: Tensor
    pulse: Callable[[], None]

    def solve(self, c: float, start: Tensor | None, tolerance: float) -> Tensor:
        """Run L-BFGS on all fits at once; return the heads, (D, B, K).

        Heads start from those of `start`, else from the classes' frequencies.
        """
        if start is None:
            bias = (self.masks.to(self.rows.dtype).t() @ self.hot).clamp(min=0.5)
            start = self.rows.new_zeros(len(self.scale), *bias.shape)
            start[-1] = (bias / bias.sum(dim=1, keepdim=True)).log()
        # A term that is the same for all classes changes no probability: rounding drove it, where
        # nothing else did, to logits of millions.
        head = _centred(start)
        rows, hot, masks = self.rows, self.hot, self.masks
        n_problems, n_classes = masks.shape[1], hot.shape[1]
        sizes = masks.sum(dim=0)
        share = (masks / sizes).to(rows.dtype)[:, :, None]  # a row's weight in the mean, (N, B, 1)
        # scikit-learn's two classes have one vector of weights, the difference of ours.
        decay = ((2 if n_classes == 2 else 1) / (c * sizes)).to(rows.dtype)[None, :, None]
        decay = decay.repeat(len(self.scale), 1, 1)  # (D, B, 1)
        decay[-1] = 0

        def back(residual: Tensor) -> Tensor:  # rows.t() @ ... was slow
            return (residual.flatten(1).t() @ rows).t().reshape(head.shape)

        def forth(head: Tensor) -> Tensor:
            return (rows @ head.flatten(1)).view(-1, n_problems, n_classes)

        target = back(share * hot[:, None])  # the labels' part of the gradient never changes
        logits = forth(head)
        probs = logits.softmax(dim=2)
        spread = (probs * (1 - probs) * share).sum(dim=0).clamp(min=1e-4)
        # The diagonal Hessian's, (D, B, K).
        inverse = 1 / (self.scale[:, None, None] * spread + decay)
        gradient = _centred(back(probs * share) - target + decay * head)
        history: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(_MAX_STEPS):
            self.pulse()
            if bool((_dot(gradient, gradient * inverse).sqrt() <= tolerance).all()):
                break
            direction = _centred(_direction(gradient, inverse, history))
            moved = forth(direction)
            fixed = _dot(direction, decay * head - target)
            slope, curve = _dot(gradient, direction), _dot(direction, decay * direction)
            length = _search(logits, moved, share, slope, fixed, curve)
            logits.addcmul_(moved, length)
            taken = direction * length
            head = head + taken
            new = _centred(back(logits.softmax(dim=2).mul_(share)) - target + decay * head)
            change, gradient = new - gradient, new
            history = [*history[1 - _HISTORY :], (taken, change, _dot(taken, change))]
        return head


def _centred(heads: Tensor) -> Tensor:
    """Take from heads, (D, B, K), what all classes have in common."""
    return heads - heads.mean(dim=2, keepdim=True)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product per problem, (B, 1), of two (D, B, K)."""
    return (a * b).sum(dim=(0, 2))[:, None]


def _direction(
    gradient: Tensor, inverse: Tensor, history: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> Tensor:
    """Return L-BFGS's direction of descent by the two loops, without flat pairs."""
    found = -gradient
    factors = []
    for taken, change, product in reversed(history):
        factor = torch.where(product > 0, _dot(taken, found) / product, 0)
        found = found - change * factor
        factors.append(factor)
    found = found * inverse
    if history:
        _, change, product = history[-1]
        found = found * torch.where(product > 0, product / _dot(change, change * inverse), 1)
    for (taken, change, product), factor in zip(history, reversed(factors), strict=True):
        back = torch.where(product > 0, _dot(change, found) / product, 0)
        found = found + taken * torch.where(product > 0, factor - back, 0)
    return found


def _search(
    logits: Tensor, moved: Tensor, share: Tensor, slope: Tensor, fixed: Tensor, curve: Tensor
) -> Tensor:
    """Find steps, (B, 1), where the slope has halved at least, by bracketed Newton steps.

    The logits are linear in the step, so that no features are needed, and the loss is convex, so
    that its slope rises and its root can be bracketed.
    """
    length, low, high = torch.ones_like(slope), torch.zeros_like(slope), slope + torch.inf
    for _ in range(_MAX_SEARCH):
        weighted = torch.addcmul(logits, moved, length).softmax(dim=2).mul_(moved)
        mean = weighted.sum(dim=2, keepdim=True)
        here = _dot(mean, share) + fixed + length * curve
        good = here.abs() <= 0.5 * slope.abs()
        if bool(good.all()):
            break
        variance = weighted.mul_(moved).sum(dim=2, keepdim=True) - mean.square()
        newton = length - here / (_dot(variance, share) + curve)
        low, high = torch.where(here < 0, length, low), torch.where(here < 0, high, length)
        middle = torch.where(high.isinf(), 2 * length, (low + high) / 2)
        inside = (newton > low) & (newton < high.clamp(max=10 * length.max()))
        length = torch.where(good, length, torch.where(inside, newton, middle))
    return length
