import itertools
import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from reports.intervals import Interval
from reports.paired import (
    Spread,
    bca_interval,
    equivalence,
    equivalence_power,
    least_sign_flip_replicates,
    paired_t,
    power,
    replicates_needed,
    sign_flip,
    spread,
    t_interval,
)

CLOSE = 1e-9


def accuracies(n: int, seed: int, effect: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """Draw a baseline and a level whose seeds share what is easy or hard about them."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, 0.02, n)
    base = 0.9 + shared + rng.normal(0, 0.01, n)
    return base, 0.9 + effect + shared + rng.normal(0, 0.01, n)


def enumerated_p(differences: np.ndarray) -> float:
    """Try every choice of signs, one after the other."""
    means = [
        np.mean(np.array(signs) * differences)
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    own = abs(np.mean(differences))
    return float(np.mean([abs(mean) >= own - 1e-12 for mean in means]))


@pytest.mark.parametrize("n", [2, 3, 5, 20])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_paired_t_and_its_interval_agree_with_scipy(n: int, seed: int) -> None:
    base, level = accuracies(n, seed)
    found = spread(level - base)
    expected = stats.ttest_rel(level, base)
    assert paired_t(found) == pytest.approx(expected.pvalue, abs=CLOSE)
    for confidence in (0.8, 0.95, 0.99):
        ends = expected.confidence_interval(confidence)
        told = t_interval(found, confidence)
        assert (told.low, told.high) == pytest.approx((ends.low, ends.high), abs=CLOSE)
        assert told.estimate == pytest.approx(np.mean(level - base), abs=CLOSE)


def test_t_interval_is_the_worked_one() -> None:
    # 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975; 2) = 4.302653.
    told = t_interval(spread(np.array([1.0, 2.0, 3.0])))
    half = 4.302652729911275 / math.sqrt(3)
    assert (told.low, told.high) == pytest.approx((2 - half, 2 + half), abs=CLOSE)


@pytest.mark.parametrize("n", [2, 3, 5, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_sign_flip_agrees_with_trying_every_sign(n: int, seed: int) -> None:
    base, level = accuracies(n, seed, 0.005)
    p = sign_flip(level - base, np.random.default_rng(0))
    assert p == pytest.approx(enumerated_p(level - base), abs=CLOSE)


@pytest.mark.parametrize("seed", range(4))
def test_sign_flip_takes_rounding_errors_for_ties(seed: int) -> None:
    # On 80 pictures many sums of signs are equal but for their last bits.
    rng = np.random.default_rng(seed)
    differences = (rng.integers(60, 76, 8) / 80) - (rng.integers(60, 76, 8) / 80)
    whole = np.round(differences * 80)
    p = sign_flip(differences, np.random.default_rng(0))
    assert p == pytest.approx(enumerated_p(whole), abs=CLOSE)


@pytest.mark.parametrize("n", [2, 5, 8, 14])
def test_sign_flip_has_its_floor(n: int) -> None:
    differences = np.linspace(0.01, 0.02, n)
    assert sign_flip(differences, np.random.default_rng(0)) == pytest.approx(2.0 ** (1 - n))


def test_sign_flip_beyond_fourteen_pairs_draws_signs_and_repeats_itself() -> None:
    base, level = accuracies(18, 0, 0.006)
    p = sign_flip(level - base, np.random.default_rng(3))
    assert p == sign_flip(level - base, np.random.default_rng(3))
    # Student's test agrees on normal data; the draws' own error is below 0.002 here.
    assert p == pytest.approx(stats.ttest_rel(level, base).pvalue, abs=0.01)
    assert p > 0


@pytest.mark.parametrize("margin", [0.005, 0.02])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("n", [2, 5, 12])
def test_equivalence_agrees_with_statsmodels(n: int, seed: int, margin: float) -> None:
    base, level = accuracies(n, seed)
    expected = ttost_paired(level, base, -margin, margin)[0]
    assert equivalence(spread(level - base), margin) == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize("n", [2, 5, 10, 40])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 20])
@pytest.mark.parametrize("effect", [0.0, 0.3, -0.8, 2.0])
def test_power_agrees_with_statsmodels(n: int, alpha: float, effect: float) -> None:
    expected = TTestPower().power(effect, n, alpha, alternative="two-sided")
    if np.isnan(expected):  # its lower tail, which is nothing then
        expected = TTestPower().power(effect, n, alpha / 2, alternative="larger")
    assert power(0.01 * effect, 0.01, n, alpha) == pytest.approx(expected, abs=CLOSE)


def test_power_is_a_number_everywhere_and_grows_with_replicates() -> None:
    # scipy's nct.cdf is NaN in about a tenth of these places, where the tail is nothing.
    for alpha in (0.05, 0.0025, 1e-4):
        for effect in np.geomspace(0.1, 300, 25):
            values = [power(effect, 1.0, n, alpha) for n in (2, 3, 4, 5, 8, 20, 50)]
            assert np.isfinite(values).all()
            assert (np.diff(values) > -1e-12).all()


def test_power_is_that_of_a_slow_integral() -> None:
    # The case that was NaN: d_z = 8, n = 3, alpha = 0.0025.
    critical = stats.t.ppf(1 - 0.0025 / 2, 2)
    grid = (np.arange(200_000) + 0.5) / 200_000
    scale = np.sqrt(stats.chi2.ppf(grid, 2) / 2)
    expected = np.mean(stats.norm.sf(critical * scale - 8 * math.sqrt(3)))
    assert power(8.0, 1.0, 3, 0.0025) == pytest.approx(expected, abs=1e-6)


def test_equivalence_power_agrees_with_simulation() -> None:
    rng = np.random.default_rng(0)
    n, sd, margin, effect = 10, 0.01, 0.012, 0.002
    draws = rng.normal(effect, sd, (40_000, n))
    mean, error = draws.mean(axis=1), draws.std(axis=1, ddof=1) / math.sqrt(n)
    critical = stats.t.ppf(0.95, n - 1)
    observed = np.mean((mean + critical * error < margin) & (mean - critical * error > -margin))
    told = equivalence_power(effect, sd, n, 0.05, margin)
    # A lower bound, and close where the power is worth having; three Monte-Carlo errors.
    assert told <= observed + 0.006
    assert told == pytest.approx(observed, abs=0.02)


@pytest.mark.parametrize(
    ("mean", "sd", "alpha", "margin"),
    [
        (0.010, 0.010, 0.05, 0.001),
        (0.004, 0.010, 0.05 / 3, 0.001),
        (-0.02, 0.015, 0.05 / 20, 0.001),
        (0.000, 0.010, 0.05, 0.010),
        (0.002, 0.010, 0.05 / 8, 0.010),
        (0.020, 0.002, 0.05 / 20, 0.010),  # scipy's tail is NaN on the way
    ],
)
def test_needed_replicates_are_the_first_to_have_the_power(
    mean: float, sd: float, alpha: float, margin: float
) -> None:
    n = replicates_needed(Spread(5, mean, sd), alpha, margin)

    def best(replicates: int) -> float:
        found = power(mean, sd, replicates, alpha)
        return max(found, equivalence_power(mean, sd, replicates, alpha, margin))

    assert n is not None and n > 2
    assert best(n) >= 0.8
    assert best(n - 1) < 0.8


@pytest.mark.parametrize("n_seen", [2, 5, 200])
def test_needed_replicates_do_not_depend_on_those_there_are(n_seen: int) -> None:
    found = {replicates_needed(Spread(n, 0.01, 0.02), 0.01, 0.001) for n in (5, n_seen)}
    assert len(found) == 1 and None not in found


def test_nobody_can_say_how_many_replicates_a_hopeless_question_needs() -> None:
    assert replicates_needed(Spread(5, 0.0001, 0.05), 0.05, 0.0001) is None
    assert replicates_needed(Spread(1, 0.01, math.nan), 0.05, 0.01) is None
    assert replicates_needed(Spread(5, 0.01, 0.0), 0.05, 0.01) is None


@pytest.mark.parametrize(("n_tests", "least"), [(1, 6), (3, 7), (20, 10), (10, 9)])
def test_least_sign_flip_replicates_can_reach_alpha_and_one_less_cannot(
    n_tests: int, least: int
) -> None:
    assert least_sign_flip_replicates(n_tests, 0.05) == least
    assert 2.0 ** (1 - least) <= 0.05 / n_tests < 2.0 ** (2 - least)


def test_least_sign_flip_replicates_at_a_power_of_two() -> None:
    assert least_sign_flip_replicates(2, 0.0625) == 6  # 2^-5 = 0.0625 / 2, exactly enough


def test_one_pair_has_a_difference_and_no_test() -> None:
    rng = np.random.default_rng(0)
    found = spread(np.array([0.02]))
    assert (found.n, found.mean) == (1, 0.02) and math.isnan(found.sd)
    told = [t_interval(found), bca_interval(np.array([0.02]), rng)]
    assert all(i.estimate == 0.02 and math.isnan(i.low) and math.isnan(i.high) for i in told)
    ps = [paired_t(found), sign_flip(np.array([0.02]), rng), equivalence(found, 0.01)]
    assert np.isnan(ps).all()


def test_equal_differences_without_resolution_have_no_scatter() -> None:
    same = np.full(5, 0.9) - np.full(5, 0.88)
    found = spread(same)
    assert found.sd == 0 and found.mean == pytest.approx(0.02)
    assert paired_t(found) == 0
    assert (equivalence(found, 0.03), equivalence(found, 0.01)) == (0, 1)
    assert paired_t(spread(np.zeros(5))) == 1
    assert bca_interval(same, np.random.default_rng(0)) == Interval(*[np.mean(same)] * 3)


def test_equal_differences_scatter_like_rounding_where_the_step_is_known() -> None:
    # 80 pictures: two replicates that agree to the picture are no proof.
    found = spread(np.full(2, 1 / 80), resolution=1 / 80)
    assert found.sd == pytest.approx(1 / 80 / math.sqrt(12))
    told = t_interval(found)
    assert told.low < 0 < told.high
    assert paired_t(found) > 0.05


def test_a_known_step_changes_nothing_where_differences_vary() -> None:
    differences = np.array([0.01, 0.02, 0.04])
    assert spread(differences, resolution=0.5) == spread(differences)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_bca_of_very_few_pairs_gives_no_warning_and_no_nonsense(n: int) -> None:
    for seed in range(5):
        base, level = accuracies(n, seed)
        told = bca_interval(level - base, np.random.default_rng(0))
        assert math.isnan(told.low) or told.low <= told.estimate <= told.high


def test_bca_agrees_with_student_where_pairs_are_many() -> None:
    base, level = accuracies(200, 0)
    student = t_interval(spread(level - base))
    told = bca_interval(level - base, np.random.default_rng(0))
    half = (student.high - student.low) / 2
    assert (told.low, told.high) == pytest.approx((student.low, student.high), abs=0.1 * half)


def test_bca_is_repeated_by_its_draws() -> None:
    base, level = accuracies(6, 0)
    first, again = (bca_interval(level - base, np.random.default_rng(5)) for _ in range(2))
    assert first == again
