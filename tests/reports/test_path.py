import math

import numpy as np
import pytest
from scipy import stats

from reports.ablation import Ablation
from reports.path import path_steps
from study.designs import Cell, extend_path
from tests.reports.ablations import design_of, follow, in_memory, two_levels

NAMES = ("augment", "freeze", "schedule", "mixup")
NAN = math.nan


class World:
    """True means, with the scatter of seeds and runs: the same for a cell however often asked."""

    def __init__(self, gains: dict[str, float], seed: int, n: int, sd: float = 0.01) -> None:
        self.gains = gains
        self.sd = sd
        rng = np.random.default_rng(seed)
        self.seeds = rng.normal(0, 0.02, n)
        self.noise: dict[frozenset[str], np.ndarray] = {}
        self.rng = rng
        self.n = n

    def mean(self, left: frozenset[str]) -> float:
        """Return the true accuracy where these factors are still as at the start."""
        return 0.6 + sum(gain for name, gain in self.gains.items() if name not in left)

    def values(self, cell: Cell) -> np.ndarray:
        left = frozenset(cell.levels)
        if left not in self.noise:
            self.noise[left] = self.rng.normal(0, self.sd, self.n)
        return self.mean(left) + self.seeds + self.noise[left]

    def score(self, cell: Cell, replicate: int) -> float:
        return float(self.values(cell)[replicate])


def walk(gains: dict[str, float], seed: int = 0, n: int = 5, sd: float = 0.01):
    """Run a path as `study.ablate` does; return it as read, and its world."""
    world = World(gains, seed, n, sd)
    design, steps = follow(design_of("path", two_levels(*gains)), world.score, n)
    scores = [world.values(cell) for cell in design.cells]
    return in_memory(design, scores, steps=steps), world


GAINS = dict(zip(NAMES, (0.02, 0.12, 0.0, 0.06), strict=True))


def test_the_largest_gain_comes_first_and_the_baseline_last() -> None:
    ablation, _ = walk(GAINS)
    steps = path_steps(ablation)
    assert [step.factor for step in steps] == ["", "freeze", "mixup", "augment", "schedule"]
    assert [step.n_candidates for step in steps] == [0, 4, 3, 2, 1]
    assert (steps[1].before, steps[1].after) == ("on", "off")
    assert set(steps[0].runs.levels) == set(NAMES)
    assert steps[-1].runs.levels == {}


def test_a_gain_is_the_paired_difference_corrected_for_the_choice() -> None:
    ablation, world = walk(GAINS, seed=1)
    steps = path_steps(ablation)
    before, after = steps[1].runs.arm.values, steps[2].runs.arm.values
    expected = stats.ttest_rel(after, before)
    ends = expected.confidence_interval(1 - 0.05 / 3)
    step = steps[2]
    assert step.gain is not None and step.total is not None
    assert step.gain.estimate == pytest.approx((after - before).mean(), abs=1e-9)
    assert (step.gain.low, step.gain.high) == pytest.approx((ends.low, ends.high), abs=1e-9)
    assert step.p == pytest.approx(min(1, 3 * expected.pvalue), abs=1e-9)
    whole = stats.ttest_rel(after, steps[0].runs.arm.values).confidence_interval(0.95)
    assert (step.total.low, step.total.high) == pytest.approx((whole.low, whole.high), abs=1e-9)


def test_totals_are_the_gains_added_up() -> None:
    steps = path_steps(walk(GAINS, seed=2)[0])
    gains = [step.gain.estimate for step in steps[1:] if step.gain is not None]
    totals = [step.total.estimate for step in steps[1:] if step.total is not None]
    assert totals == pytest.approx(list(np.cumsum(gains)))


@pytest.mark.parametrize(
    "gains", [dict.fromkeys(NAMES, 0.0), dict(zip(NAMES, (0.02, 0.02, 0.0, 0.01), strict=True))]
)
def test_the_chosen_steps_interval_holds_its_gain_as_often_as_it_says(
    gains: dict[str, float],
) -> None:
    n_studies = 400
    held = np.zeros(len(gains))
    false = 0
    for seed in range(n_studies):
        ablation, world = walk(gains, seed)
        steps = path_steps(ablation)
        for k, step in enumerate(steps[1:]):
            assert step.gain is not None
            true = gains[step.factor]
            held[k] += step.gain.low <= true <= step.gain.high
        false += any(step.p <= 0.05 and gains[step.factor] == 0 for step in steps[1:2])
    floor = 0.95 - 3 * math.sqrt(0.95 * 0.05 / n_studies)
    assert (held / n_studies > floor).all(), held / n_studies
    assert false / n_studies < 1 - floor


def test_choosing_among_many_without_paying_for_it_would_not_hold() -> None:
    # What the correction is for: eight candidates, and the first step's interval at 95 %.
    rng, n_studies = np.random.default_rng(0), 4000
    start = rng.normal(0, 0.01, (n_studies, 1, 5))
    differences = rng.normal(0, 0.01, (n_studies, 8, 5)) - start
    best = differences.mean(axis=2).argmax(axis=1)
    chosen = differences[np.arange(n_studies), best]
    p = stats.ttest_1samp(chosen, 0, axis=1).pvalue
    assert np.mean(p <= 0.05) > 0.07
    assert np.mean(8 * p <= 0.05) < 0.05


def unfinished(values: dict[frozenset[str], list[float]], steps: list[str]) -> Ablation:
    design = extend_path(design_of("path", two_levels("a", "b")), steps)
    scores = [values.get(frozenset(cell.levels), [NAN, NAN]) for cell in design.cells]
    return in_memory(design, scores, steps=steps)


def test_a_path_that_was_not_begun_has_its_start_only() -> None:
    steps = path_steps(unfinished({frozenset("ab"): [0.6, 0.7]}, []))
    assert [step.number for step in steps] == [0]
    assert steps[0].runs.arm.accuracy.estimate == pytest.approx(0.65)


def test_a_step_with_one_pair_left_is_told_without_test() -> None:
    values = {frozenset("ab"): [0.6, 0.7], frozenset("b"): [0.8, NAN]}
    (_, step) = path_steps(unfinished(values, ["a"]))
    assert step.gain is not None and step.gain.estimate == pytest.approx(0.2)
    assert math.isnan(step.gain.low) and math.isnan(step.p)


def test_a_step_without_any_pair_is_told_without_gain() -> None:
    values = {frozenset("ab"): [NAN, NAN], frozenset("b"): [0.8, 0.9]}
    (_, step) = path_steps(unfinished(values, ["a"]))
    assert step.gain is not None and math.isnan(step.gain.estimate) and math.isnan(step.p)


def test_gains_that_agree_to_the_picture_are_no_proof() -> None:
    ablation, _ = walk({"a": 0.0, "b": 0.0})
    cells = len(ablation.runs)
    steps = [ablation.spec["steps"][0]]
    design = extend_path(design_of("path", two_levels("a", "b")), steps)
    scores = np.tile([0.8, 0.9], (cells, 1))
    scores[1:] += 1 / 80
    (_, sure) = path_steps(in_memory(design, scores, steps=steps))
    (_, careful) = path_steps(in_memory(design, scores, steps=steps, resolution=1 / 80))
    assert sure.p == 0
    assert careful.p > 0.05
