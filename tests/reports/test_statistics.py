"""Inference over seeds and images: agreement with slow computations and scipy, error rates."""

import math

import numpy as np
import pytest
from scipy import stats

from reports.intervals import (
    difference_interval,
    selection_bias,
    simulated_bias,
    wilson_interval,
)
from reports.statistics import (
    Array,
    Inference,
    Part,
    crossed,
    detectable,
    holm,
    images_needed,
    replicates_needed,
    resampled,
    seeds_only_p,
)

NAN = math.nan
FIVE = Inference(5, 400, 0.01, (Part(0.015**2, 0.0), Part(0.0, 0.003**2, 399)))


def drawn(n_seeds: int, n_images: int, seed: int = 0) -> Array:
    """Draw differences of correctness (-1, 0, 1) that scatter by seed and by image."""
    rng = np.random.default_rng(seed)
    hard = 0.4 * rng.normal(size=n_images) + 0.2 * rng.normal(size=(n_seeds, 1))
    return np.round(np.clip(hard + 0.5 * rng.normal(size=(n_seeds, n_images)), -1, 1))


@pytest.mark.parametrize(("n_seeds", "n_images"), [(2, 7), (5, 40), (12, 30)])
def test_variance_is_that_of_two_crossed_samples(n_seeds: int, n_images: int) -> None:
    rows = drawn(n_seeds, n_images, n_seeds)
    by_seed, by_image = rows.mean(axis=1), rows.mean(axis=0)
    sums = {"seed": 0.0, "image": 0.0, "rest": 0.0}
    for (r, i), d in np.ndenumerate(rows):
        sums["seed"] += (by_seed[r] - rows.mean()) ** 2
        sums["image"] += (by_image[i] - rows.mean()) ** 2
        sums["rest"] += (d - by_seed[r] - by_image[i] + rows.mean()) ** 2
    dfs = {"seed": n_seeds - 1, "image": n_images - 1}
    dfs["rest"] = dfs["seed"] * dfs["image"]
    ms = {name: sums[name] / dfs[name] for name in dfs}
    variance = (ms["seed"] + ms["image"] - ms["rest"]) / rows.size
    terms = [(ms["seed"], n_seeds - 1), (ms["image"] - ms["rest"], n_images - 1)]
    df = (variance * rows.size) ** 2 / sum(m**2 / d for m, d in terms)
    found = crossed(rows)
    assert found.scatter() == pytest.approx((math.sqrt(variance), df), rel=1e-9)
    t = rows.mean() / math.sqrt(variance)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(t), df), rel=1e-9)
    half = stats.t.ppf(0.995, df) * math.sqrt(variance)
    ends = found.interval(0.99)
    assert (ends.low, ends.high) == pytest.approx((rows.mean() - half, rows.mean() + half))
    for margin in (0.01, 0.2):  # equivalence is two one-sided tests
        sides = np.array([margin + rows.mean(), margin - rows.mean()]) / math.sqrt(variance)
        assert found.equivalence_p(margin) == pytest.approx(max(stats.t.sf(sides, df)))


def test_a_negative_component_counts_as_zero() -> None:
    # Every seed has the same mean, and every image: the rest is all there is.
    rows = np.array([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]])
    rest = float((rows**2).sum()) / 3
    assert crossed(rows).scatter() == pytest.approx((math.sqrt(rest / 8), 3))


def test_without_seeds_it_is_a_t_test_over_images_and_one_replicate_is_enough() -> None:
    rows = drawn(1, 50)
    expected = stats.ttest_1samp(rows[0], 0)
    for repeated in (rows, np.repeat(rows, 5, axis=0)):
        found = crossed(repeated, has_seed=False)
        ends, own = expected.confidence_interval(0.95), found.interval()
        assert (own.low, own.high) == pytest.approx((ends.low, ends.high))
        assert found.p == pytest.approx(expected.pvalue)
        assert replicates_needed(found, 0.05, 0.01) is None


