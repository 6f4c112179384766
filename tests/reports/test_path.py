"""Paths: order of the steps, gains, and the correction for choosing among candidates."""

import math

import numpy as np
import pytest
from scipy import stats

from reports.ablation import Ablation
from reports.path import path_steps
from study.ablation.designs import Cell
from tests.reports.studies import design_of, follow, in_memory

NAMES = ("augment", "freeze", "schedule", "mixup")
GAINS = dict(zip(NAMES, (0.02, 0.12, 0.0, 0.06), strict=True))
NAN = math.nan


def walk(gains: dict[str, float], seed: int = 0) -> Ablation:
    """Run a path as an ablation does; return it as read."""
    rng, n = np.random.default_rng(seed), 5
    seeds = rng.normal(0, 0.02, n)
    drawn: dict[frozenset[str], np.ndarray] = {}

    def values(cell: Cell) -> np.ndarray:
        left = frozenset(cell.levels)  # the factors that are still as at the start
        if left not in drawn:
            mean = 0.6 + sum(gain for name, gain in gains.items() if name not in left)
            drawn[left] = mean + seeds + rng.normal(0, 0.01, n)
        return drawn[left]

    design = follow(design_of("path", *gains), lambda cell, r: float(values(cell)[r]), n)
    return in_memory(design, [values(cell) for cell in design.cells])


def test_the_largest_gain_comes_first_and_is_corrected_for_the_choice() -> None:
    steps = path_steps(walk(GAINS, seed=1))
    assert [step.factor for step in steps] == ["", "freeze", "mixup", "augment", "schedule"]
    assert [step.n_candidates for step in steps] == [0, 4, 3, 2, 1]
    assert set(steps[0].runs.levels) == set(NAMES) and steps[-1].runs.levels == {}
    before, after = steps[1].runs.arm.values, steps[2].runs.arm.values
    expected = stats.ttest_rel(after, before)
    ends = expected.confidence_interval(1 - 0.05 / 3)
    step = steps[2]
    assert step.gain is not None and step.total is not None
    assert (step.gain.low, step.gain.high) == pytest.approx((ends.low, ends.high), abs=1e-9)
    assert step.p == pytest.approx(min(1, 3 * expected.pvalue), abs=1e-9)
    whole = stats.ttest_rel(after, steps[0].runs.arm.values).confidence_interval(0.95)
    assert (step.total.low, step.total.high) == pytest.approx((whole.low, whole.high), abs=1e-9)


@pytest.mark.parametrize(
    "gains", [dict.fromkeys(NAMES, 0.0), dict(zip(NAMES, (0.02, 0.02, 0.0, 0.01), strict=True))]
)
def test_the_chosen_steps_interval_covers_its_gain_as_often_as_it_says(
    gains: dict[str, float],
) -> None:
    n_studies, false = 400, 0
    held = np.zeros(len(gains))
    for seed in range(n_studies):
        steps = path_steps(walk(gains, seed))
        for k, step in enumerate(steps[1:]):
            assert step.gain is not None
            held[k] += step.gain.low <= gains[step.factor] <= step.gain.high
        false += steps[1].p <= 0.05 and gains[steps[1].factor] == 0
    floor = 0.95 - 3 * math.sqrt(0.95 * 0.05 / n_studies)
    assert (held / n_studies > floor).all()
    assert false / n_studies < 1 - floor


@pytest.mark.parametrize(
    ("start", "after", "gain"), [([0.6, 0.7], [0.8, NAN], 0.2), ([NAN, NAN], [0.8, 0.9], NAN)]
)
def test_a_step_with_fewer_than_two_pairs_has_no_test(
    start: list[float], after: list[float], gain: float
) -> None:
    values = {"a = on, b = on": start, "b = on": after}
    design = follow(design_of("path", "a", "b"), lambda cell, r: 0.1 * (cell.label == "b = on"), 2)
    steps = path_steps(in_memory(design, [values.get(c.label, [NAN, NAN]) for c in design.cells]))
    step = steps[1]
    assert step.factor == "a" and step.gain is not None
    assert step.gain.estimate == pytest.approx(gain, nan_ok=True)
    assert math.isnan(step.gain.low) and math.isnan(step.p)
