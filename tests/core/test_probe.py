"""The linear probe against scikit-learn's logistic regression."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from core.probe import _MOST_STEPS, _solve, probe_head

N, F, K = 90, 8, 3


def _points(seed: int, n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, n)
    centres = np.random.default_rng(99).normal(size=(K, F))
    points = centres[labels] * 1.2 + rng.normal(size=(n, F)) + 5
    return torch.from_numpy(points.astype(np.float32)), torch.from_numpy(labels)


def test_one_strength_gives_scikit_learn_s_solution() -> None:
    points, labels = _points(0)
    table = torch.nn.functional.pad(points.double(), (0, 1), value=1.0)
    hot = torch.nn.functional.one_hot(labels, K).double()
    head = _solve(table, hot, 0.1, torch.zeros(K, F + 1, dtype=torch.float64), _MOST_STEPS)
    reference = LogisticRegression(C=1 / (0.1 * N), tol=1e-8, max_iter=1000)
    reference.fit(table[:, :-1].numpy(), labels.numpy())
    ours = (table @ head.t()).softmax(dim=1).numpy()
    theirs = reference.predict_proba(table[:, :-1].numpy())
    assert np.abs(ours - theirs).max() < 2e-3


def test_the_strength_with_the_lowest_validation_loss_is_taken() -> None:
    points, labels = _points(1)
    val_points, val_labels = _points(2, 60)
    weight, bias = probe_head(points, labels, val_points, val_labels, K)
    chosen = torch.nn.functional.cross_entropy(val_points @ weight.t() + bias, val_labels)
    std, mean = torch.std_mean(points.double(), dim=0, correction=0)
    table = torch.nn.functional.pad((points.double() - mean) / std, (0, 1), value=1.0)
    hot = torch.nn.functional.one_hot(labels, K).double()
    for strength in (10.0, 0.003):
        head = _solve(table, hot, strength, torch.zeros(K, F + 1, dtype=torch.float64), 200)
        inputs = torch.nn.functional.pad((val_points.double() - mean) / std, (0, 1), value=1.0)
        logits = inputs @ head.t()
        assert chosen <= torch.nn.functional.cross_entropy(logits, val_labels) + 1e-6


def test_labels_that_say_nothing_give_the_strongest_strength_s_even_odds() -> None:
    rng = np.random.default_rng(5)
    points = torch.from_numpy(rng.normal(size=(N, F)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(0, K, N))
    weight, bias = probe_head(points[:60], labels[:60], points[60:], labels[60:], K)
    probability = (points @ weight.t() + bias).softmax(dim=1)
    assert float((probability - 1 / K).abs().max()) < 0.25
