"""The tables of an ablation, as grids of texts and as CSV of unrounded numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from reports.ablation import Ablation, Runs
from reports.effects import Effect, verdict_words
from reports.factorial import Contrast, Source
from reports.intervals import Interval
from reports.methods import correction_words, effects_note, footer
from reports.paired import spread, t_interval
from reports.path import Step
from reports.publish import (
    Grid,
    difference_words,
    number_words,
    p_words,
    plus_minus,
    seconds_words,
)
from reports.words import plural


def effects_grid(ablation: Ablation, effects: Sequence[Effect]) -> Grid:
    """Show every level against the baseline: rows by factor, the baseline's first."""
    base = ablation.baseline
    assert base is not None, "effects are against a baseline"
    header = (
        "Factor", "Level", "Accuracy, %", "Difference, points [95 %]", "p, Holm", "n", "Verdict",
    )  # fmt: skip
    rows = [_row_of("baseline", base, None, ablation)]
    groups = ["baseline"]
    own = {factor["name"]: str(factor["baseline"]) for factor in ablation.spec["factors"]}
    for runs, effect in zip(ablation.others, effects, strict=True):
        is_new = groups[-1] != runs.arm.factor
        name = f"{runs.arm.factor} ({own[runs.arm.factor]})" if is_new else ""
        rows.append(_row_of(name, runs, effect, ablation))
        groups.append(runs.arm.factor)
    n_tests = sum(effect.n >= 2 for effect in effects)
    note = effects_note(ablation, n_tests)
    return Grid(
        "effects",
        f"Ablation of {ablation.spec['origin']}",
        header,
        tuple(rows),
        tuple(groups),
        n_text=2,
        is_last_text=True,
        note=note,
    )


def _row_of(name: str, runs: Runs, effect: Effect | None, ablation: Ablation) -> tuple[str, ...]:
    arm = runs.arm
    failed = f" ({arm.n_failed} failed)" if arm.n_failed else ""
    cells = (name, arm.level, plus_minus(arm.accuracy))
    if effect is None:
        done = int(np.isfinite(arm.values).sum())
        return (*cells, "", "", f"{done}{failed}", f"baseline{failed}")
    return (
        *cells,
        difference_words(effect.difference),
        p_words(effect.p_family),
        f"{effect.n}{failed}",
        verdict_words(effect, ablation.rules),
    )


def test_grid(ablation: Ablation, effects: Sequence[Effect]) -> Grid | None:
    """Show the tested levels on the test split; None where it was not read."""
    base = ablation.baseline
    if base is None or not np.isfinite(base.test).any():
        return None
    header = ("Level", "Test accuracy, %", "Difference, points [95 %]", "p, Holm", "n", "Verdict")
    tested = base.test[np.isfinite(base.test)]
    own = plus_minus(t_interval(spread(tested)))
    rows = [("baseline", own, "", "", str(len(tested)), "baseline")]
    for effect in effects:
        rows.append(
            (
                effect.arm.label,
                plus_minus(effect.arm.accuracy),
                difference_words(effect.difference),
                p_words(effect.p_family),
                str(effect.n),
                verdict_words(effect, ablation.rules),
            )
        )
    n_tests = sum(effect.n >= 2 for effect in effects)
    n_left = len(ablation.others) - len(effects)
    left = f" {plural(n_left, 'level')} not tested, and not counted in the correction."
    note = footer(
        ablation,
        "The epoch of each run was chosen on the validation split. Mean ± half-width of the 95 % "
        f"t interval over seeds; p, Holm: {correction_words(ablation, n_tests)}."
        f"{left if n_left else ''}",
        split="test",
    )
    title = "The same runs on the test split"
    return Grid("test", title, header, tuple(rows), is_last_text=True, note=note)


def contrasts_grid(ablation: Ablation, contrasts: Sequence[Contrast]) -> Grid:
    """Show the effects of a factorial."""
    rows = tuple(
        (
            contrast.name,
            f"{contrast.low} → {contrast.high}" if contrast.high else "interaction",
            difference_words(contrast.effect),
            p_words(contrast.p),
            p_words(contrast.p_family),
            str(contrast.n),
        )
        for contrast in contrasts
    )
    how = (
        "Effect: mean accuracy at the second level minus that at the first, over all settings of "
        "the other factors (an interaction: half the difference of one factor's effect between "
        "the other's levels), with its 95 % t interval over replicates; t-test over replicates, "
        f"Holm's correction over {plural(len(rows), 'effect')}."
    )
    header = ("Factor", "From, to", "Effect, points [95 %]", "p", "p, Holm", "n")
    note = footer(ablation, how)
    return Grid("contrasts", "Effects", header, rows, n_text=2, note=note)


def anova_grid(ablation: Ablation, sources: Sequence[Source]) -> Grid:
    """Show an analysis of variance."""
    rows = tuple(
        (
            source.name,
            str(source.df),
            number_words(1e4 * source.sum_of_squares, 2),
            number_words(source.f, 2),
            p_words(source.p),
            number_words(source.partial_eta_squared, 3),
        )
        for source in sources
    )
    failed = sum(runs.arm.n_failed for runs in ablation.runs)
    left_out = f" {plural(failed, 'failed run')} left out." if failed else ""
    note = footer(
        ablation,
        "Type II sums of squares, in squared points; replicates (paired seeds) are blocks. It "
        "pools the scatter of all runs, which it takes to be alike and free of interactions with "
        "the seed; the effects' own t-tests over replicates do not. "
        f"p values are not corrected.{left_out}",
    )
    header = ("Source", "df", "Sum of squares", "F", "p", "partial η²")
    return Grid("anova", "Analysis of variance", header, rows, note=note)