def test_one_seed_has_no_test_and_equal_rows_no_scatter() -> None:
    one = crossed(drawn(1, 50))
    values = (one.p, one.equivalence_p(0.01), one.interval().low, seeds_only_p(np.ones(1), 0.01))
    assert one.estimate == drawn(1, 50).mean() and np.isnan(values).all()
    same, all_differ = crossed(np.zeros((4, 9))), crossed(np.ones((4, 9)))
    assert (same.p, same.equivalence_p(0.01), same.equivalence_p(0.0)) == (1, 0, 0.5)
    assert (all_differ.p, all_differ.equivalence_p(0.01)) == (0, 1)


def test_seeds_alone_are_a_t_test_with_at_least_the_scatter_of_rounding() -> None:
    means = np.array([0.01, 0.02, 0.04, 0.01])
    assert seeds_only_p(means, 1e-4) == pytest.approx(stats.ttest_1samp(means, 0).pvalue)
    t = 0.02 / (0.0125 / math.sqrt(12) / math.sqrt(2))
    assert seeds_only_p(np.array([0.02, 0.02]), 0.0125) == pytest.approx(2 * stats.t.sf(t, 1))


def test_recipes_that_are_equal_but_for_images_are_told_apart_by_seeds_alone_only() -> None:
    # Each recipe finds other images hard, whatever its seed; over all images it gains nothing.
    rng, n_studies, n_seeds, n_images = np.random.default_rng(1), 600, 5, 100
    ps = []
    for _ in range(n_studies):
        images = 1.5 * rng.normal(size=(2, 1, n_images))
        hit = images + 0.05 * rng.normal(size=(2, n_seeds, 1))
        right = hit + rng.normal(size=(2, n_seeds, n_images)) < 1
        rows = right[0].astype(float) - right[1]
        ps.append((crossed(rows).p, seeds_only_p(rows.mean(axis=1), 1 / n_images)))
    found, alone = (np.array(ps) <= 0.05).mean(axis=0)
    assert 0.005 < found < 0.05 + 3 * math.sqrt(0.05 * 0.95 / n_studies)
    assert alone > 0.3


def test_few_folds_have_the_corrected_resampled_t_test() -> None:
    folds = [np.array(fold, float) for fold in ([1, 0, 0, 1], [0, 0, 0, 1], [1, -1, 0, 0])]
    means = [0.5, 0.25, 0.0]
    error = math.sqrt((1 / 3 + 1 / 2) * np.var(means, ddof=1))  # 1 / R + 1 / (K - 1)
    found = resampled(folds, 3)
    assert (found.n, found.n_images, found.estimate) == (3, 12, 0.25)
    assert found.scatter() == pytest.approx((error, 2))
    assert found.p == pytest.approx(2 * stats.t.sf(0.25 / error, 2))
    assert math.isnan(resampled(folds[:1], 3).p)
    few = resampled([*folds, 1 - folds[0]], 20)  # four folds of twenty
    assert (few.n_images, few.parts[1].df) == (16, 12) and 0 < few.p < 1


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_many_folds_have_the_scatter_of_images_and_what_folds_scatter_beyond(shift: float) -> None:
    # Ten folds of two divisions in five, of uneven size.
    folds = [drawn(1, 20 + r % 2, r)[0] + shift * (r % 2) for r in range(10)]
    size = np.mean([len(fold) for fold in folds])
    images = np.mean([fold.var(ddof=1) for fold in folds]) / size
    beyond = max(0.0, np.var([fold.mean() for fold in folds], ddof=1) - images)
    variance = (1 / 10 + 1 / 4) * (images + beyond)
    df = (images + beyond) ** 2 / (images**2 / (round(size * 5) - 5) + beyond**2 / 9)
    found = resampled(folds, 5)
    assert found.n_images == 102 and (beyond > 0) == (shift > 0)
    # More replicates divide the images' part by n, too: it has its own degrees of freedom.
    assert found.scatter() == pytest.approx((math.sqrt(variance), df))


