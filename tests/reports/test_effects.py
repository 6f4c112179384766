"""What a design's runs show: contrasts, verdicts, repeated analyses, failed and missing runs."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from reports.ablation import Ablation, Correct, Runs
from reports.effects import Effect, contrasts_of, fallen, foresee, judge, open_cells
from reports.statistics import crossed, holm, resampled
from study.ablation.designs import Cell, Design
from study.record.models import Design as RecordedDesign
from study.record.models import Study
from tests.reports.studies import DATA, Score, analysis, design_of, follow, right, spec_of

N = 400
ONE = design_of("ofat", a=["0", "1"])


def in_memory(
    design: Design,
    results: Sequence[Sequence[Score]],
    *analyses: dict[str, Any],
    test: Sequence[Sequence[Correct]] = (),
    is_solved: bool = False,
    **spec: Any,
) -> Ablation:
    """Make an ablation as it would be read; results by cell and replicate."""
    made = spec_of(design, *(analyses or [analysis(1, max(map(len, results)))]), **spec)
    row = RecordedDesign(id=1, study_id=1, key="k", kind=design.kind, spec=made, command="")
    study = Study(id=1, name="pets", config={}, data=DATA, versions={})
    runs = []
    for k, cell in enumerate(design.cells):
        val = tuple(c if isinstance(c, np.ndarray) else None for c in results[k])
        tested = (*(test[k] if test else ()), *[None] * len(val))[: len(val)]
        correct = {"val": val, "test": tested}
        means = {s: [math.nan if c is None else c.mean() for c in correct[s]] for s in correct}
        runs.append(
            Runs(
                label=cell.label, levels=cell.levels, correct=correct,
                accuracies={split: np.array(part) for split, part in means.items()},
                failures=tuple(c if isinstance(c, str) else None for c in results[k]),
                numbers=tuple(range(len(val))),
                seconds=math.nan, parameters=None, is_solved=is_solved,
            )
        )  # fmt: skip
    return Ablation(study, row, tuple(runs), len(made["analyses"]))


def scattered(means: Sequence[float], n: int = 5, seed: int = 0) -> list[list[Correct]]:
    """Draw runs of these true accuracies: seeds and images have a scatter of their own."""
    rng = np.random.default_rng(seed)
    easy, seeds = rng.normal(size=N), 0.1 * rng.normal(size=(n, 1))
    hits = [easy + seeds + 0.2 * rng.normal(size=(n, N)) for _ in means]
    cuts = (np.quantile(h, 1 - mean) for h, mean in zip(hits, means, strict=True))
    return [list((h > cut).astype(float)) for h, cut in zip(hits, cuts, strict=True)]


def difference(base: Sequence[Any], level: Sequence[Any]) -> Correct:
    """Return what a level's runs gain over the baseline's, (R, N)."""
    return np.array(level) - np.array(base)


def planted(*accuracies: float) -> list[Correct]:
    return [right(accuracy) for accuracy in accuracies]


STEADY = planted(*[0.8] * 5)
VARIED = scattered([0.8, 0.82])


def test_levels_are_compared_with_the_baseline_and_corrected_by_holm() -> None:
    results = scattered([0.8, 0.9, 0.82, 0.81])
    effects = judge(in_memory(design_of("ofat", a=["0", "1", "2"], b=["0", "1"]), results))
    labels = [effect.contrast.label for effect in effects]
    assert labels == ["a = 1", "a = 2", "b = 1"]
    found = [crossed(difference(results[0], own)) for own in results[1:]]
    assert [e.p for e in effects] == [f.p for f in found]
    # The first analysis spends half of alpha.
    assert [e.p_family for e in effects] == holm([min(1, 2 * f.p) for f in found])
    assert [e.difference for e in effects] == [f.interval() for f in found]
    means = np.array([[run.mean() for run in cell] for cell in results])
    assert effects[0].median == pytest.approx(np.median(means[1] - means[0]))
    assert effects[0].sd == pytest.approx(np.std(means[1] - means[0], ddof=1))


def test_a_factorial_has_main_effects_and_halves_of_interactions() -> None:
    design = design_of("factorial", a=["0", "1", "2"], b=["0", "1"])
    m = {"00": 0.5, "10": 0.6, "20": 0.7, "01": 0.54, "11": 0.7, "21": 0.74}
    cells = [cell.levels.get("a", "0") + cell.levels.get("b", "0") for cell in design.cells]
    results: list[list[Score]] = [[*planted(*[m[cell]] * 4)] for cell in cells]
    results[5][1] = "diverged: nan"  # its replicate is left out of every contrast
    effects = judge(in_memory(design, results))
    estimates = {effect.contrast.label: effect.difference.estimate for effect in effects}
    expected = {
        "a = 1": 0.65 - 0.52,
        "a = 2": 0.72 - 0.52,
        "b = 1": (0.54 + 0.7 + 0.74) / 3 - 0.6,
        "a × b = 1 × 1": (0.7 + 0.5 - 0.6 - 0.54) / 2,
        "a × b = 2 × 1": (0.74 + 0.5 - 0.7 - 0.54) / 2,
    }
    assert estimates == pytest.approx(expected) and len(effects) == design.n_tests
    assert [effect.n for effect in effects] == [4, 3, 3, 4, 3]


def test_all_but_two_factors_are_averaged() -> None:
    contrasts = contrasts_of(in_memory(design_of("factorial", "a", "b", "c"), [STEADY] * 8))
    sign = np.array([[-1] * 4 + [1] * 4, [-1, -1, 1, 1] * 2, [-1, 1] * 4])
    expected = [*sign, sign[0] * sign[1], sign[0] * sign[2], sign[1] * sign[2]]
    found = [[4 * contrast.weights[cell] for cell in range(8)] for contrast in contrasts]
    assert found == [list(each) for each in expected]


def test_a_path_has_the_largest_gain_first_corrected_for_all_candidates() -> None:
    gains = {"augment": 0.02, "freeze": 0.12, "mixup": 0.06}

    def walked(cell: Cell, replicate: int) -> float:
        return 0.6 + sum(gain for name, gain in gains.items() if name not in cell.levels)

    design = follow(design_of("path", *gains), walked, 5)
    results = scattered([walked(cell, 0) for cell in design.cells])
    effects = judge(in_memory(design, results))
    labels = ["freeze = on → off", "mixup = on → off", "augment = on → off"]
    assert [e.contrast.label for e in effects] == [*labels, "all steps = start → end"]
    cells = {frozenset(cell.levels): k for k, cell in enumerate(design.cells)}
    way = [cells[frozenset(left)] for left in (gains, ["augment", "mixup"], ["augment"], [])]
    pairs = [*zip(way, way[1:], strict=False), (way[0], way[-1])]
    for effect, (before, after) in zip(effects, pairs, strict=True):
        found = crossed(difference(results[before], results[after]))
        assert effect.difference == found.interval(1 - 0.05 / 6)  # 3 + 2 + 1 candidates
        assert effect.p_family == min(1, 6 * found.p / 0.5)


def test_folds_are_judged_by_the_resampled_t_test_and_the_test_split_by_crossed_seeds() -> None:
    results, tested = scattered([0.8, 0.84], 6), scattered([0.8, 0.86], 3, seed=1)
    test = analysis(2, 3, split="test")
    ablation = in_memory(ONE, results, analysis(1, 6), test, test=tested, n_folds=5)
    (effect,) = judge(ablation)
    assert effect.difference == resampled(list(difference(*results)), 5).interval()
    assert math.isnan(effect.p_seeds)
    (on_test,) = judge(ablation, "test")
    assert (on_test.n, on_test.p) == (3, crossed(difference(*tested)).p)
    assert on_test.p_family == min(1, 4 * on_test.p)  # the second analysis


@pytest.mark.parametrize(
    ("verdict", "results"),
    [
        ("improves", (STEADY, planted(*[0.85] * 5))),
        ("degrades", (STEADY, planted(*[0.75] * 5))),
        ("improves on these images", (STEADY, planted(*[0.81] * 5))),
        ("degrades on these images", (STEADY, planted(*[0.79] * 5))),
        ("equivalent", (STEADY, planted(0.8025, 0.7975, 0.8, 0.7975, 0.8025))),
        ("identical", (VARIED[0], VARIED[0])),
        ("inconclusive", (VARIED[0], VARIED[1])),
        ("fails", (STEADY, [*planted(*[0.85] * 4), "diverged: nan"])),
        ("fails", (STEADY, ["out of memory"] * 5)),
        ("unfinished", (STEADY, planted(*[0.85] * 4))),
        ("unfinished", (STEADY, [])),
    ],
)
def test_planted_effects_have_their_verdicts(verdict: str, results: Any) -> None:
    (effect,) = judge(in_memory(ONE, results, analysis(1, 5)))
    assert effect.verdict == verdict
    n = sum(isinstance(run, np.ndarray) for run in results[1])
    assert (effect.n, math.isnan(effect.difference.estimate)) == (n, n == 0)


def test_a_solved_head_needs_one_replicate_and_others_two() -> None:
    results = [planted(0.8), planted(0.9)]
    (solved,) = judge(in_memory(ONE, results, is_solved=True))
    assert (solved.n, solved.verdict) == (1, "improves")
    # Copies for all replicates are no seeds, unless they are of other folds.
    copies = in_memory(ONE, [planted(*[0.8] * 5), planted(*[0.81] * 5)], is_solved=True)
    assert math.isnan(judge(copies)[0].p_seeds)
    rows = scattered([0.8, 0.86], 3)
    looks = analysis(1, 5), analysis(2, 3, split="test")
    of_folds = in_memory(ONE, [STEADY] * 2, *looks, test=rows, is_solved=True, n_folds=5)
    assert judge(of_folds, "test")[0].p == crossed(difference(*rows)).p
    (effect,) = judge(in_memory(ONE, results))
    assert effect.difference.estimate == pytest.approx(0.1)
    assert np.isnan((effect.p, effect.p_family, effect.p_equivalence, effect.difference.low)).all()
    assert effect.verdict == "inconclusive"


def test_the_kth_analysis_spends_the_kth_half_and_holm_comes_after_the_minimum() -> None:
    design = design_of("ofat", a=["0", "1", "2"])
    results = scattered([0.8, 0.83, 0.84], 8)
    pairs = [difference(results[0], own) for own in results[1:]]
    # Another design had the second analysis, so that these are the first and the third.
    looks = {3: 1 / 2, 8: 1 / 8}
    effects = judge(in_memory(design, results, analysis(1, 3), analysis(3, 8)))
    smallest = [min(1, *(crossed(p[:n]).p / s for n, s in looks.items())) for p in pairs]
    assert [e.p_family for e in effects] == holm(smallest)
    # All later intervals hold together with the earlier ones.
    assert [e.difference for e in effects] == [crossed(p).interval(1 - 0.05 / 8) for p in pairs]
    # Replicates that nobody asked for before are shown by no verdict.
    (early,) = judge(in_memory(ONE, results[:2], analysis(1, 3)))
    assert (early.n, early.p) == (3, crossed(pairs[0][:3]).p)
    (late,) = judge(in_memory(ONE, results[:2], analysis(1, 3), analysis(2, 9)))
    assert (late.n, late.p_family) == (3, min(1, 2 * early.p))


def test_a_level_that_an_analysis_did_not_see_has_none_of_its_error() -> None:
    design = design_of("ofat", a=["0", "1", "2"])
    tested = scattered([0.8, 0.82, 0.9], 3)
    first = analysis(2, 3, split="test") | {"cells": [0, 1]}
    both = analysis(1, 5), first, analysis(3, 3, split="test") | {"cells": [0, 1, 2]}
    effects = judge(in_memory(design, [STEADY] * 3, *both, test=tested), "test")
    found = [crossed(difference(tested[0], own)).p for own in tested[1:]]
    assert [e.p_family for e in effects] == holm([min(1, 4 * found[0]), min(1, 8 * found[1])])
    assert [e.confidence for e in effects] == [1 - 0.05 / 8, 0.95]


def test_interim_analyses_share_the_error_of_theirs() -> None:
    results = scattered([0.8, 0.83], 10)
    rows = difference(*results)
    plan = analysis(2, 4, 6, 10)
    (effect,) = judge(in_memory(ONE, results, plan))
    shares = {4: 0.16 / 4, 6: (0.36 - 0.16) / 4, 10: (1 - 0.36) / 4}
    assert effect.p_family == pytest.approx(
        min(1, *(crossed(rows[:n]).p / share for n, share in shares.items()))
    )
    (effect,) = judge(in_memory(ONE, [results[0], results[1][:6]], plan))
    assert effect.n == 6
    assert effect.difference == crossed(rows[:6]).interval(1 - 0.05 * shares[6])


def test_equal_predictions_at_first_make_no_later_difference_equivalent() -> None:
    results = [STEADY, [*STEADY[:2], *planted(0.75, 0.7, 0.8)]]
    for analyses in ([analysis(1, 2, 5)], [analysis(1, 2), analysis(2, 5)]):
        (effect,) = judge(in_memory(ONE, results, *analyses))
        assert effect.difference.low < -0.05 and effect.verdict == "inconclusive"


def test_replicates_go_where_a_question_is_open() -> None:
    labels = ["0", "better", "same", "open", "failed", "unfinished"]
    design = design_of("ofat", a=labels)
    better, same = planted(*[0.9] * 5), [STEADY[0]] * 5
    unclear = planted(0.82, 0.80, 0.79, 0.84, 0.80)
    results = [STEADY, better, same, unclear, [*STEADY[:4], "diverged"], STEADY[:3]]
    found = open_cells(in_memory(design, results, analysis(1, 5, 8, 12)))
    assert found == {labels.index(name) for name in ("same", "open", "unfinished")}


def test_repeated_analyses_hold_alpha_together() -> None:
    n_studies, wrong = 300, 0
    design = design_of("ofat", a=["0", "1", "2"])
    for seed in range(n_studies):
        results = scattered([0.8] * 3, 6, seed)
        analyses = analysis(1, 3), analysis(2, 6)
        effects = judge(in_memory(design, results, *analyses, margin=50))
        wrong += any(e.verdict in ("improves", "degrades") for e in effects)
    assert wrong / n_studies < 0.05 + 3 * math.sqrt(0.05 * 0.95 / n_studies)


def test_a_failed_run_drops_its_pair_and_a_missing_one_what_follows() -> None:
    results: list[list[Score]] = [[*each] for each in scattered([0.8, 0.85], 6)]
    rows = difference(*results)

    def effect(cell: int, score: Score) -> Effect:
        own = [[*each] for each in results]
        own[cell][2] = score
        (found,) = judge(in_memory(ONE, own, analysis(1, 2), analysis(2, 6)))
        return found

    # Failures of the baseline are not the level's.
    for cell, verdict in ((0, "improves"), (1, "fails")):
        found = effect(cell, "diverged: nan")
        assert (found.n, found.verdict, found.n_failed) == (5, verdict, cell)
        assert found.p == crossed(np.delete(rows, 2, axis=0)).p
    found = effect(1, None)
    assert (found.n, found.p) == (2, crossed(rows[:2]).p)


def test_runs_that_fall_far_below_the_others_are_flagged() -> None:
    def lost(*accuracies: float) -> list[int]:
        return fallen(in_memory(ONE, [planted(*accuracies), STEADY]).runs[0])

    assert lost(0.8, 0.81, 0.5, 0.8) == [2]
    assert lost(0.8, 0.81, 0.76, 0.8) == []  # less than 5 points
    assert lost(0.5, 0.9, 0.7, 0.8, 0.6) == []  # as the others scatter
    assert lost(0.8, 0.5) == []
    runs = in_memory(ONE, [planted(0.8, 0.81, 0.5, 0.8), STEADY]).runs[0]
    rows = (row[:10] for row in runs.correct["val"] if row is not None)
    few = dataclasses.replace(runs, correct={"val": tuple(rows)})
    assert (fallen(runs, 5), fallen(few, 5)) == ([2], [])


def test_foresight_warns_of_what_cannot_decide() -> None:
    few = foresee(1, 3, 9999, 1, 0.05), foresee(5, 3, 100, 1, 0.05)
    assert all(text.startswith("warning: ") for text in few)
    assert "5 replicates on 2000 images in all find" in foresee(5, 3, 2000, 1, 0.05)
    assert not foresee(5, 3, 2000, 5, 0.05).startswith("warning: ")
    # A third analysis has a quarter of the first one's share.
    assert foresee(5, 4, 2000, 1, 0.05) != foresee(5, 4, 2000, 1, 0.05, order=3)
