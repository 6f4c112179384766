import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from core.heads.solver import solve_head
from core.metrics import Interrupted


def make_data(n: int, n_features: int, n_classes: int, distance: float) -> tuple[Tensor, Tensor]:
    """Draw correlated float64 features around one center per class."""
    generator = torch.Generator().manual_seed(n)
    labels = torch.arange(n) % n_classes
    centers = torch.randn(n_classes, n_features, generator=generator, dtype=torch.float64)
    mixing = torch.randn(n_features, n_features, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, n_features, generator=generator, dtype=torch.float64)
    spread = torch.logspace(0, -1, n_features)
    return (noise + distance * centers[labels]) @ mixing * spread + 1, labels


def folds(y: Tensor, n: int = 5) -> Tensor:
    """Deal the rows of each class to n folds."""
    found = torch.empty_like(y)
    found[y.argsort(stable=True)] = torch.arange(len(y)) % n
    return found


def fit_reference(x: Tensor, y: Tensor, rows: Tensor, c: float) -> np.ndarray:
    """Fit scikit-learn on some rows of standardised features; return log-probabilities of all."""
    std = x.std(dim=0, correction=0)
    z = ((x - x.mean(dim=0)) / torch.where(std > 0, std, 1)).numpy()
    model = LogisticRegression(C=c, tol=1e-6, max_iter=100_000)
    return model.fit(z[rows], y[rows].numpy()).predict_log_proba(z)


@pytest.mark.parametrize(
    ("n", "n_features", "n_classes", "distance"),
    [(200, 20, 2, 0.3), (60, 90, 10, 0.5), (300, 30, 10, 0.5), (200, 20, 100, 0.5)]
    + [(120, 20, 3, 5.0)],  # nearly separable
)
@pytest.mark.parametrize("c", [1e-3, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solve_head_agrees_with_scikit_learn(
    n: int, n_features: int, n_classes: int, distance: float, c: float, dtype: torch.dtype
) -> None:
    x, y = make_data(n, n_features, n_classes, distance)
    x, y = torch.cat([x, x[:20]]), torch.cat([y, y[:20]])  # duplicate rows
    x[:, 3] = 2  # a constant feature
    head = solve_head(x.to(dtype), y, n_classes, folds(y, 2), [1 / (c * len(x))])
    found = (x.to(dtype) @ head.weight.t() + head.bias).softmax(dim=1).numpy()
    expected = np.exp(fit_reference(x, y, torch.arange(len(x)), c))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_solve_head_out_of_fold_and_choice_equal_separate_fits() -> None:
    x, y = make_data(120, 15, 3, 0.4)
    fold_of = torch.arange(120) % 4
    strengths = [1 / (c * 120) for c in (1e-3, 1e-2, 1e-1, 10.0)]
    head = solve_head(x, y, 3, fold_of, strengths)
    losses, tables = {}, {}
    for decay in strengths:
        table = np.empty((120, 3))
        for k in range(4):
            rows = (fold_of != k).nonzero()[:, 0]
            here = (fold_of == k).numpy()
            table[here] = fit_reference(x, y, rows, 1 / (decay * 120))[here]
        tables[decay] = table
        losses[decay] = -table[np.arange(120), y].mean()
    assert head.oof_log_loss == pytest.approx(losses, abs=1e-3)
    best = min(losses, key=lambda d: losses[d])
    np.testing.assert_allclose(head.oof_log_probs.exp(), np.exp(tables[best]), atol=1e-3)


def test_solve_head_bias_is_not_penalised() -> None:
    y = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    head = solve_head(torch.ones(100, 4), y, 3, folds(y), [1e3])
    np.testing.assert_allclose(head.bias.softmax(dim=0), [0.6, 0.3, 0.1], atol=1e-4)


def test_solve_head_takes_a_class_smaller_than_the_folds() -> None:
    x, y = make_data(60, 8, 3, 0.5)
    y[y == 2] = 0
    y[7] = 2
    head = solve_head(x, y, 4, folds(y))  # class 3 has no rows at all
    assert head.weight.shape == (4, 8)
    assert bool(head.oof_log_probs.isfinite().all())


def test_solve_head_chooses_on_a_subset_and_keeps_c(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = make_data(300, 10, 3, 0.4)
    monkeypatch.setattr("core.heads.solver._CHOICE_ROWS", 100)
    head = solve_head(x, y, 3, folds(y, 3), [1 / (0.1 * 300)])
    found = (x @ head.weight.t() + head.bias).softmax(dim=1).numpy()
    expected = np.exp(fit_reference(x, y, torch.arange(300), 0.1))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert head.oof_log_probs.shape == (300, 3)
    # Every fold's head has seen all other rows, not the subset's alone.
    for k in range(3):
        rest = torch.nonzero(folds(y, 3) != k)[:, 0]
        expected = fit_reference(x, y, rest, 0.1)[(folds(y, 3) == k).numpy()]
        np.testing.assert_allclose(head.oof_log_probs[folds(y, 3) == k], expected, atol=3e-3)


def test_solve_head_ends_where_its_pulse_says_so() -> None:
    def stop() -> None:
        raise Interrupted

    x, y = make_data(60, 10, 3, 0.4)
    with pytest.raises(Interrupted):
        solve_head(x, y, 3, folds(y, 3), pulse=stop)


@pytest.mark.parametrize(
    ("value", "n_folds", "message"),
    [(float("nan"), 5, "finite"), (float("inf"), 5, "finite"), (0.0, 1, "1 folds")],
)
def test_solve_head_refuses_what_cannot_be_fitted(
    value: float, n_folds: int, message: str
) -> None:
    x, y = make_data(30, 4, 3, 0.5)
    x[4, 2] = value
    with pytest.raises(ValueError, match=message):
        solve_head(x, y, 3, folds(y, n_folds))


@pytest.mark.parametrize("n_classes", [2, 3])
def test_solve_head_has_no_term_that_all_classes_share(n_classes: int) -> None:
    # It changes no probability; rounding once drove it to logits of millions on 318 images.
    y = torch.arange(100) % n_classes
    noise = torch.randn(100, 400, generator=torch.Generator().manual_seed(0))
    found = solve_head(noise + 3 * torch.eye(n_classes, 400)[y], y, n_classes, folds(y), [1e-3])
    assert float(found.weight.sum(dim=0).abs().max()) < 1e-5
    assert float(found.bias.sum().abs()) < 1e-5
