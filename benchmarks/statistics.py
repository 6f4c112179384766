"""Planted effects: what the ablation's statistics say of studies whose truth is known.

Every simulated study goes through the code that judges real ones (`reports.effects`): a baseline
and levels with paired replicates, a scatter that all levels of a seed share, and one of each run.

    python benchmarks/statistics.py --studies 2000
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.random import Generator

from reports.effects import Arm, Effect, Rules, estimate_effects, open_levels
from reports.paired import bca_interval, power, replicates_needed, spread, t_interval

# Of accuracies, as fractions: seeds move all levels alike, runs each by itself.
SEED_SD, RUN_SD = 0.02, 0.015
DIFFERENCE_SD = RUN_SD * math.sqrt(2)
N_LEVELS = 3
LOOKS = (5, 8, 12, 18, 20)


def simulate(effects: Sequence[float], n: int, rng: Generator) -> tuple[Arm, list[Arm]]:
    """Simulate a baseline and a level for each true effect, n paired replicates."""
    seeds = 0.8 + rng.normal(0, SEED_SD, n)
    arms = [
        Arm(f"level {k}", "planted", str(k), seeds + e + rng.normal(0, RUN_SD, n), (None,) * n)
        for k, e in enumerate((0.0, *effects))
    ]
    return arms[0], arms[1:]


def judge(effects: Sequence[float], n: int, rules: Rules, rng: Generator) -> list[Effect]:
    """Simulate a study and judge it."""
    baseline, arms = simulate(effects, n, rng)
    return estimate_effects(baseline, arms, rules, rng)


def judge_adaptively(
    effects: Sequence[float], rules: Rules, rng: Generator
) -> tuple[list[Effect], int]:
    """Simulate an adaptive study look by look, as `study.ablate` runs it; count its runs."""
    baseline, arms = simulate(effects, rules.looks[-1], rng)
    whole = [baseline, *arms]
    n_run = [0] * len(whole)
    active = set(range(len(whole)))
    for look, n in enumerate(rules.looks):
        for k in active:
            n_run[k] = n
        if look + 1 == len(rules.looks):
            break
        scores = [arm.values[: n_run[k]].tolist() for k, arm in enumerate(whole)]
        still = open_levels(scores, rules)
        if not still:
            break
        active = still | {0}
    seen = []
    for arm, n in zip(whole, n_run, strict=True):
        values = arm.values.copy()
        values[n:] = math.nan
        seen.append(replace(arm, values=values))
    return estimate_effects(seen[0], seen[1:], rules, rng), sum(n_run)


def told(hits: int, n: int) -> str:
    """Return a share with its Monte-Carlo standard error, in per cent."""
    rate = hits / n
    error = math.sqrt(max(rate * (1 - rate), 1 / n) / n)
    return f"{100 * rate:5.1f} % ± {100 * error:.1f}"


def is_told(effect: Effect) -> bool:
    """Say whether a level was judged different."""
    return effect.verdict in ("helps", "hurts")


def false_positives(n_studies: int, rng: Generator) -> None:
    """Print how often a study without effects tells one."""
    nothing = (0.0,) * N_LEVELS
    print(f"\nNo effect, {N_LEVELS} levels: studies that tell at least one (aim: at most 5 %)")
    for name, n, rules in (
        ("t-test, 5 replicates", 5, Rules()),
        ("t-test, 10 replicates", 10, Rules()),
        ("sign flip, 8 replicates", 8, Rules(test="sign-flip")),
    ):
        hits = sum(any(map(is_told, judge(nothing, n, rules, rng))) for _ in range(n_studies))
        print(f"  {name:28} {told(hits, n_studies)}")
    rules = Rules(looks=LOOKS)
    hits = sum(
        any(map(is_told, judge_adaptively(nothing, rules, rng)[0])) for _ in range(n_studies)
    )
    print(f"  {'adaptive, looks ' + str(LOOKS):28} {told(hits, n_studies)}")


def equivalence_errors(n_studies: int, rng: Generator) -> None:
    """Print how often a difference as large as the margin is called none."""
    margin = 0.02
    rules = Rules(margin=margin)
    print(
        "\nA true difference of exactly the margin, 1 level: called 'no difference' (at most 5 %)"
    )
    for n in (5, 10):
        verdicts = [judge((margin,), n, rules, rng)[0].verdict for _ in range(n_studies)]
        print(f"  {n:2} replicates {told(verdicts.count('no difference'), n_studies)}")


def coverage(n_studies: int, rng: Generator) -> None:
    """Print how often the intervals hold the true difference."""
    print("\nIntervals that hold the true difference (95 % promised)")
    for n in (3, 5, 10, 20):
        inside = {"t": 0, "BCa": 0}
        for _ in range(n_studies):
            differences = 0.01 + rng.normal(0, DIFFERENCE_SD, n)
            for name, found in (
                ("t", t_interval(spread(differences))),
                ("BCa", bca_interval(differences, rng)),
            ):
                inside[name] += found.low <= 0.01 <= found.high
        shares = "   ".join(f"{name} {told(hits, n_studies)}" for name, hits in inside.items())
        print(f"  {n:2} replicates   {shares}")


def observed_power(n_studies: int, rng: Generator) -> None:
    """Print how often a planted effect is told, beside what was predicted."""
    print(
        "\nOne planted effect of 3 points among 3 levels: told, and predicted at Holm's first step"
    )
    for n in (5, 8, 12):
        hits = sum(is_told(judge((0.03, 0, 0), n, Rules(), rng)[0]) for _ in range(n_studies))
        expected = power(0.03, DIFFERENCE_SD, n, 0.05 / N_LEVELS)
        print(f"  {n:2} replicates   {told(hits, n_studies)}   predicted {100 * expected:5.1f} %")


def promises(n_studies: int, rng: Generator) -> None:
    """Print how often the number of replicates that a pilot promises settles the question."""
    print(
        "\n'About n replicates would settle it', from a pilot of 5, true effect 3 points: "
        "settled at n"
    )
    hits = asked = 0
    needed = []
    for _ in range(n_studies):
        pilot = spread(0.03 + rng.normal(0, DIFFERENCE_SD, 5))
        n = replicates_needed(pilot, 0.05, 0.01)
        if n is None:
            continue
        asked += 1
        needed.append(n)
        hits += judge((0.03,), max(n, 2), Rules(), rng)[0].verdict != "undecided"
    low, middle, high = np.quantile(needed, [0.1, 0.5, 0.9])
    print(
        f"  {told(hits, asked)} (80 % promised; n: median {middle:.0f}, {low:.0f} to {high:.0f})"
    )


def adaptive_cost(n_studies: int, rng: Generator) -> None:
    """Print what an adaptive study costs and finds beside a fixed one."""
    print(f"\nAdaptive, looks {LOOKS}, against 20 replicates of everything")
    rules = Rules(looks=LOOKS)
    fixed = 20 * (N_LEVELS + 1)
    for name, effects in (
        ("three large effects (8 points)", (0.08, -0.08, 0.08)),
        ("one of 3 points, two of none", (0.03, 0, 0)),
    ):
        runs, hits, fixed_hits = 0, 0, 0
        for _ in range(n_studies):
            found, n = judge_adaptively(effects, rules, rng)
            runs += n
            hits += is_told(found[0])
            fixed_hits += is_told(judge(effects, 20, Rules(), rng)[0])
        mean = runs / n_studies
        print(
            f"  {name:32} {mean:5.1f} of {fixed} runs; first effect told "
            f"{told(hits, n_studies)}, fixed {told(fixed_hits, n_studies)}"
        )


def main() -> None:
    """Print every figure, each from its own simulated studies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=2000, help="simulated studies a figure")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    print(
        f"{args.studies} simulated studies a figure, ± Monte-Carlo standard error; scatter of a "
        f"run {100 * RUN_SD:g} points, of a seed {100 * SEED_SD:g}, so of a paired difference "
        f"{100 * DIFFERENCE_SD:.2f}"
    )
    for figure in (false_positives, equivalence_errors, coverage, observed_power, promises):
        figure(args.studies, rng)
    adaptive_cost(max(1, args.studies // 4), rng)


if __name__ == "__main__":
    main()
