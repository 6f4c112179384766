import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from reports.effects import (
    Arm,
    Effect,
    Rules,
    detectable,
    estimate_effects,
    foresee,
    open_levels,
    verdict_words,
)
from reports.paired import bca_interval, power, sign_flip, spread, t_interval
from tests.reports.ablations import RUN_SD, draw_study, make_arm, verdicts_only

# What `study.ablation_plan.looks_of(5, 20)` gives.
LOOKS = (5, 8, 12, 20)
PAIR_SD = RUN_SD * math.sqrt(2)
NAN = math.nan


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """statsmodels collects garbage at every correction, which takes longer than all the rest."""
    monkeypatch.setattr("gc.collect", lambda *args: 0)


def estimate(baseline: Arm, arms: Sequence[Arm], **rules: object) -> list[Effect]:
    return estimate_effects(baseline, arms, Rules(**rules), np.random.default_rng(0))


def verdicts(effects: Sequence[Effect]) -> list[str]:
    return [effect.verdict for effect in effects]


def is_wrong(effects: Sequence[Effect]) -> bool:
    """Say whether a study without any effect tells one."""
    return any(effect.verdict in ("helps", "hurts") for effect in effects)


def slack(share: float, n: int) -> float:
    """Return three Monte-Carlo standard errors of a share."""
    return 3 * math.sqrt(share * (1 - share) / n)


def run_adaptively(
    rng: np.random.Generator, effects: Sequence[float], rules: Rules
) -> tuple[list[Effect], int]:
    """Run a study look by look, as `study.ablate` does; return its effects and number of runs."""
    baseline, arms = draw_study(rng, effects, rules.looks[-1])
    whole = [baseline.values, *(arm.values for arm in arms)]
    done = [0] * len(whole)
    active = set(range(len(whole)))
    for look, n in enumerate(rules.looks):
        for cell in active:
            done[cell] = n
        if look + 1 == len(rules.looks):
            break
        scores = [values[: min(n, k)].tolist() for values, k in zip(whole, done, strict=True)]
        active = open_levels(scores, rules)
        if not active:
            break
        active |= {0}
    run = []
    for arm, values, k in zip([baseline, *arms], whole, done, strict=True):
        seen = np.where(np.arange(len(values)) < k, values, NAN)
        run.append(Arm(arm.label, arm.factor, arm.level, seen, (None,) * len(values)))
    return estimate_effects(run[0], run[1:], rules, rng), sum(done)


# Numbers


def test_an_effect_is_the_paired_t_test_and_its_interval() -> None:
    baseline, arms = draw_study(np.random.default_rng(0), (0.01, -0.02), 6)
    for effect, arm in zip(estimate(baseline, arms), arms, strict=True):
        expected = stats.ttest_rel(arm.values, baseline.values)
        ends = expected.confidence_interval(0.95)
        found = effect.difference
        assert effect.p == pytest.approx(expected.pvalue, abs=1e-9)
        assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=1e-9)
        differences = arm.values - baseline.values
        d_z = differences.mean() / differences.std(ddof=1)
        assert effect.standardised == pytest.approx(d_z, abs=1e-9)
        assert effect.p_sign_flip == sign_flip(differences, np.random.default_rng(0))


def test_the_family_is_corrected_as_statsmodels_does_by_holm() -> None:
    baseline, arms = draw_study(np.random.default_rng(1), (0.0, 0.005, 0.015, 0.03, -0.02), 6)
    effects = estimate(baseline, arms)
    expected = multipletests([effect.p for effect in effects], method="holm")[1]
    assert [effect.p_family for effect in effects] == pytest.approx(list(expected), abs=1e-9)


def test_holm_and_the_verdicts_by_hand() -> None:
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


def test_a_level_that_helps_by_less_than_the_margin_is_said_to() -> None:
    rng = np.random.default_rng(0)
    baseline = make_arm("baseline", rng.normal(0.8, 0.02, 12))
    level = make_arm("a", baseline.values + 0.004 + rng.normal(0, 0.001, 12))
    rules = Rules(margin=0.01)
    (effect,) = estimate_effects(baseline, [level], rules, rng)
    assert effect.verdict == "helps"
    assert verdict_words(effect, rules) == "helps, but by less than ±1"


