"""Planted effects: how often the ablation's statistics are right on simulated studies.

Every study goes through the code that reports use (`estimate_effects`, `open_levels`,
`estimate_contrasts`, `analyse_variance`): seeds are paired and share what is easy or hard about
them. Each figure has its number of studies and its Monte-Carlo standard error.

    python benchmarks/planted_effects.py --studies 2000
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from unittest.mock import patch

import numpy as np
from scipy import stats

from reports import effects as module
from reports.ablation import Ablation, Runs
from reports.effects import Arm, Effect, Rules, estimate_effects, open_levels
from reports.factorial import analyse_variance, estimate_contrasts
from reports.paired import (
    Spread,
    power,
    replicates_needed,
    spread,
    t_interval,
)
from study.ablation.designs import Factorial
from study.ablation.factors import Factor, Level
from study.record.models import Design, Study

SEED_SD = 0.02  # what all settings of a seed share
RUN_SD = 0.01  # of a run
PAIR_SD = RUN_SD * math.sqrt(2)
LOOKS = (5, 8, 12, 20)
Row = tuple[str, str, float, int, str]


def draw(rng: np.random.Generator, truth: Sequence[float], n: int) -> tuple[Arm, list[Arm]]:
    """Draw a baseline and levels with these true effects, n replicates each."""
    shared = 0.8 + rng.normal(0, SEED_SD, n)
    arms = [
        Arm(str(k), "factor", str(k), shared + effect + rng.normal(0, RUN_SD, n), (None,) * n)
        for k, effect in enumerate([0.0, *truth])
    ]
    return arms[0], arms[1:]


def fixed(rng: np.random.Generator, truth: Sequence[float], n: int, rules: Rules) -> list[Effect]:
    """Judge a study with n replicates of everything."""
    baseline, arms = draw(rng, truth, n)
    return estimate_effects(baseline, arms, rules)


def adaptive(
    rng: np.random.Generator, truth: Sequence[float], rules: Rules
) -> tuple[list[Effect], int]:
    """Run a study look by look, as an ablation does; return its effects and its runs."""
    baseline, arms = draw(rng, truth, rules.looks[-1])
    every = [baseline, *arms]
    done = [0] * len(every)
    active = set(range(len(every)))
    for look, n in enumerate(rules.looks):
        for cell in active:
            done[cell] = n
        if look + 1 == len(rules.looks):
            break
        scores = [arm.values[:k].tolist() for arm, k in zip(every, done, strict=True)]
        active = open_levels(scores, rules)
        if not active:
            break
        active |= {0}
    for arm, k in zip(every, done, strict=True):
        arm.values[k:] = math.nan
    return estimate_effects(baseline, arms, rules), sum(done)


def tells(effects: Sequence[Effect]) -> bool:
    """Say whether any level is found to help or hurt."""
    return any(effect.verdict in ("helps", "hurts") for effect in effects)


def settled(effect: Effect) -> bool:
    """Say whether a level's question is answered."""
    return effect.verdict in ("helps", "hurts", "no difference")


def row(what: str, how: str, hits: int, n: int, aim: str) -> Row:
    """Put a share into a row of the table."""
    return what, how, hits / n, n, aim


