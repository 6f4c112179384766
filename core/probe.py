"""A linear probe: the regularised logistic regression on a frozen network's features.

It is what `head_init = "probe"` starts a head from: linear probing, then fine-tuning (Kumar et al.
2022, https://arxiv.org/abs/2202.10054). It depends on network, pictures and views alone, not on a
run's seed or rates, so that all runs of a study share it.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

# L2 on the mean loss, from strong to weak: 1 / (C n) in scikit-learn's terms. On the shared photo
# sets (240 to 1,500 pictures, 1,280 features) the best lies between 0.01 and 1.
_STRENGTHS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
_MOST_STEPS = 200
# A feature's deviation counts as at least this share of the median one, so that a feature that
# hardly moves here does not explode where it does. Assumption.
_LEAST_SHARE = 0.05
# The strength is chosen on at most so many pictures; a larger set then refines that one solution.
_MOST_PICTURES = 5000
_REFINING_STEPS = 30


def probe_head(
    features: Tensor,
    labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    n_classes: int,
) -> tuple[Tensor, Tensor]:
    """Fit logistic regressions of several strengths; return the one with the lowest loss.

    Args:
        features: Of the training pictures' evaluation views, (N, F).
        labels: Their class numbers, (N,).
        val_features: Of the validation views, (V, F): they choose the strength.
        val_labels: Their class numbers, (V,).
        n_classes: K.

    Returns:
        Weight, (K, F), and bias, (K,), for features as they are.
    """
    std, mean = torch.std_mean(features.double(), dim=0, unbiased=False)
    std = std.clamp(min=_LEAST_SHARE * std.median())
    std = torch.where(std > 0, std, torch.ones_like(std))
    inputs, val_inputs = (
        torch.nn.functional.pad((part.double() - mean) / std, (0, 1), value=1.0)
        for part in (features, val_features)
    )
    hot = torch.nn.functional.one_hot(labels.cpu(), n_classes).double()
    held_out = val_labels.cpu()
    few = torch.from_numpy(np.random.default_rng(0).permutation(len(inputs))[:_MOST_PICTURES])
    head = torch.zeros(n_classes, inputs.shape[1], dtype=torch.float64)
    best = (float("inf"), head, _STRENGTHS[0])
    for strength in _STRENGTHS:
        head = _solve(inputs[few], hot[few], strength, head, _MOST_STEPS)
        logits = val_inputs @ head.t()
        loss = float(torch.nn.functional.cross_entropy(logits, held_out))
        if loss < best[0]:
            best = (loss, head, strength)
    _, head, strength = best
    if len(inputs) > len(few):
        head = _solve(inputs, hot, strength, head, _REFINING_STEPS)
    weight = head[:, :-1] / std
    return weight.float(), (head[:, -1] - weight @ mean).float()


def _solve(inputs: Tensor, hot: Tensor, strength: float, start: Tensor, steps: int) -> Tensor:
    """Minimise mean cross-entropy plus strength / 2 times the squared weights (not biases)."""
    shape, n = start.shape, len(inputs)

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        head = torch.from_numpy(flat).view(shape)
        log_probs = (inputs @ head.t()).log_softmax(dim=1)
        plain = head.clone()
        plain[:, -1] = 0
        loss = -(hot * log_probs).sum() / n + strength / 2 * plain.square().sum()
        gradient = (log_probs.exp_().sub_(hot) / n).t() @ inputs + strength * plain
        return float(loss), gradient.numpy().ravel()

    found = minimize(
        objective, start.numpy().ravel(), jac=True, method="L-BFGS-B", options={"maxiter": steps}
    )
    return torch.from_numpy(np.ascontiguousarray(found.x)).view(shape)
