"""Factorials: agreement, planted effects, boundaries."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests

from reports.ablation import Ablation
from reports.factorial import (
    analyse_variance,
    estimate_contrasts,
    interaction_means,
    main_effect_means,
)
from study.ablation.designs import Design
from tests.reports.studies import design_of, in_memory

NAN = math.nan
NAMES = ("augment", "freeze", "schedule")
TWO = design_of("factorial", *NAMES[:2])


def scores_of(
    design: Design, rng: np.random.Generator, truth: dict[str, float], n: int = 5
) -> np.ndarray:
    """Draw accuracies: a factor's effect where its level is not the baseline's; `a × b` for both.

    An effect is the difference between levels at the baseline of all others.
    """
    seeds = rng.normal(0, 0.02, n)
    means = [
        0.7 + sum(e for name, e in truth.items() if set(name.split(" × ")) <= set(cell.levels))
        for cell in design.cells
    ]
    return np.array(means)[:, None] + seeds + rng.normal(0, 0.01, (len(means), n))


def factorial(n_factors: int, truth: dict[str, float], seed: int = 0, n: int = 5) -> Ablation:
    design = design_of("factorial", *NAMES[:n_factors])
    return in_memory(design, scores_of(design, np.random.default_rng(seed), truth, n))


# Agreement


def test_variance_is_that_of_statsmodels_fitted_directly() -> None:
    design = design_of("factorial", "b", "c", a=["0", "1", "2"])
    scores = scores_of(design, np.random.default_rng(0), {"a": 0.05, "a × b": 0.03}, 4)
    scores[3, 1] = scores[7, 0] = NAN  # failed runs: the design is not balanced any more
    ablation = in_memory(design, scores)
    assert estimate_contrasts(ablation) == []  # a factor has three levels
    found = {s.name: s for s in analyse_variance(ablation)}
    data = pd.DataFrame(
        {name: runs.levels.get(name, "own") for name in "abc"} | {"replicate": f"s{r}", "y": value}
        for runs in ablation.runs
        for r, value in enumerate(runs.arm.values)
    ).dropna()
    expected = anova_lm(ols("y ~ (b + c + a) ** 2 + replicate", data).fit(), typ=2)
    expected.index = expected.index.str.replace(":", " × ").str.lower()
    assert set(found) == set(expected.index)
    for name, source in found.items():
        row = expected.loc[name]
        assert source.df == row["df"]
        assert source.sum_of_squares == pytest.approx(row["sum_sq"], abs=1e-9)
        if name != "residual":
            assert (source.f, source.p) == pytest.approx((row["F"], row["PR(>F)"]), abs=1e-9)


@pytest.mark.parametrize("n_factors", [2, 3])
def test_contrasts_are_differences_of_means_with_a_t_test_over_replicates(n_factors: int) -> None:
    ablation = factorial(n_factors, {"augment": 0.03})
    scores = np.array([runs.arm.values for runs in ablation.runs])
    coded = 2 * np.array(ablation.spec["coded"]) - 1
    found = {c.name: c for c in estimate_contrasts(ablation)}
    pairs = list(itertools.combinations(range(n_factors), 2))
    signs = {NAMES[k]: coded[:, k] for k in range(n_factors)}
    signs |= {f"{NAMES[a]} × {NAMES[b]}": coded[:, a] * coded[:, b] for a, b in pairs}
    assert set(found) == set(signs)
    raw = []
    for name, sign in signs.items():
        each = scores[sign > 0].mean(axis=0) - scores[sign < 0].mean(axis=0)
        expected = stats.ttest_1samp(each, 0)
        ends = expected.confidence_interval(0.95)
        own = found[name]
        assert own.effect.estimate == pytest.approx(each.mean(), abs=1e-9)
        assert (own.effect.low, own.effect.high) == pytest.approx((ends.low, ends.high))
        assert own.p == pytest.approx(expected.pvalue, abs=1e-9)
        raw.append(expected.pvalue)
    corrected = multipletests(raw, method="holm")[1]
    assert [found[name].p_family for name in signs] == pytest.approx(list(corrected), abs=1e-9)


# Planted effects


def test_a_planted_interaction_is_found_by_both_analyses_and_nothing_else() -> None:
    truth = {"augment": 0.04, "augment × freeze": 0.06}
    clear, ps, null_ps = [], [], []
    for seed in range(30):
        ablation = factorial(3, truth, seed, n=4)
        contrast = {c.name: c for c in estimate_contrasts(ablation)}["augment × freeze"]
        sources = {s.name: s.p for s in analyse_variance(ablation)}
        clear.append(contrast.p_family <= 0.05)
        ps.append(sources["augment × freeze"])
        null_ps += [sources[f"{name}schedule"] for name in ("", "augment × ", "freeze × ")]
        # Half of the difference that one factor makes to the other's effect, and half of it in
        # each main effect.
        assert contrast.effect.estimate == pytest.approx(0.03, abs=0.02)
    assert max(ps) <= 0.05 and sum(clear) >= 27
    assert np.mean(np.array(null_ps) <= 0.05) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(null_ps))


# Boundaries


def test_a_replicate_with_a_failed_cell_is_left_out_of_the_contrasts() -> None:
    scores = scores_of(TWO, np.random.default_rng(0), {"augment": 0.03})
    broken = scores.copy()
    broken[2, 1] = NAN
    found = estimate_contrasts(in_memory(TWO, broken))
    assert found == estimate_contrasts(in_memory(TWO, np.delete(scores, 1, axis=1)))
    assert {c.n for c in found} == {4}


def test_one_replicate_of_a_small_factorial_has_no_error_to_test_with() -> None:
    ablation = in_memory(TWO, [[0.7], [0.8], [0.75], [0.9]])
    assert analyse_variance(ablation) == []
    assert all(math.isnan(c.p) and math.isnan(c.p_family) for c in estimate_contrasts(ablation))


@pytest.mark.parametrize("step", [0.0, 1 / 80])
def test_settings_without_any_scatter_have_no_analysis_of_variance(step: float) -> None:
    # Every network is right everywhere, or the seeds alone differ: what is left is rounding.
    ablation = in_memory(TWO, np.full((4, 3), 0.9) + step * np.arange(3))
    assert analyse_variance(ablation) == []
    assert [contrast.p for contrast in estimate_contrasts(ablation)] == [1, 1, 1]


def test_means_by_level_and_by_two_levels() -> None:
    design = design_of("factorial", a=["0", "1", "2"], b=["0", "1"])
    levels = [{"a": "0", "b": "0"} | cell.levels for cell in design.cells]
    means = [0.5 + 0.1 * int(cell["a"]) + 0.01 * int(cell["b"]) for cell in levels]
    scores = np.add.outer(means, [0, 0.02])
    scores[-1, 1] = NAN  # a = 2, b = 1
    ablation = in_memory(design, scores)
    table = interaction_means(ablation, "a", "b")
    assert (list(table.index), list(table.columns)) == (["0", "1", "2"], ["0", "1"])
    expected = [[0.51, 0.52], [0.61, 0.62], [0.71, 0.71]]
    assert table.to_numpy() == pytest.approx(np.array(expected), abs=1e-12)
    found = dict(main_effect_means(ablation, "a"))
    assert [m.estimate for m in found.values()] == pytest.approx([0.515, 0.615, 0.705])
    assert found["0"].low < 0.505 and math.isnan(found["2"].low)