def cells_grid(ablation: Ablation) -> Grid:
    """Show every setting of a design with its accuracy."""
    names = tuple(str(factor["name"]) for factor in ablation.spec["factors"])
    own = {factor["name"]: str(factor["baseline"]) for factor in ablation.spec["factors"]}
    rows = []
    for runs in ablation.runs:
        arm = runs.arm
        failed = f" ({arm.n_failed} failed)" if arm.n_failed else ""
        on_test = (_mean_words(runs.test),) if ablation.n_tested else ()
        rows.append(
            (
                *(runs.levels.get(name, own[name]) for name in names),
                plus_minus(arm.accuracy),
                *on_test,
                f"{int(np.isfinite(arm.values).sum())}{failed}",
                seconds_words(runs.seconds),
            )
        )
    note = footer(ablation, "Mean ± half-width of the 95 % t interval over seeds.")
    tested = ("Test accuracy, %",) if ablation.n_tested else ()
    header = (*names, "Accuracy, %", *tested, "n", "Cost, s")
    return Grid("cells", "Every setting", header, tuple(rows), n_text=len(names), note=note)


def _mean_words(values: NDArray[np.float64]) -> str:
    done = values[np.isfinite(values)]
    return plus_minus(t_interval(spread(done))) if len(done) else "–"


def path_grid(ablation: Ablation, steps: Sequence[Step]) -> Grid:
    """Show a path step by step."""
    rows = []
    for step in steps:
        change = f"{step.factor}: {step.before} → {step.after}" if step.number else "start"
        rows.append(
            (
                str(step.number),
                change,
                plus_minus(step.runs.arm.accuracy),
                difference_words(step.gain) if step.gain else "",
                p_words(step.p) if step.gain else "",
                difference_words(step.total) if step.total else "",
                str(step.n_candidates) if step.gain else "",
                str(step.runs.arm.n_run),
            )
        )
    note = footer(
        ablation,
        "At each step every remaining change was trained and the best mean kept (Fawcett & Hoos "
        "2016). Gain: paired difference to the step before, with an interval that holds over all "
        "candidates of the step together; p: paired t-test times the candidates (Bonferroni). "
        "Total: paired difference to the start, 95 % t interval.",
    )
    header = (
        "Step", "Change", "Accuracy, %", "Gain, points [95 %]", "p", "Total, points [95 %]",
        "Candidates", "n",
    )  # fmt: skip
    return Grid("path", "Path to the baseline", header, tuple(rows), n_text=2, note=note)


def failures_grid(ablation: Ablation) -> Grid | None:
    """Show the runs that failed, and why; None where none did."""
    first = int(ablation.spec["first_seed"])
    rows = tuple(
        (runs.arm.label, str(first + replicate), reason)
        for runs in ablation.runs
        for replicate, reason in enumerate(runs.arm.failures)
        if reason
    )
    if not rows:
        return None
    note = footer(ablation, "Runs that diverged or broke: a finding about their level.")
    return Grid(
        "failures", "Runs that failed", ("Level", "Seed", "Reason"), rows, n_text=3, note=note
    )


def contrasts_csv(contrasts: Sequence[Contrast]) -> str:
    """Write the effects of a factorial as CSV: unrounded, fractions in [0, 1]."""
    rows = [
        {
            "factor": c.name,
            "low": c.low,
            "high": c.high,
            **_interval_cells("effect", c.effect),
            "p": c.p,
            "p_family": c.p_family,
            "n": c.n,
        }
        for c in contrasts
    ]
    return pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")


def effects_csv(ablation: Ablation, effects: Sequence[Effect]) -> str:
    """Write effects as CSV: unrounded, fractions in [0, 1]; the baseline's row first.

    Everything but `cost_s` is the same however often the ablation was interrupted.
    """
    rows: list[dict[str, Any]] = []
    pairs: list[tuple[Runs, Effect | None]] = list(zip(ablation.others, effects, strict=True))
    if ablation.baseline is not None:
        pairs.insert(0, (ablation.baseline, None))
    for runs, effect in pairs:
        row: dict[str, Any] = {"factor": runs.arm.factor, "level": runs.arm.level}
        row |= _interval_cells("accuracy", runs.arm.accuracy)
        if effect is not None:
            row |= _interval_cells("difference", effect.difference)
            row |= {
                "sd": effect.sd,
                "d_z": effect.standardised,
                "p": effect.p,
                "p_family": effect.p_family,
                "p_equivalence": effect.p_equivalence,
                "n": effect.n,
                "verdict": effect.verdict,
                "n_needed": effect.n_needed,
            }
        rows.append(row | {"n_failed": runs.arm.n_failed, "cost_s": runs.seconds})
    return pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")


def _interval_cells(name: str, found: Interval) -> dict[str, float]:
    return {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}


def runs_csv(ablation: Ablation) -> str:
    """Write every run as CSV: cell, seed, accuracies, why it failed."""
    first = int(ablation.spec["first_seed"])
    names = [str(factor["name"]) for factor in ablation.spec["factors"]]
    own = {factor["name"]: str(factor["baseline"]) for factor in ablation.spec["factors"]}
    rows = []
    for runs in ablation.runs:
        for k, number in enumerate(runs.numbers):
            if number is None:
                continue
            levels = {name: runs.levels.get(name, own[name]) for name in names}
            rows.append(
                {
                    "cell": runs.arm.label,
                    "seed": first + k,
                    "val_acc": runs.arm.values[k],
                    "test_acc": runs.test[k],
                    "failure": runs.arm.failures[k],
                    "trial": number,
                    **levels,
                }
            )
    return pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")