@pytest.mark.parametrize("test", ["t", "sign-flip"])
def test_the_deciding_test_is_the_one_that_was_asked_for(test: str) -> None:
    baseline, arms = draw_study(np.random.default_rng(2), (0.05,), 5)
    (effect,) = estimate(baseline, arms, test=test)
    assert effect.p < 0.01
    assert effect.p_sign_flip == pytest.approx(1 / 16)  # its floor: no verdict at 0.05
    decided = {"t": ("helps", effect.p), "sign-flip": ("undecided", effect.p_sign_flip)}
    assert (effect.verdict, effect.p_family) == decided[test]


def test_an_open_question_under_the_sign_flip_test_needs_its_floor() -> None:
    baseline, arms = draw_study(np.random.default_rng(2), (0.05, 0.05, 0.05), 5)
    effects = estimate(baseline, arms, test="sign-flip")
    assert [effect.n_needed for effect in effects] == [7, 7, 7]  # 2^-6 <= 0.05 / 3


def test_an_open_question_needs_more_than_was_tried() -> None:
    rng = np.random.default_rng(0)
    for _ in range(12):
        baseline, arms = draw_study(rng, (0.008,) * 3, 5)
        for effect in estimate_effects(baseline, arms, Rules(margin=0.001), rng):
            if effect.verdict == "undecided":
                assert effect.n_needed is None or effect.n_needed > 5
            else:
                assert effect.n_needed is None


def test_what_is_left_out_for_speed_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def told() -> list[list[tuple[str, float, float]]]:
        rng = np.random.default_rng(4)
        found = []
        for _ in range(8):
            baseline, arms = draw_study(rng, (0.0, 0.015, -0.03), 5)
            effects = estimate(baseline, arms)
            found.append([(e.verdict, e.p_family, e.difference.low) for e in effects])
        return found

    whole = told()
    verdicts_only(monkeypatch)
    assert told() == whole


# Shares of wrong and right verdicts


@pytest.mark.parametrize(("n_levels", "n", "n_studies"), [(3, 5, 2000), (8, 4, 600)])
def test_studies_without_effects_tell_one_no_more_often_than_alpha(
    monkeypatch: pytest.MonkeyPatch, n_levels: int, n: int, n_studies: int
) -> None:
    verdicts_only(monkeypatch)
    rng = np.random.default_rng(10)
    wrong = 0
    for _ in range(n_studies):
        baseline, arms = draw_study(rng, (0.0,) * n_levels, n)
        wrong += is_wrong(estimate_effects(baseline, arms, Rules(), rng))
    # Levels that share a baseline go wrong together, so that Holm's level is not used up.
    assert 0.02 < wrong / n_studies < 0.05 + slack(0.05, n_studies)


def test_effects_of_some_levels_do_not_spoil_the_error_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verdicts_only(monkeypatch)
    rng, n_studies = np.random.default_rng(11), 1000
    wrong = 0
    for _ in range(n_studies):
        baseline, arms = draw_study(rng, (0.1, 0.0, 0.0), 5)
        wrong += is_wrong(estimate_effects(baseline, arms, Rules(), rng)[1:])
    assert wrong / n_studies < 0.05 + slack(0.05, n_studies)


def test_sign_flip_studies_without_effects_hold_alpha_with_skewed_noise() -> None:
    # The t-test's assumption is not needed: each difference is as likely as its negative.
    rng, n_studies, n = np.random.default_rng(12), 600, 8
    wrong = 0
    for _ in range(n_studies):
        differences = rng.standard_t(1.5, (3, n)) * 0.01
        ps = [sign_flip(row, rng) for row in differences]
        wrong += bool((multipletests(ps, method="bonferroni")[1] <= 0.05).any())
    assert 0 < wrong / n_studies < 0.05 + slack(0.05, n_studies)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_difference_at_the_margin_is_called_none_no_more_often_than_alpha(
    monkeypatch: pytest.MonkeyPatch, sign: int
) -> None:
    verdicts_only(monkeypatch)
    rng, n_studies, margin = np.random.default_rng(13), 1000, 0.02
    wrong = one = told = 0
    for _ in range(n_studies):
        baseline, arms = draw_study(rng, (sign * margin,) * 3, 8, run_sd=0.005)
        effects = estimate_effects(baseline, arms, Rules(margin=margin), rng)
        wrong += any(effect.p_equivalence <= 0.05 for effect in effects)
        one += effects[0].p_equivalence <= 0.05
        told += "no difference" in verdicts(effects)
    assert told <= wrong  # a difference that is clear is told first
    assert 0.02 < wrong / n_studies < 0.05 + slack(0.05, n_studies)
    assert one / n_studies < 0.05 / 3 + slack(0.05, n_studies)


