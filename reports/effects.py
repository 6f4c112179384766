"""Effects of an ablation's levels: difference to the baseline, interval, tests, verdict."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from reports.intervals import Interval
from reports.paired import (
    Array,
    Spread,
    equivalence,
    paired_t,
    power,
    replicates_needed,
    spread,
    t_interval,
)
from reports.words import plural

Verdict = Literal["helps", "hurts", "no difference", "identical", "inconclusive", "fails"]
_POWER = 0.8
# A standardised difference that few settings reach: assumption.
_LARGE = 4.0


@dataclass(frozen=True, slots=True)
class Rules:
    """How effects are judged.

    Attributes:
        alpha: Family-wise error that Holm's correction holds, over the levels of one design.
        margin: Difference that does not matter, as a fraction (0.01 is one accuracy point).
        confidence: Of intervals, each for itself.
        resolution: Step in which accuracy moves: one image's share.
        looks: Replicates at which an adaptive ablation looked; one number for a fixed one.
    """

    alpha: float = 0.05
    margin: float = 0.01
    confidence: float = 0.95
    resolution: float = 0.0
    looks: tuple[int, ...] = ()

    @property
    def is_adaptive(self) -> bool:
        """Say whether more than one look was planned."""
        return len(self.looks) > 1

    def spent(self, look: int) -> float:
        """Return the share of the error that a look may spend: (n / last n)^2, less what is spent.

        The shares add up to one, so that by Bonferroni the looks together hold the level, however
        the stopping is done and whatever the number of replicates. Squared, since later looks see
        more: simulated, a mixed study settles 85 % of its levels so, and 76 % with equal shares a
        replicate.

        References:
            Kim & DeMets 1987, https://doi.org/10.1093/biomet/74.1.149 (power family).
        """
        before = self.looks[look - 1] if look else 0
        return (self.looks[look] ** 2 - before**2) / self.looks[-1] ** 2


@dataclass(frozen=True, slots=True)
class Arm:
    """The runs of one cell.

    Attributes:
        label: What tables call it.
        factor: What is varied; `baseline` for the baseline.
        level: Its setting.
        values: Accuracy by replicate, shape (R,), fraction in [0, 1]; NaN where there is none.
        failures: Why a replicate failed, (R,); None where it did not, or was not run yet.
    """

    label: str
    factor: str
    level: str
    values: Array
    failures: tuple[str | None, ...]

    @property
    def n_failed(self) -> int:
        """Count the replicates that diverged or broke."""
        return sum(reason is not None for reason in self.failures)

    @property
    def n_run(self) -> int:
        """Count the replicates that came to an end."""
        return int(np.isfinite(self.values).sum()) + self.n_failed

    @property
    def accuracy(self) -> Interval:
        """Return the mean with Student's 95 % interval over replicates."""
        done = self.values[np.isfinite(self.values)]
        if not len(done):
            return Interval(math.nan, math.nan, math.nan)
        return t_interval(spread(done))


@dataclass(frozen=True, slots=True)
class Effect:
    """A level against the baseline; differences are fractions, level minus baseline.

    Attributes:
        arm: The level's runs.
        n: Pairs: replicates complete on both sides.
        difference: Mean paired difference with Student's interval.
        sd: Standard deviation of the paired differences.
        standardised: Difference over `sd` (Cohen's d_z).
        p: Paired t-test, of the last look; two-sided.
        p_family: The paired t-test after all corrections: the looks' and Holm's.
        p_equivalence: Two one-sided tests within the margin, corrected alike.
        verdict: In words.
        n_needed: About how many replicates would settle it; None unless inconclusive, or where
            more than 1,000 were needed.
    """

    arm: Arm
    n: int
    difference: Interval
    sd: float
    standardised: float
    p: float
    p_family: float
    p_equivalence: float
    verdict: Verdict
    n_needed: int | None


