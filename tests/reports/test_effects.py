"""Paired statistics and verdicts: agreement with libraries, error rates, power, failed runs."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from reports.effects import (
    Arm,
    Effect,
    Rules,
    detectable,
    estimate_effects,
    foresee,
    holm,
    open_levels,
    verdict_words,
)
from reports.intervals import difference_interval, wilson_interval
from reports.paired import (
    Spread,
    equivalence,
    equivalence_power,
    paired_t,
    power,
    replicates_needed,
    spread,
    t_interval,
)
from tests.reports.studies import make_arm

# The interim analyses from 5 to 20 replicates.
LOOKS = (5, 8, 12, 20)
RUN_SD = 0.01
NAN = math.nan


@pytest.fixture
def no_foresight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out how many replicates would be needed: nine tenths of the time, and no verdict."""
    monkeypatch.setattr("reports.effects.replicates_needed", lambda *args: None)


def estimate(baseline: Arm, arms: Sequence[Arm], **rules: object) -> list[Effect]:
    return estimate_effects(baseline, arms, Rules(**rules))


def verdicts(effects: Sequence[Effect]) -> list[str]:
    return [effect.verdict for effect in effects]


def drawn(
    seed: int | np.random.Generator, effects: Sequence[float], n: int, run_sd: float = RUN_SD
) -> tuple[Arm, list[Arm]]:
    """Draw a baseline and levels with these true effects; each seed has a scatter of its own."""
    rng = np.random.default_rng(seed)
    seeds = 0.8 + rng.normal(0, 0.02, n)
    arms = [
        make_arm(f"level {k}", seeds + effect + rng.normal(0, run_sd, n))
        for k, effect in enumerate((0.0, *effects))
    ]
    return arms[0], arms[1:]


def simulate(
    n_studies: int, effects: Sequence[float], n: int, run_sd: float = RUN_SD, **rules: object
) -> list[list[Effect]]:
    rng = np.random.default_rng(10)
    return [estimate(*drawn(rng, effects, n, run_sd), **rules) for _ in range(n_studies)]


def slack(share: float, n: int) -> float:
    """Return three Monte-Carlo standard errors of a share."""
    return 3 * math.sqrt(share * (1 - share) / n)


def stopped_after(n: int, arm: Arm) -> Arm:
    values = np.where(np.arange(len(arm.values)) < n, arm.values, NAN)
    return replace(arm, values=values)


def run_adaptively(
    rng: np.random.Generator, effects: Sequence[float], rules: Rules
) -> tuple[list[Effect], int]:
    """Run a study look by look, as an ablation does; return its effects and number of runs."""
    baseline, arms = drawn(rng, effects, rules.looks[-1])
    whole = [baseline, *arms]
    done = [0] * len(whole)
    active = set(range(len(whole)))
    for n in rules.looks:
        done = [n if cell in active else k for cell, k in enumerate(done)]
        active = open_levels([a.values[:k] for a, k in zip(whole, done, strict=True)], rules)
        if not active:
            break
        active |= {0}
    seen = [stopped_after(k, arm) for arm, k in zip(whole, done, strict=True)]
    return estimate_effects(seen[0], seen[1:], rules), sum(done)


# Agreement with libraries


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_paired_statistics_agree_with_scipy_and_statsmodels(n: int) -> None:
    baseline, (arm,) = drawn(n, (0.01,), n)
    found = spread(arm.values - baseline.values)
    expected = stats.ttest_rel(arm.values, baseline.values)
    assert paired_t(found) == pytest.approx(expected.pvalue, abs=1e-9)
    for confidence in (0.8, 0.95, 0.99):
        ends, own = expected.confidence_interval(confidence), t_interval(found, confidence)
        assert (own.low, own.high) == pytest.approx((ends.low, ends.high), abs=1e-9)
    for margin in (0.005, 0.02):
        p = ttost_paired(arm.values, baseline.values, -margin, margin)[0]
        assert equivalence(found, margin) == pytest.approx(p, abs=1e-9)