def test_equal_levels_are_told_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts_only(monkeypatch)
    rng = np.random.default_rng(14)
    found = []
    for _ in range(200):
        baseline, arms = draw_study(rng, (0.0, 0.0, 0.0), 10, run_sd=0.002)
        found += verdicts(estimate_effects(baseline, arms, Rules(margin=0.01), rng))
    assert found.count("no difference") / len(found) > 0.9


@pytest.mark.parametrize("n", [3, 5, 10])
def test_student_intervals_hold_the_truth_as_often_as_they_say(n: int) -> None:
    rng, n_studies = np.random.default_rng(n), 4000
    held = 0
    for _ in range(n_studies):
        baseline, (arm,) = draw_study(rng, (0.01,), n)
        found = t_interval(spread(arm.values - baseline.values))
        held += found.low <= 0.01 <= found.high
    assert held / n_studies == pytest.approx(0.95, abs=slack(0.95, n_studies))


def test_bca_intervals_of_five_pairs_are_too_narrow_as_their_docstring_says() -> None:
    rng, n_studies = np.random.default_rng(5), 600
    held = 0
    for _ in range(n_studies):
        baseline, (arm,) = draw_study(rng, (0.01,), 5)
        found = bca_interval(arm.values - baseline.values, rng)
        held += found.low <= 0.01 <= found.high
    # 84 % in 2,000 studies of the benchmark of planted effects.
    assert 0.95 - 2 * slack(0.95, n_studies) > held / n_studies > 0.75


@pytest.mark.parametrize(("effect", "n"), [(0.02, 5), (0.01, 12), (-0.03, 4)])
def test_a_planted_effect_is_found_as_often_as_the_power_says(
    monkeypatch: pytest.MonkeyPatch, effect: float, n: int
) -> None:
    verdicts_only(monkeypatch)
    rng, n_studies = np.random.default_rng(20), 1200
    right = wrong_way = 0
    for _ in range(n_studies):
        baseline, arms = draw_study(rng, (effect,), n)
        (found,) = estimate_effects(baseline, arms, Rules(), rng)
        right += found.verdict == ("helps" if effect > 0 else "hurts")
        wrong_way += found.verdict == ("hurts" if effect > 0 else "helps")
    expected = power(effect, PAIR_SD, n, 0.05)
    assert 0.2 < expected < 0.95
    assert right / n_studies == pytest.approx(expected, abs=slack(expected, n_studies))
    assert wrong_way <= 0.005 * n_studies


@pytest.mark.parametrize(("n", "alpha"), [(2, 0.05), (5, 0.05), (5, 0.0025), (3, 0.0025)])
def test_the_detectable_difference_has_just_the_power(n: int, alpha: float) -> None:
    size = detectable(n, alpha)
    assert power(size, 1.0, n, alpha) == pytest.approx(0.8, abs=1e-6)


# Adaptive ablations


def test_the_looks_spend_the_error_once() -> None:
    rules = Rules(looks=LOOKS)
    shares = [rules.spent(k) for k in range(len(LOOKS))]
    assert shares == pytest.approx([0.0625, 0.0975, 0.2, 0.64])
    assert sum(shares) == pytest.approx(1)