def estimate_effects(baseline: Arm, arms: Sequence[Arm], rules: Rules) -> list[Effect]:
    """Estimate each level's effect against the baseline, and judge the family of them.

    Replicates are paired by seed, so the intervals say what other seeds (and splits, where they
    were redrawn) would give, not other data sets. Holm's correction is over the levels that can
    be tested. A level of which a run failed is judged `fails`; its difference, from the pairs that
    are left, is shown all the same.

    Args:
        baseline: What is compared against.
        arms: The other levels.
        rules: How they are judged.

    Returns:
        One effect for each of `arms`, in their order.

    References:
        Holm 1979, https://www.jstor.org/stable/4615733.
    """
    raw = [_estimate(baseline, arm, rules) for arm in arms]
    family = holm([effect.p_family for effect in raw])
    equal = holm([effect.p_equivalence for effect in raw])
    n_tests = sum(math.isfinite(effect.p_family) for effect in raw)
    found = []
    for effect, p_family, p_equal in zip(raw, family, equal, strict=True):
        judged = replace(effect, p_family=p_family, p_equivalence=p_equal)
        verdict = _verdict(judged, rules)
        needed = None
        if verdict == "inconclusive":
            level = rules.alpha / n_tests if n_tests else rules.alpha
            needed = _needed(judged, rules, level)
        found.append(replace(judged, verdict=verdict, n_needed=needed))
    return found


def _needed(effect: Effect, rules: Rules, level: float) -> int | None:
    seen = Spread(effect.n, effect.difference.estimate, effect.sd)
    needed = replicates_needed(seen, level, rules.margin, _POWER)
    if needed is None:
        return None
    # What was tried and left it open was not enough, whatever the observed scatter promises.
    return max(needed, effect.n + 1)


def _estimate(baseline: Arm, arm: Arm, rules: Rules) -> Effect:
    differences = arm.values - baseline.values
    differences = differences[np.isfinite(differences)]
    n = len(differences)
    nothing = Interval(math.nan, math.nan, math.nan)
    if n == 0:
        nan = math.nan
        return Effect(arm, 0, nothing, nan, nan, nan, nan, nan, "inconclusive", None)
    seen = spread(differences, rules.resolution)
    decisive, equal, confidence = _after_looks(differences, rules)
    is_identical = n > 1 and not differences.any()
    if is_identical:
        equal = math.nan  # runs without any scatter do not show how large it is
    return Effect(
        arm=arm,
        n=n,
        difference=t_interval(seen, confidence),
        sd=seen.sd,
        standardised=seen.mean / seen.sd if seen.sd > 0 else math.nan,
        p=paired_t(seen),
        p_family=decisive,
        p_equivalence=equal,
        verdict="identical" if is_identical else "inconclusive",
        n_needed=None,
    )


def _after_looks(differences: Array, rules: Rules) -> tuple[float, float, float]:
    """Return p of the t-test and of equivalence after the looks, and the confidence.

    A look's p over its share of the error is a p value that holds over all looks (by Bonferroni,
    also when the smallest is taken and the stopping depends on the data).
    """

    def tested(part: Array) -> tuple[float, float]:
        seen = spread(part, rules.resolution)
        return paired_t(seen), equivalence(seen, rules.margin)

    if not rules.is_adaptive:
        return *tested(differences), rules.confidence
    done = [k for k, n in enumerate(rules.looks) if n <= len(differences)]
    if not done:
        return math.nan, math.nan, rules.confidence
    each = [(*tested(differences[: rules.looks[k]]), rules.spent(k)) for k in done]
    decisive = min(min(p / share, 1.0) for p, _, share in each)
    equal = min(min(p / share, 1.0) for _, p, share in each)
    return decisive, equal, 1 - (1 - rules.confidence) * rules.spent(done[-1])


def holm(values: Sequence[float]) -> list[float]:
    """Correct p values by Holm's method; NaN (no test) stays and is not counted."""
    p = np.array(values, dtype=np.float64)
    known = np.argsort(p)[: np.isfinite(p).sum()]  # NaN sorts last
    steps = p[known] * np.arange(len(known), 0, -1)
    p[known] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(value) for value in p]