def test_holm_agrees_with_statsmodels_and_skips_what_was_not_tested() -> None:
    rng = np.random.default_rng(1)
    for n in (1, 2, 7, 20):
        p = rng.random(n) ** 3
        expected = multipletests(p, method="holm")[1]
        assert holm(p.tolist()) == pytest.approx(expected.tolist(), abs=1e-12)
    assert holm([0.01, NAN, 0.03]) == pytest.approx([0.02, NAN, 0.03], nan_ok=True)
    assert holm([]) == []


@pytest.mark.parametrize("n", [2, 5, 40])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 20])
@pytest.mark.parametrize("effect", [0.0, 0.3, -0.8, 2.0])
def test_power_agrees_with_statsmodels(n: int, alpha: float, effect: float) -> None:
    expected = TTestPower().power(effect, n, alpha, alternative="two-sided")
    if np.isnan(expected):  # its lower tail, which is nothing then
        expected = TTestPower().power(effect, n, alpha / 2, alternative="larger")
    assert power(0.01 * effect, 0.01, n, alpha) == pytest.approx(expected, abs=1e-9)


def test_power_is_a_number_everywhere_and_grows_with_replicates() -> None:
    # scipy's nct.cdf is NaN in about a tenth of these places, where the tail is nothing.
    for alpha in (0.05, 1e-4):
        for effect in np.geomspace(0.1, 300, 25):
            values = [power(effect, 1.0, n, alpha) for n in (2, 3, 4, 5, 8, 20, 50)]
            assert np.isfinite(values).all()
            assert (np.diff(values) > -1e-12).all()


