"""An ablation path: which change helped at which step, each with its own interval."""

import math
from dataclasses import dataclass

import numpy as np

from reports.ablation import Ablation, Runs
from reports.intervals import Interval
from reports.paired import paired_t, spread, t_interval


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a path.

    Attributes:
        number: 0 for the start.
        factor: What was changed; empty for the start.
        before: Its setting before.
        after: Its setting after: the baseline's.
        runs: The runs of the cell that the step led to.
        gain: Paired difference to the step before, a fraction; the interval holds over all
            candidates of the step together (Bonferroni), so choosing the best one is paid for.
            None for the start.
        total: Paired difference to the start; None for the start.
        p: Paired t-test of the gain, times the candidates; NaN for the start.
        n_candidates: Changes that were trained at this step.
    """

    number: int
    factor: str
    before: str
    after: str
    runs: Runs
    gain: Interval | None
    total: Interval | None
    p: float
    n_candidates: int


def path_steps(ablation: Ablation) -> list[Step]:
    """Follow a path from its start, as far as it was run."""
    factors = {factor["name"]: factor for factor in ablation.spec["factors"]}
    by_levels = {frozenset(runs.levels.items()): runs for runs in ablation.runs}
    levels = {name: str(f["levels"][0]["label"]) for name, f in factors.items()}
    start = by_levels[frozenset(levels.items())]
    steps = [Step(0, "", "", "", start, None, None, math.nan, 0)]
    for number, name in enumerate(ablation.spec["steps"], start=1):
        n_candidates = len(levels)
        before = levels.pop(name)
        runs = by_levels[frozenset(levels.items())]
        confidence = 1 - 0.05 / n_candidates
        gain, p = _compared(runs, steps[-1].runs, confidence, ablation.rules.resolution)
        total, _ = _compared(runs, start, 0.95, ablation.rules.resolution)
        after = str(factors[name]["baseline"])
        steps.append(
            Step(
                number,
                name,
                before,
                after,
                runs,
                gain,
                total,
                min(p * n_candidates, 1.0),  # in this order, a missing p stays NaN
                n_candidates,
            )  # fmt: skip
        )
    return steps


def _compared(
    runs: Runs, other: Runs, confidence: float, resolution: float
) -> tuple[Interval, float]:
    differences = runs.arm.values - other.arm.values
    differences = differences[np.isfinite(differences)]
    if not len(differences):
        return Interval(math.nan, math.nan, math.nan), math.nan
    seen = spread(differences, resolution)
    return t_interval(seen, confidence), paired_t(seen)