def _verdict(effect: Effect, rules: Rules) -> Verdict:
    if effect.arm.n_failed:
        return "fails"
    if effect.verdict == "identical":
        return "identical"
    if effect.p_family <= rules.alpha:
        return "helps" if effect.difference.estimate > 0 else "hurts"
    if effect.p_equivalence <= rules.alpha:
        return "no difference"
    return "inconclusive"


def verdict_words(effect: Effect, rules: Rules) -> str:
    """Say a verdict in words."""
    arm, margin = effect.arm, f"±{100 * rules.margin:g}"
    if effect.verdict == "fails":
        kinds = {(reason or "").partition(":")[0] for reason in arm.failures if reason}
        return f"fails in {arm.n_failed} of {arm.n_run} runs ({', '.join(sorted(kinds))})"
    if effect.verdict in ("helps", "hurts"):
        is_small = max(abs(effect.difference.low), abs(effect.difference.high)) < rules.margin
        return f"{effect.verdict}, but by less than {margin}" if is_small else effect.verdict
    if effect.verdict == "no difference":
        return f"no difference beyond {margin}"
    if effect.verdict == "identical":
        return f"identical in all {effect.n} seeds"
    if effect.n < 2:
        return "inconclusive: one replicate cannot be tested" if effect.n else "not run yet"
    if effect.n_needed is None:
        return "inconclusive: more than 1,000 replicates needed"
    return f"inconclusive: about {roughly(effect.n_needed)} replicates would settle it"


def roughly(n: int) -> int:
    """Round a number of replicates to two figures: an estimate from few seeds has no more."""
    return n if n < 100 else round(n, 1 - len(str(n)) + 1)


def open_levels(scores: Sequence[Sequence[float | None]], rules: Rules) -> set[int]:
    """Return the cells of an adaptive ablation that are open; cell 0 is the baseline.

    Args:
        scores: Accuracy by cell and replicate; None where a run failed.
        rules: How they are judged.
    """
    most = max(len(values) for values in scores)
    arms = [_bare_arm(k, values, most) for k, values in enumerate(scores)]
    effects = estimate_effects(arms[0], arms[1:], rules)
    is_open = ("inconclusive", "identical")  # a few equal seeds do not show that all are
    return {k for k, effect in enumerate(effects, start=1) if effect.verdict in is_open}


def _bare_arm(number: int, values: Sequence[float | None], length: int) -> Arm:
    padded = np.full(length, math.nan)
    padded[: len(values)] = [math.nan if value is None else value for value in values]
    failures = tuple("failed" if value is None else None for value in values)
    return Arm(str(number), "", "", padded, failures)


def foresee(n: int, n_tests: int, rules: Rules) -> list[str]:
    """Say, before a run, what its replicates could decide.

    Args:
        n: Replicates (the most of an adaptive ablation).
        n_tests: Levels that will be compared with the baseline.
        rules: How they will be judged.

    Returns:
        Sentences; those that begin with `warning:` name a run that could decide little or nothing.
    """
    if n_tests == 0:
        return []
    if n < 2:
        return [
            "warning: with one replicate nothing can be tested: a difference is shown without "
            "interval or p value. Give --replicates 5 or more."
        ]
    levels = plural(n_tests, "level")
    size = detectable(n, rules.alpha / n_tests)
    text = (
        f"at {n} replicates the t-test finds a difference with {100 * _POWER:.0f} % power (at "
        f"Holm's strictest step, {levels}) if it is {size:.1f} times the standard deviation of "
        f"the paired differences, such as {3 * size:.0f} points where that is 3."
    )
    if size > _LARGE:
        text = f"warning: {text} More replicates or fewer levels would find smaller ones."
    return [text]


def detectable(n: int, alpha: float, wanted: float = _POWER) -> float:
    """Return the standardised difference (d_z) that n pairs find with the wanted power."""
    low, high = 0.0, 1.0
    while power(high, 1.0, n, alpha) < wanted:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, 1.0, n, alpha) >= wanted else (middle, high)
    return high
