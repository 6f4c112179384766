import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import nn

from core.metrics import Evaluation, Reference
from core.training.trainer import evaluate


def _of_logits(logits: np.ndarray, labels: np.ndarray) -> Evaluation:
    log_probs = torch.from_numpy(logits).log_softmax(1).numpy().astype(np.float32)
    return Evaluation(labels, log_probs)


def test_figures_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 5, 200), rng.normal(size=(200, 5))
    result, predicted = _of_logits(logits, labels), logits.argmax(axis=1)
    assert result.confusion.tolist() == metrics.confusion_matrix(labels, predicted).tolist()
    assert result.acc == metrics.accuracy_score(labels, predicted)
    assert result.balanced_acc == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))
    assert result.macro_f1 == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))
    assert result.loss == pytest.approx(metrics.log_loss(labels, np.exp(result.log_probs)))


def test_a_class_that_does_not_occur_counts_in_no_mean() -> None:
    labels = np.array([0, 0, 1, 1])
    result = _of_logits(np.eye(4)[labels], labels)
    assert result.balanced_acc == 1
    assert result.macro_f1 == 1


def test_evaluate_goes_over_all_batches_in_eval_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(3, 2)).train()
    images = torch.randn(7, 3)
    result = evaluate(model, images.split(3), np.array([0, 1, 0, 1, 0, 1, 1]))
    assert result.predicted.tolist() == model[1](images).argmax(1).tolist()


def test_the_loss_is_calibrated_on_other_images() -> None:
    # The odds 9 : 1 are given where 3 : 1 are true: half as large a logit is right.
    sure = np.log([[0.9, 0.1]] * 8)
    result = _of_logits(sure, np.array([0, 0, 0, 0, 0, 0, 1, 1]))
    assert result.temperature == pytest.approx(2, rel=1e-4)
    assert result.calibrated_loss == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))
    assert result.loss > result.calibrated_loss + 0.05
    # Even and odd positions differ here, and each pays for the temperature of the other.
    torn = _of_logits(sure, np.array([0, 0, 0, 1, 0, 0, 0, 1]))
    assert torn.calibrated_loss > result.calibrated_loss + 0.05


def test_the_score_is_the_accuracy_or_what_the_true_class_is_given() -> None:
    result = _of_logits(np.log([[0.9, 0.1]] * 8), np.array([0, 0, 0, 0, 0, 0, 1, 1]))
    assert Reference().score(result, "val_acc") == 0.75
    assert Reference(error=0.8).score(result, "val_acc") == pytest.approx(0.8)
    loss = -np.log(Reference(loss=1.2).score(result, "val_loss"))
    assert loss == pytest.approx(1.2 * result.calibrated_loss)


def test_a_network_that_says_nothing_scores_chance_by_its_loss() -> None:
    result = _of_logits(np.zeros((8, 4)), np.arange(8) % 4)
    assert Reference().score(result, "val_loss") == pytest.approx(0.25)