@pytest.mark.parametrize(
    ("mean", "sd", "alpha", "margin"),
    [
        (0.010, 0.010, 0.05, 0.001),
        (-0.02, 0.015, 0.05 / 20, 0.001),
        (0.000, 0.010, 0.05, 0.010),
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
    assert best(n - 1) < 0.8 <= best(n)
    for hopeless in (Spread(5, 0.0001, 0.05), Spread(1, 0.01, NAN), Spread(5, 0.01, 0.0)):
        assert replicates_needed(hopeless, 0.05, 0.0001) is None


@pytest.mark.parametrize(("n", "alpha"), [(2, 0.05), (5, 0.05), (3, 0.0025)])
def test_the_detectable_difference_has_just_the_power(n: int, alpha: float) -> None:
    assert power(detectable(n, alpha), 1.0, n, alpha) == pytest.approx(0.8, abs=1e-6)


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


# Verdicts


def test_verdicts_and_corrected_p_by_hand() -> None:
    # Differences of 4 pairs: t = mean / (sd / 2).
    baseline = make_arm("baseline", [0.5] * 4)
    shape = np.array([-1.0, 1.0, -1.0, 1.0])  # sd = sqrt(4 / 3)
    arms = [make_arm(str(m), 0.5 + m + 0.001 * shape) for m in (0.1, 0.0008, -0.1, 0.0)]
    effects = estimate(baseline, arms, margin=0.01)
    error = 0.001 * math.sqrt(4 / 3) / 2
    clear, small = (2 * stats.t.sf(m / error, 3) for m in (0.1, 0.0008))
    by_hand = [4 * clear, 2 * small, 4 * clear, 1.0]
    assert [effect.p_family for effect in effects] == pytest.approx(by_hand, abs=1e-9)
    assert verdicts(effects) == ["helps", "no difference", "hurts", "no difference"]
    assert effects[0].standardised == pytest.approx(0.1 / (2 * error))
    (effect,) = estimate(baseline, [make_arm("a", 0.505 + 0.001 * shape)])
    assert verdict_words(effect, Rules(margin=0.01)) == "helps, but by less than ±1"


def test_an_open_question_needs_more_replicates_than_were_tried() -> None:
    for seed in range(12):
        for effect in estimate(*drawn(seed, (0.008,) * 3, 5), margin=0.001):
            needed = effect.n_needed
            assert needed is None or (effect.verdict == "inconclusive" and needed > 5)


def test_equal_differences_are_judged_by_the_resolution_of_the_metric() -> None:
    baseline, level = make_arm("baseline", [0.8, 0.9]), make_arm("a", [0.8125, 0.9125])
    (sure,) = estimate(baseline, [level])
    (careful,) = estimate(baseline, [level], resolution=1 / 80)
    assert (sure.verdict, sure.p) == ("helps", 0)
    assert careful.verdict == "inconclusive"
    assert careful.p > 0.05 and math.isfinite(careful.standardised)
    (same,) = estimate(baseline, [make_arm("a", baseline.values)], resolution=1e-3)
    assert (same.p, same.verdict) == (1, "identical")
    assert verdict_words(same, Rules()) == "identical in all 2 seeds"
    # Differences that cancel are not identical, also before an adaptive ablation's first look.
    (mixed,) = estimate(baseline, [make_arm("a", [0.9, 0.8])], looks=(3, 6))
    assert mixed.verdict == "inconclusive"


# Error rates, coverage, power


@pytest.mark.parametrize(
    ("effects", "n", "n_studies"),
    [((0.0,) * 3, 5, 2000), ((0.0,) * 8, 4, 600), ((0.1, 0.0, 0.0), 5, 1000)],
)
@pytest.mark.usefixtures("no_foresight")
def test_levels_without_effect_are_reported_no_more_often_than_alpha(
    effects: tuple[float, ...], n: int, n_studies: int
) -> None:
    found = simulate(n_studies, effects, n)
    nulls = [verdicts(own[effects.count(0.1) :]) for own in found]
    wrong = sum(not {"helps", "hurts"}.isdisjoint(own) for own in nulls)
    # Levels that share a baseline go wrong together, so that Holm's level is not used up.
    assert 0.02 < wrong / n_studies < 0.05 + slack(0.05, n_studies)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.usefixtures("no_foresight")
def test_a_difference_at_the_margin_is_called_none_no_more_often_than_alpha(sign: int) -> None:
    found = simulate(1000, (sign * 0.02,) * 3, 8, run_sd=0.005, margin=0.02)
    wrong = sum(any(effect.p_equivalence <= 0.05 for effect in effects) for effects in found)
    assert 0.02 < wrong / 1000 < 0.05 + slack(0.05, 1000)


@pytest.mark.parametrize(
    ("effect", "n", "verdict"),
    [(0.02, 5, "helps"), (-0.03, 4, "hurts"), (0.0, 12, "no difference")],
)
@pytest.mark.usefixtures("no_foresight")
def test_a_planted_truth_is_found_as_often_as_the_power_says(
    effect: float, n: int, verdict: str
) -> None:
    right = [own.verdict == verdict for (own,) in simulate(1200, (effect,), n, margin=0.013)]
    sd = RUN_SD * math.sqrt(2)
    expected = power(effect, sd, n, 0.05) if effect else equivalence_power(0, sd, n, 0.05, 0.013)
    assert 0.2 < expected < 0.95
    assert np.mean(right) == pytest.approx(expected, abs=slack(expected, 1200))


# Adaptive ablations


def test_an_adaptive_p_is_the_best_look_over_its_share_of_the_error() -> None:
    assert sum(Rules(looks=LOOKS).spent(k) for k in range(len(LOOKS))) == pytest.approx(1)
    baseline, (arm,) = drawn(0, (0.01,), 12)
    differences = arm.values - baseline.values
    (effect,) = estimate(baseline, [arm], looks=LOOKS)
    each = [
        stats.ttest_1samp(differences[:n], 0).pvalue / share
        for n, share in ((5, 0.0625), (8, 0.0975), (12, 0.2))
    ]
    assert effect.p_family == pytest.approx(min(1.0, *each), abs=1e-9)
    assert math.isnan(estimate(*drawn(0, (0.2,), 4), looks=LOOKS)[0].p_family)  # before any look
    ends = stats.ttest_1samp(differences, 0).confidence_interval(1 - 0.05 * 0.2)
    found = (effect.difference.low, effect.difference.high)
    assert found == pytest.approx((ends.low, ends.high), abs=1e-9)


@pytest.mark.usefixtures("no_foresight")
def test_adaptive_studies_hold_alpha_and_coverage_and_find_large_effects_in_few_runs() -> None:
    rng, rules, truth = np.random.default_rng(30), Rules(looks=LOOKS), (0.08, -0.08, 0.0, 0.0)
    studies = [run_adaptively(rng, truth, rules) for _ in range(500)]
    wrong = np.mean([not {"helps", "hurts"}.isdisjoint(verdicts(e)[2:]) for e, _ in studies])
    held = [
        effect.difference.low <= true <= effect.difference.high
        for effects, _ in studies
        for effect, true in zip(effects, truth, strict=True)
    ]
    assert 0.01 < wrong < 0.05 + slack(0.05, 500)
    assert np.mean(held) > 0.95 - slack(0.95, len(held))
    right = [verdicts(effects)[:2] == ["helps", "hurts"] for effects, _ in studies]
    assert np.mean(right) > 0.97
    assert np.mean([n_runs for _, n_runs in studies]) < 0.75 * 5 * LOOKS[-1]


def test_settled_levels_get_no_more_replicates_and_open_ones_do() -> None:
    shape = np.array([-1.0, 1.0, 0.0, 1.0, -1.0])
    helps, same, undecided = 0.9 + 0.001 * shape, 0.8 + 0.001 * shape, 0.81 + 0.02 * shape
    failed = [0.8, None, 0.8, 0.8, 0.8]
    scores = [[0.8] * 5, helps.tolist(), same.tolist(), undecided.tolist(), failed]
    assert open_levels(scores, Rules(looks=LOOKS)) == {3}


def test_levels_with_unequal_replicates_are_each_judged_by_their_own_looks() -> None:
    baseline, (early, late) = drawn(0, (0.08, 0.012), 12)
    first, second = estimate(baseline, [stopped_after(5, early), late], looks=LOOKS)
    assert (first.n, second.n) == (5, 12)
    p = stats.ttest_rel(early.values[:5], baseline.values[:5]).pvalue
    assert first.p == pytest.approx(p, abs=1e-9)
    # The smaller one of the two: Holm leaves it as its look gave it.
    assert second.p_family < first.p_family == pytest.approx(p / 0.0625, abs=1e-9)


# Failed and missing runs


def test_a_level_with_a_failed_run_fails_and_still_shows_its_difference() -> None:
    baseline, (good, bad) = drawn(0, (0.1, 0.1), 5)
    broken = make_arm("bad", [*bad.values[:2], NAN, *bad.values[3:]])
    reasons = ("out of memory: 8 GiB", *("diverged: nan",) * 4)
    dead = Arm("dead", "factor", "dead", np.full(5, NAN), reasons)
    effects = estimate(baseline, [good, broken, dead])
    assert verdicts(effects) == ["helps", "fails", "fails"]
    assert [effect.n for effect in effects] == [5, 4, 0]
    left = np.delete(bad.values - baseline.values, 2)
    assert effects[1].difference.estimate == pytest.approx(left.mean())
    assert math.isnan(effects[2].difference.estimate)
    assert verdict_words(effects[2], Rules()) == "fails in 5 of 5 runs (diverged, out of memory)"
    # What has no pair is not tested, so Holm counts two.
    assert [e.p_family for e in effects[:2]] == holm([effect.p for effect in effects[:2]])


def test_a_failed_run_of_the_baseline_drops_its_pair_only() -> None:
    baseline, arms = drawn(0, (0.01, 0.03), 6)
    broken = make_arm("baseline", [NAN, *baseline.values[1:]])
    for effect, arm in zip(estimate(broken, arms), arms, strict=True):
        expected = stats.ttest_rel(arm.values[1:], baseline.values[1:])
        assert (effect.n, effect.verdict != "fails") == (5, True)
        assert effect.p == pytest.approx(expected.pvalue, abs=1e-9)


def test_one_replicate_has_a_difference_and_no_test() -> None:
    (effect,) = estimate(make_arm("baseline", [0.8]), [make_arm("a", [0.9])])
    assert effect.difference.estimate == pytest.approx(0.1)
    ps = (effect.p, effect.p_family, effect.p_equivalence, effect.difference.low)
    assert np.isnan(ps).all() and effect.verdict == "inconclusive"


@pytest.mark.parametrize(("n", "n_tests", "warns"), [(1, 3, 1), (5, 0, 0), (2, 20, 1), (10, 3, 0)])
def test_foresight_warns_of_what_cannot_decide(n: int, n_tests: int, warns: int) -> None:
    found = foresee(n, n_tests, Rules())
    assert len(found) == (n_tests > 0)
    assert sum(sentence.startswith("warning") for sentence in found) == warns