def test_holm_is_that_of_his_paper_and_skips_what_was_not_tested() -> None:
    # The smallest times how many there are, the next times one fewer, and none below one before.
    found = holm([0.01, NAN, 0.04, 0.03, 0.005, 0.9])
    assert found == pytest.approx([0.04, NAN, 0.09, 0.09, 0.025, 0.9], nan_ok=True)
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([NAN]) == pytest.approx([NAN], nan_ok=True) and holm([]) == []


@pytest.mark.parametrize(
    ("estimate", "alpha", "margin"),
    [(0.01, 0.05, 0.001), (-0.02, 0.0025, 0.001), (0.0, 0.05, 0.015), (0.3, 1e-4, 0.01)],
)
def test_needed_replicates_are_the_least_that_have_the_power(
    estimate: float, alpha: float, margin: float
) -> None:
    inference = Inference(2, 400, estimate, FIVE.parts)

    def power(n: int) -> float:
        rng = np.random.default_rng(n)
        error, df = inference.scatter(n)
        errors = error * np.sqrt(rng.chisquare(df, 200_000) / df)
        means = rng.normal(abs(estimate), error, 200_000)
        found = means > stats.t.ppf(1 - alpha / 2, df) * errors
        within = margin - np.abs(means) > stats.t.ppf(1 - alpha, df) * errors
        return max(found.mean(), within.mean())

    n = replicates_needed(inference, alpha, margin)
    assert n is not None and n > 2
    assert power(n) > 0.795
    fewer = min(n - 1, int(0.93 * n))  # about, where there are many
    assert n == 3 or power(fewer) < 0.805


def test_what_replicates_cannot_settle_takes_images() -> None:
    assert replicates_needed(Inference(5, 400, 1e-4, FIVE.parts), 0.05, 1e-4) is None
    error, _ = FIVE.scatter()
    n = images_needed(FIVE, 0.05)
    fewer = error * math.sqrt(400 / n)
    assert stats.norm.sf(stats.norm.ppf(0.975) - 0.01 / fewer) == pytest.approx(0.8, abs=1e-3)
    _, df = FIVE.scatter()
    power = stats.nct.sf(stats.t.ppf(0.975, df), df, detectable(FIVE, 0.05) / error)
    assert power == pytest.approx(0.8, abs=0.02)


def test_intervals_of_shares_match_newcombes_tables() -> None:
    # Newcombe 1998 (Statistics in Medicine 17, 857), table I: 81 of 263.
    found = wilson_interval(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    # (17, 873), table II, contrast (a), method 10.
    found = difference_interval(wilson_interval(56, 70), wilson_interval(48, 80))
    assert found.estimate == pytest.approx(0.2)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0524, 0.3339)
    for n_correct in (0, 10):
        found = wilson_interval(n_correct, 10)
        assert 0 <= found.low < found.high <= 1


@pytest.mark.parametrize(
    ("alike", "n_trials", "p", "n"),
    [(0.0, 30, 0.95, 80), (0.0, 100, 0.7, 200), (0.9, 30, 0.9, 80), (0.5, 5, 0.9, 80)],
)
def test_the_best_of_equal_trials_is_too_high_by_what_is_said(
    alike: float, n_trials: int, p: float, n: int
) -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(100):
        common = math.sqrt(alike) * rng.standard_normal(n)
        own = math.sqrt(1 - alike) * rng.standard_normal((n_trials, n))
        correct = (common + own < stats.norm.ppf(p)).astype(np.float64)
        best = float(correct.mean(axis=1).max())
        found.append((best - p, simulated_bias(correct), selection_bias(best, n, n_trials)))
    true, said, most = np.mean(found, axis=0)
    assert said == pytest.approx(true, rel=0.2)
    assert true - 0.002 <= most < true + (0.06 if alike else 0.03)
    assert simulated_bias(correct[:1]) == pytest.approx(simulated_bias(correct[[0, 0]])) == 0
    assert selection_bias(0.9, n, 1) == selection_bias(0.0, n, 5) == 0
    poor = np.concatenate([correct[:3], rng.random((20, n)) < 0.5])  # they scatter more
    best = float(poor.mean(axis=1).max())
    assert simulated_bias(poor.astype(np.float64)) < selection_bias(best, n, len(poor)) + 0.005
