import numpy as np
import pytest

from core.heads.ensemble import mean_log_probs, mean_weights, nested_log_probs


def _members(n: int, *skills: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw members of two classes that are wrong independently of each other."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, n)
    log_probs = []
    for skill in skills:
        right = rng.random(n) < skill
        sure = np.where(right, skill, 1 - skill)
        given = np.stack([1 - sure, sure], axis=1)
        given = np.where(labels[:, None] == 1, given, given[:, ::-1])
        log_probs.append(np.log(given))
    return labels, np.array(log_probs, dtype=np.float32)


def test_near_equal_members_are_averaged_and_a_hopeless_one_is_dropped() -> None:
    labels, log_probs = _members(2000, 0.9, 0.9, 0.5)
    first, second, hopeless = mean_weights(labels, log_probs)
    assert first == pytest.approx(second, abs=0.1)
    assert hopeless == 0 and first + second == pytest.approx(1)


def test_few_images_leave_the_weights_near_equal() -> None:
    labels, log_probs = _members(10, 0.9, 0.6)
    assert mean_weights(labels, log_probs).max() < 0.7
    labels, log_probs = _members(10, *[0.9] * 25)  # none of which reaches the least weight
    assert mean_weights(labels, log_probs) == pytest.approx(1 / 25, abs=0.01)


def test_weights_are_as_good_as_the_best_of_a_fine_grid() -> None:
    labels, log_probs = _members(3000, 0.85, 0.7)

    def loss(weight: float) -> float:
        mean = mean_log_probs(np.array([weight, 1 - weight], dtype=np.float32), log_probs)
        return -float(mean[np.arange(len(labels)), labels].mean())

    found = float(mean_weights(labels, log_probs)[0])
    assert loss(found) <= min(map(loss, np.linspace(0, 1, 51))) + 1e-3


def test_a_folds_weights_do_not_depend_on_its_own_labels() -> None:
    labels, log_probs = _members(300, 0.9, 0.7, 0.6)
    fold_of = np.arange(300) % 3
    before = nested_log_probs(labels, log_probs, fold_of)
    changed = np.where(fold_of == 1, 1 - labels, labels)
    after = nested_log_probs(changed, log_probs, fold_of)
    assert np.array_equal(before[fold_of == 1], after[fold_of == 1])
    assert not np.array_equal(before[fold_of == 0], after[fold_of == 0])