def test_an_adaptive_p_is_the_best_look_over_its_share() -> None:
    baseline, (arm,) = draw_study(np.random.default_rng(0), (0.01,), 12)
    differences = arm.values - baseline.values
    (effect,) = estimate(baseline, [arm], looks=LOOKS)
    each = [
        stats.ttest_1samp(differences[:n], 0).pvalue / share
        for n, share in ((5, 0.0625), (8, 0.0975), (12, 0.2))
    ]
    assert effect.p_family == pytest.approx(min(1.0, *each), abs=1e-9)
    ends = stats.ttest_1samp(differences, 0).confidence_interval(1 - 0.05 * 0.2)
    found = (effect.difference.low, effect.difference.high)
    assert found == pytest.approx((ends.low, ends.high), abs=1e-9)


def test_looking_again_and_again_holds_alpha_and_the_intervals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verdicts_only(monkeypatch)
    rng, n_studies, rules = np.random.default_rng(30), 500, Rules(looks=LOOKS)
    wrong = held = n_intervals = 0
    for _ in range(n_studies):
        effects, _ = run_adaptively(rng, (0.0, 0.0, 0.0), rules)
        wrong += is_wrong(effects)
        held += sum(e.difference.low <= 0 <= e.difference.high for e in effects)
        n_intervals += len(effects)
    assert 0.01 < wrong / n_studies < 0.05 + slack(0.05, n_studies)
    assert held / n_intervals > 0.95 - slack(0.95, n_intervals)
    # What is paid for: one level, looked at as often without any correction.
    differences = rng.normal(0, PAIR_SD, (4000, LOOKS[-1]))
    ps = [stats.ttest_1samp(differences[:, :n], 0, axis=1).pvalue for n in LOOKS]
    assert np.mean(np.min(ps, axis=0) <= 0.05) > 0.1


def test_adaptive_studies_find_large_effects_in_fewer_runs_than_fixed_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verdicts_only(monkeypatch)
    rng, rules, truth = np.random.default_rng(31), Rules(looks=LOOKS), (0.08, -0.08, 0.08, 0.012)
    n_runs, right = [], []
    for _ in range(150):
        effects, runs = run_adaptively(rng, truth, rules)
        n_runs.append(runs)
        right.append(verdicts(effects)[:3] == ["helps", "hurts", "helps"])
    fixed = 5 * LOOKS[-1]
    assert np.mean(right) > 0.97
    assert np.mean(n_runs) < 0.75 * fixed


def test_settled_levels_get_no_more_replicates_and_open_ones_do() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0.8, 0.02, 5)
    noise = rng.normal(0, 0.001, (3, 5))
    scores = [
        base.tolist(),
        (base + 0.1 + noise[0]).tolist(),  # helps
        (base + noise[1]).tolist(),  # no difference
        (base + 0.01 + 10 * noise[2]).tolist(),  # open
        [0.8, None, 0.8, 0.8, 0.8],  # a run failed
    ]
    assert open_levels(scores, Rules(looks=LOOKS)) == {3}


def test_levels_with_unequal_replicates_are_each_judged_by_their_own_looks() -> None:
    rng = np.random.default_rng(0)
    baseline, (early, late) = draw_study(rng, (0.08, 0.012), 12)
    values = early.values.copy()
    values[5:] = NAN
    stopped = Arm("early", "factor", "1", values, (None,) * 12)
    rules = Rules(looks=LOOKS)
    first, second = estimate_effects(baseline, [stopped, late], rules, rng)
    assert (first.n, second.n) == (5, 12)
    assert first.arm.n_run == 5
    p = stats.ttest_rel(early.values[:5], baseline.values[:5]).pvalue
    assert first.p == pytest.approx(p, abs=1e-9)
    # The smaller one of the two: Holm leaves it as its look gave it.
    assert second.p_family < first.p_family == pytest.approx(p / 0.0625, abs=1e-9)


def test_before_its_first_look_an_adaptive_study_says_nothing() -> None:
    baseline, arms = draw_study(np.random.default_rng(0), (0.2,), 4)
    (effect,) = estimate(baseline, arms, looks=LOOKS)
    assert math.isnan(effect.p_family)
    assert effect.verdict == "undecided"


# Failed and missing runs


