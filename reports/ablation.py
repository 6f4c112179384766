"""All that a report says about one ablation, read from the record once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reports.effects import Arm, Effect, Rules, estimate_effects
from study.record.database import RecordError
from study.record.models import UNFINISHED, Design, Study, Trial, chosen_by
from study.record.record import Record

BASELINE = "baseline"
_CUT_SHORT = ("interrupted", "killed")


@dataclass(frozen=True, slots=True)
class Runs:
    """What the record has of one cell beside its accuracies.

    Attributes:
        arm: Validation accuracies.
        test: Test accuracies, (R,), fraction; NaN where a run was not tested.
        numbers: Trial by replicate, (R,); None where it was not run.
        seconds: Mean duration of a finished run; NaN without one.
        levels: Factor -> level, without those at the baseline's.
    """

    arm: Arm
    test: NDArray[np.float64]
    numbers: tuple[int | None, ...]
    seconds: float
    levels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Ablation:
    """One design of one ablation as the database knows it.

    Attributes:
        study: Its study.
        design: Its design.
        runs: By cell, in the design's order.
        rules: How effects are judged.
    """

    study: Study
    design: Design
    runs: tuple[Runs, ...]
    rules: Rules

    @property
    def spec(self) -> Mapping[str, Any]:
        """Return the design's factors, cells and rules."""
        return self.design.spec

    @property
    def kind(self) -> str:
        """Return the design's kind."""
        return self.design.kind

    @property
    def baseline(self) -> Runs | None:
        """Return the baseline's runs; None where it is not among the cells."""
        return next((runs for runs in self.runs if not runs.levels), None)

    @property
    def others(self) -> tuple[Runs, ...]:
        """Return the runs of all cells but the baseline's."""
        return tuple(runs for runs in self.runs if runs.levels)

    @property
    def replicates(self) -> int:
        """Return how many replicates were planned, or are done at most in an adaptive one."""
        return max((runs.arm.n_run for runs in self.runs), default=0)

    @property
    def n_planned(self) -> int:
        """Return the replicates that were planned for every cell (the most of an adaptive one)."""
        return int(self.spec["looks"][-1])

    @property
    def is_adaptive(self) -> bool:
        """Say whether replicates were added where a question was open."""
        return self.rules.is_adaptive

    @property
    def is_resplit(self) -> bool:
        """Say whether every replicate has a validation split of its own."""
        return bool(self.spec["settings"]["resplit"])

    @property
    def chosen_by(self) -> str:
        """Return what the best epoch of each run was chosen by."""
        return chosen_by(self.study.config.get("train", {}))

    @property
    def n_missing(self) -> int:
        """Count the runs that are planned and not done (none of an adaptive one's count)."""
        if self.is_adaptive:
            return sum(max(0, self.spec["looks"][0] - runs.arm.n_run) for runs in self.runs)
        return sum(self.n_planned - runs.arm.n_run for runs in self.runs)

    @property
    def n_tested(self) -> int:
        """Count the runs of which the test split was read."""
        return sum(int(np.isfinite(runs.test).sum()) for runs in self.runs)

    def effects(self) -> list[Effect]:
        """Estimate every cell's effect against the baseline on the validation split."""
        if self.baseline is None:
            return []
        arms = [runs.arm for runs in self.others]
        return estimate_effects(self.baseline.arm, arms, self.rules)

    def test_effects(self) -> list[Effect]:
        """Estimate the tested cells' effects on the test split; a family of their own."""
        base = self.baseline
        if base is None or not np.isfinite(base.test).any():
            return []
        n_test = int(self.study.data.get("n_test") or 0)
        rules = replace(self.rules, resolution=1 / n_test if n_test else 0.0, looks=())
        arms = [_tested(runs) for runs in self.others if np.isfinite(runs.test).any()]
        return estimate_effects(_tested(base), arms, rules)


def _tested(runs: Runs) -> Arm:
    arm = runs.arm
    return Arm(arm.label, arm.factor, arm.level, runs.test, tuple(None for _ in runs.test))


def read_ablations(store: Record, name: str) -> list[Ablation]:
    """Read every design of an ablation's study, the last one used first.

    Raises:
        RecordError: There is no such study, or it is no ablation.
    """
    study = store.study(name)
    designs = store.designs(study.id)
    if not designs:
        raise RecordError(
            f"study {name} is no ablation. Make one of it: python -m study ablate {name}"
        )
    trials = _by_identity(store.trials(study.id))
    tested = {
        row.trial_number: row.accuracy
        for row in store.tests(study.id)
        if row.trial_number is not None
    }
    return [_read(study, row, trials, tested) for row in reversed(designs)]


def _by_identity(rows: Sequence[Trial]) -> dict[str, Trial]:
    """Map settings and seed to the run that counts: a complete one, else the last that failed."""
    found: dict[str, Trial] = {}
    for row in rows:
        known = found.get(row.config_hash)
        if row.state not in UNFINISHED and (known is None or known.state != "complete"):
            found[row.config_hash] = row
    return found


def _read(
    study: Study,
    design: Design,
    trials: Mapping[str, Trial],
    tested: Mapping[int, float],
) -> Ablation:
    spec = design.spec
    settings = spec["settings"]
    n_val = int(study.data.get("n_val") or 0)
    looks = tuple(spec["looks"])
    rules = Rules(
        alpha=settings["alpha"],
        margin=settings["margin"] / 100,
        resolution=1 / n_val if n_val else 0.0,
        looks=looks if len(looks) > 1 else (),
    )
    runs = []
    for cell, hashes in zip(spec["cells"], spec["runs"], strict=True):
        rows = [trials.get(text) for text in hashes]
        runs.append(_runs_of(cell["levels"], rows, tested))
    return Ablation(study, design, tuple(runs), rules)


def _runs_of(
    levels: Mapping[str, str],
    rows: Sequence[Trial | None],
    test_scores: Mapping[int, float],
) -> Runs:
    done = [row for row in rows if row is not None and row.state == "complete"]
    values = [_value(row) for row in rows]
    tested = [test_scores.get(row.number, math.nan) if row else math.nan for row in rows]
    took = [row.duration_s for row in done if row.duration_s]
    factor, level = _named(levels)
    label = " + ".join(f"{name} = {setting}" for name, setting in levels.items()) or BASELINE
    reasons = tuple(_failure(row) for row in rows)
    return Runs(
        Arm(label, factor, level, np.array(values, dtype=np.float64), reasons),
        np.array(tested, dtype=np.float64),
        tuple(row.number if row else None for row in rows),
        float(np.mean(took)) if took else math.nan,
        dict(levels),
    )


def _named(levels: Mapping[str, str]) -> tuple[str, str]:
    if not levels:
        return BASELINE, ""
    if len(levels) == 1:
        return next(iter(levels.items()))
    return " + ".join(levels), " + ".join(levels.values())


def _value(row: Trial | None) -> float:
    is_done = row is not None and row.state == "complete" and row.value is not None
    return float(row.value) if is_done and row and row.value is not None else math.nan


def _failure(row: Trial | None) -> str | None:
    """Return why a run failed by itself; runs that were cut short from outside will come again."""
    if row is None or row.state != "failed" or row.reason in _CUT_SHORT:
        return None
    return row.reason or "failed"