def false_positives(n: int) -> Iterator[Row]:
    """Studies of three levels, none of which does anything."""
    what, null = "false positives, family of 3", (0.0,) * 3
    for replicates in (3, 5, 10):
        rng = np.random.default_rng(replicates)
        hits = sum(tells(fixed(rng, null, replicates, Rules())) for _ in range(n))
        yield row(what, f"t, n = {replicates}", hits, n, "<= 5 %")
    rng = np.random.default_rng(50)
    hits = sum(tells(fixed(rng, (0.0,) * 20, 5, Rules())) for _ in range(n // 4))
    yield row("false positives, family of 20", "t, n = 5", hits, n // 4, "<= 5 %")
    rng, rules = np.random.default_rng(52), Rules(looks=LOOKS)
    hits = held = 0
    for _ in range(n):
        found, _ = adaptive(rng, null, rules)
        hits += tells(found)
        held += sum(each.difference.low <= 0 <= each.difference.high for each in found)
    yield row(what, f"adaptive {LOOKS[0]}..{LOOKS[-1]}", hits, n, "<= 5 %")
    yield row(
        "interval holds the truth", f"adaptive {LOOKS[0]}..{LOOKS[-1]}", held, 3 * n, ">= 95 %"
    )
    draws = np.random.default_rng(53).normal(0, PAIR_SD, (n, LOOKS[-1]))
    ps = [stats.ttest_1samp(draws[:, :k], 0, axis=1).pvalue for k in LOOKS]
    hits = int((np.min(ps, axis=0) <= 0.05).sum())
    yield row("false positives, one level", "looks uncorrected", hits, n, "(not used)")


def coverage(n: int) -> Iterator[Row]:
    """Intervals of a planted difference."""
    for replicates in (3, 5, 10, 20):
        rng = np.random.default_rng(100 + replicates)
        draws = rng.normal(0.01, PAIR_SD, (n, replicates))
        found = [t_interval(spread(each)) for each in draws]
        held = sum(each.low <= 0.01 <= each.high for each in found)
        yield row("interval holds the truth", f"t, n = {replicates}", held, n, "95 %")


def found_effects(n: int) -> Iterator[Row]:
    """A planted effect alone, and among others, beside what `power` says."""
    for effect, replicates in ((0.02, 3), (0.02, 5), (0.01, 12), (0.015, 10), (0.03, 4)):
        rng = np.random.default_rng(200 + replicates)
        hits = sum(tells(fixed(rng, (effect,), replicates, Rules())) for _ in range(n))
        case = f"{100 * effect:g} points, n = {replicates}"
        aim = f"{100 * power(effect, PAIR_SD, replicates, 0.05):.1f} %"
        yield row("power, one level", case, hits, n, aim)
    rng = np.random.default_rng(210)
    hits = sum(tells(fixed(rng, (0.03, 0, 0), 5, Rules())[:1]) for _ in range(n))
    aim = f">= {100 * power(0.03, PAIR_SD, 5, 0.05 / 3):.1f} %"
    yield row("power, one of three levels", "3 points, n = 5", hits, n, aim)


def equivalence(n: int) -> Iterator[Row]:
    """Differences exactly as large as the margin, and none at all."""
    for replicates in (5, 10):
        rng, rules = np.random.default_rng(300 + replicates), Rules(margin=0.02)
        wrong = equal = 0
        for _ in range(n):
            found = fixed(rng, (0.02,) * 3, replicates, rules)
            wrong += any(each.p_equivalence <= 0.05 for each in found)
            equal += any(each.verdict == "no difference" for each in found)
        how = f"n = {replicates}"
        yield row("found equal at the margin, test", how, wrong, n, "<= 5 %")
        yield row("found equal at the margin, verdict", how, equal, n, "<= 5 %")
    rng, rules = np.random.default_rng(320), Rules(margin=0.02)
    found = [fixed(rng, (0.0,) * 3, 10, rules) for _ in range(n)]
    hits = sum(each.verdict == "no difference" for study in found for each in study)
    yield row("found equal where it is", "n = 10", hits, 3 * n, "")


def calibration(n: int) -> Iterator[Row]:
    """Promised numbers of replicates: from the truth, and from a pilot of five."""
    rules = Rules(margin=0.01)
    for effect in (0.03, 0.02, 0.01, 0.0):
        rng = np.random.default_rng(400)
        needed = replicates_needed(Spread(5, effect, PAIR_SD), 0.05, 0.01)
        assert needed is not None
        hits = sum(settled(fixed(rng, (effect,), needed, rules)[0]) for _ in range(n))
        case = f"{100 * effect:g} points known, n = {needed}"
        yield row("settled at the promised n", case, hits, n, ">= 80 %")
    for effect in (0.03, 0.02, 0.01):
        rng = np.random.default_rng(410)
        hits = n_open = n_promised = 0
        promised = []
        for _ in range(n):
            baseline, (arm,) = draw(rng, (effect,), 5)
            pilot = estimate_effects(baseline, [arm], rules)[0]
            if settled(pilot):
                continue
            n_open += 1
            seen = spread(arm.values - baseline.values)
            needed = replicates_needed(seen, 0.05, 0.01)
            if needed is not None:
                n_promised += 1
                promised.append(max(needed, 6))
                hits += settled(fixed(rng, (effect,), promised[-1], rules)[0])
        low, middle, high = np.quantile(promised, [0.1, 0.5, 0.9])
        case = f"{100 * effect:g} points, open pilot of 5; n {low:.0f}/{middle:.0f}/{high:.0f}"
        yield row("settled at the promised n", case, hits, n_promised, "(a plan)")


def ablation_of(names: Sequence[str], truth: Callable[[set[str]], float], rng: object) -> Ablation:
    """Draw a full factorial of two-level factors with five replicates."""
    assert isinstance(rng, np.random.Generator)
    keys = ("weight_decay", "base_lr", "momentum")
    factors = [
        Factor(name, "off", (Level("on", {key: 1e-3}),))
        for name, key in zip(names, keys, strict=False)
    ]
    design = Factorial(factors)
    spec = {**design.to_record(), "looks": [5], "first_seed": 0, "steps": []}
    now = datetime(2026, 3, 1)
    shared = 0.8 + rng.normal(0, SEED_SD, 5)
    runs = []
    for cell in design.cells:
        values = shared + truth(set(cell.levels)) + rng.normal(0, RUN_SD, 5)
        arm = Arm(cell.label, "", "", values, (None,) * 5)
        nothing = np.full(5, math.nan)
        runs.append(Runs(arm, nothing, (None,) * 5, math.nan, cell.levels))
    study = Study(id=1, name="s", config={}, data={}, versions={})
    row_ = Design(
        id=1, study_id=1, key="k", kind="factorial", spec=spec, command="", updated_at=now
    )
    return Ablation(study, row_, tuple(runs), Rules())


def interactions(n: int) -> Iterator[Row]:
    """A full factorial of three factors, with an interaction and without."""
    names, few = ("a", "b", "c"), n // 4
    for case, size in (("4 points", 0.04), ("none", 0.0)):
        rng = np.random.default_rng(500)
        seen = {"t over replicates, Holm": 0, "analysis of variance": 0}
        family = 0
        for _ in range(few):
            found = ablation_of(names, lambda on, s=size: s * ({"a", "b"} <= on), rng)
            contrasts = estimate_contrasts(found)
            own = next(c for c in contrasts if c.name == "a × b")
            seen["t over replicates, Holm"] += own.p_family <= 0.05
            family += any(c.p_family <= 0.05 for c in contrasts)
            source = next(s for s in analyse_variance(found) if s.name == "a × b")
            seen["analysis of variance"] += source.p <= 0.05
        for how, hits in seen.items():
            aim = "found" if size else "<= 5 %"
            yield row(f"interaction found, planted: {case}", how, hits, few, aim)
        if not size:
            how = "t over replicates, Holm"
            yield row("any of 6 effects found, none planted", how, family, few, "<= 5 %")


def cost(n: int) -> list[str]:
    """Compare runs of adaptive and fixed studies: lines of text."""
    lines, few = [], n // 4
    cases = {
        "large (8 points, 3 levels)": (0.08, -0.08, 0.08),
        "mixed (8, 2 and 0 points)": (0.08, 0.02, 0.0),
        "none (3 levels)": (0.0, 0.0, 0.0),
    }
    rules, most = Rules(looks=LOOKS), LOOKS[-1]
    for case, truth in cases.items():
        rng = np.random.default_rng(600)
        studies = [adaptive(rng, truth, rules) for _ in range(few)]
        runs = np.array([runs for _, runs in studies])
        whole = most * (len(truth) + 1)
        error = runs.std(ddof=1) / math.sqrt(few)
        share = np.mean([settled(each) for found, _ in studies for each in found])
        other = [fixed(rng, truth, most, Rules()) for _ in range(few)]
        fixed_share = np.mean([settled(each) for found in other for each in found])
        lines.append(
            f"  {case:28} adaptive {runs.mean():5.1f} ± {error:.1f} runs, settled "
            f"{100 * share:5.1f} %; fixed {whole} runs, settled {100 * fixed_share:5.1f} % "
            f"(n = {few})"
        )
    return lines


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=2000)
    args = parser.parse_args()
    begin = time.perf_counter()
    # No verdict depends on it, and it is most of the time.
    with patch.object(module, "replicates_needed", lambda *args: None):
        for group in (
            false_positives, coverage, found_effects, equivalence, calibration, interactions,
        ):  # fmt: skip
            for what, how, share, n, aim in group(args.studies):
                error = math.sqrt(share * (1 - share) / n)
                print(
                    f"{what:36} {how:44} {100 * share:5.1f} ± {100 * error:.1f} %  "
                    f"n = {n:5}  {aim}",
                    flush=True,
                )
        print("runs of adaptive and fixed studies:")
        for line in cost(args.studies):
            print(line, flush=True)
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