def test_a_level_of_which_a_run_failed_fails_and_still_shows_its_difference() -> None:
    baseline, (good, bad) = draw_study(np.random.default_rng(0), (0.1, 0.1), 5)
    values = bad.values.copy()
    values[2] = NAN
    reasons = (None, None, "diverged: the loss is nan at epoch 1", None, None)
    broken = Arm("bad", "factor", "bad", values, reasons)
    rules = Rules()
    first, second = estimate(baseline, [good, broken])
    assert (first.verdict, second.verdict) == ("helps", "fails")
    assert second.n == 4
    left = np.delete(bad.values - baseline.values, 2)
    assert second.difference.estimate == pytest.approx(left.mean())
    assert verdict_words(second, rules) == "fails in 1 of 5 runs (diverged)"
    assert second.n_needed is None


def test_a_level_that_always_fails_has_no_difference_and_is_not_counted_by_holm() -> None:
    baseline, (good, _) = draw_study(np.random.default_rng(0), (0.01, 0.0), 5)
    reasons = ("out of memory: 8 GiB", *("diverged: nan",) * 4)
    dead = Arm("dead", "factor", "dead", np.full(5, NAN), reasons)
    first, second = estimate(baseline, [good, dead])
    assert (second.verdict, second.n) == ("fails", 0)
    assert math.isnan(second.difference.estimate) and math.isnan(second.p_family)
    assert first.p_family == first.p
    words = verdict_words(second, Rules())
    assert words == "fails in 5 of 5 runs (diverged, out of memory)"


def test_a_failed_run_of_the_baseline_drops_its_pair_only() -> None:
    baseline, arms = draw_study(np.random.default_rng(0), (0.01, 0.03), 6)
    values = baseline.values.copy()
    values[0] = NAN
    broken = Arm("baseline", "baseline", "", values, ("diverged: nan", *(None,) * 5))
    for effect, arm in zip(estimate(broken, arms), arms, strict=True):
        expected = stats.ttest_rel(arm.values[1:], baseline.values[1:])
        assert (effect.n, effect.verdict != "fails") == (5, True)
        assert effect.p == pytest.approx(expected.pvalue, abs=1e-9)


def test_one_replicate_has_no_test() -> None:
    rules = Rules()
    (effect,) = estimate(make_arm("baseline", [0.8]), [make_arm("a", [0.9])])
    assert effect.difference.estimate == pytest.approx(0.1)
    ps = (effect.p, effect.p_sign_flip, effect.p_family, effect.p_equivalence)
    assert np.isnan([*ps, effect.difference.low]).all()
    assert verdict_words(effect, rules) == "undecided: one replicate cannot be tested"


def test_a_level_that_was_not_run_is_told_so() -> None:
    waiting = Arm("a", "factor", "a", np.full(5, NAN), (None,) * 5)
    (effect,) = estimate(make_arm("baseline", [0.8] * 5), [waiting])
    assert (effect.n, effect.arm.n_run) == (0, 0)
    assert verdict_words(effect, Rules()) == "not run yet"


def test_equal_differences_are_judged_by_the_step_of_the_metric() -> None:
    baseline = make_arm("baseline", [0.8, 0.9])
    level = make_arm("a", [0.8125, 0.9125])
    (sure,) = estimate(baseline, [level])
    (careful,) = estimate(baseline, [level], resolution=1 / 80)
    assert (sure.verdict, sure.p) == ("helps", 0)
    assert careful.verdict == "undecided"
    assert careful.p > 0.05 and math.isfinite(careful.standardised)


def test_a_level_that_changes_nothing_at_all_makes_no_difference() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.02, 5)
    (effect,) = estimate(make_arm("baseline", values), [make_arm("a", values)], resolution=1e-3)
    assert (effect.p, effect.verdict) == (1, "no difference")


# Foresight


def test_foresight_warns_of_what_cannot_decide() -> None:
    assert foresee(1, 3, Rules())[0].startswith("warning: with one replicate")
    assert foresee(5, 0, Rules()) == []
    (told,) = foresee(5, 3, Rules(test="sign-flip"))
    assert told.startswith("warning: this run could not decide anything") and "needs 7" in told
    assert not any("sign-flip" in line for line in foresee(7, 3, Rules(test="sign-flip")))
    assert foresee(2, 20, Rules())[-1].startswith("warning")
    assert not foresee(10, 3, Rules())[-1].startswith("warning")
