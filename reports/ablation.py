"""All that a report says about one ablation, read from the record once."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import stats

from reports.effects import Arm, Effect, Rules, estimate_effects
from reports.intervals import Interval
from study.read import read_predictions
from study.rows import chosen_by
from study.store import DesignRow, Store, StoreError, StudyRow, TestRow, TrialRow

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
        pictures: Mean validation accuracy's interval over pictures (the seeds held): what other
            photos of the same kind would give; None where single answers are not comparable.
        shares: Share of the seeds that get each validation picture right, (N,); None likewise.
        levels: Factor -> level, without those at the baseline's.
    """

    arm: Arm
    test: NDArray[np.float64]
    numbers: tuple[int | None, ...]
    seconds: float
    pictures: Interval | None
    shares: NDArray[np.float64] | None
    levels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Ablation:
    """One design of one ablation as the database knows it.

    Attributes:
        study: Its study.
        design: Its design.
        runs: By cell, in the design's order.
        rules: How effects are judged.
        tests: Looks at the study's test split, oldest first.
        device: What the runs ran on.
        answers: Trial -> true and chosen classes on the test split, (N,) each.
    """

    study: StudyRow
    design: DesignRow
    runs: tuple[Runs, ...]
    rules: Rules
    tests: tuple[TestRow, ...]
    device: str
    answers: Mapping[int, tuple[NDArray[np.int64], NDArray[np.int64]]]

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

    def rng(self) -> Generator:
        """Return random draws that are the same for the same study and design."""
        text = f"{self.study.name} {self.design.key}"
        return np.random.default_rng(int(hashlib.sha256(text.encode()).hexdigest()[:16], 16))

    def effects(self) -> list[Effect]:
        """Estimate every cell's effect against the baseline on the validation split."""
        if self.baseline is None:
            return []
        arms = [runs.arm for runs in self.others]
        return estimate_effects(self.baseline.arm, arms, self.rules, self.rng())

    def test_effects(self) -> list[Effect]:
        """Estimate the tested cells' effects on the test split; a family of their own."""
        base = self.baseline
        if base is None or not np.isfinite(base.test).any():
            return []
        n_test = int(self.study.data.get("n_test") or 0)
        rules = Rules(
            self.rules.alpha,
            self.rules.margin,
            self.rules.test,
            self.rules.confidence,
            1 / n_test if n_test else 0.0,
        )
        tested = [runs for runs in self.others if np.isfinite(runs.test).any()]
        arms = [_tested(runs) for runs in tested]
        return estimate_effects(_tested(base), arms, rules, self.rng())


def _tested(runs: Runs) -> Arm:
    arm = runs.arm
    return Arm(arm.label, arm.factor, arm.level, runs.test, tuple(None for _ in runs.test))


def read_ablations(store: Store, name: str) -> list[Ablation]:
    """Read every design of an ablation's study, the last one used first.

    Raises:
        StoreError: There is no such study, or it is no ablation.
    """
    study = store.study(name)
    designs = store.designs(study.id)
    if not designs:
        raise StoreError(
            f"study {name} is no ablation. Make one of it: python -m study ablate {name}"
        )
    trials = _by_identity(store.trials(study.id))
    tests = tuple(store.tests(study.id))
    val, test = read_predictions(store, name), read_predictions(store, name, "test")
    return [_read(study, row, trials, tests, val, test) for row in reversed(designs)]


def _by_identity(rows: Sequence[TrialRow]) -> dict[str, TrialRow]:
    """Map settings and seed to the run that counts: a complete one, else the last that failed."""
    found: dict[str, TrialRow] = {}
    for row in rows:
        known = found.get(row.config_hash)
        if row.state != "running" and (known is None or known.state != "complete"):
            found[row.config_hash] = row
    return found


def _read(
    study: StudyRow,
    design: DesignRow,
    trials: Mapping[str, TrialRow],
    tests: tuple[TestRow, ...],
    val: Mapping[int, tuple[NDArray[np.int64], NDArray[np.int64]]],
    answers: Mapping[int, tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> Ablation:
    spec = design.spec
    settings = spec["settings"]
    n_val = int(study.data.get("n_val") or 0)
    looks = tuple(spec["looks"])
    rules = Rules(
        alpha=settings["alpha"],
        margin=settings["margin"] / 100,
        test=settings["test"],
        resolution=1 / n_val if n_val else 0.0,
        looks=looks if len(looks) > 1 else (),
    )
    scores = {row.trial_number: row.accuracy for row in tests}
    runs = []
    for cell, hashes in zip(spec["cells"], spec["runs"], strict=True):
        rows = [trials.get(text) for text in hashes]
        compared = {} if settings["resplit"] else val
        runs.append(_runs_of(cell["levels"], rows, scores, compared))
    devices = sorted({row.device for row in trials.values()})
    return Ablation(study, design, tuple(runs), rules, tests, " and ".join(devices), answers)


def _runs_of(
    levels: Mapping[str, str],
    rows: Sequence[TrialRow | None],
    scores: Mapping[int, float],
    val: Mapping[int, tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> Runs:
    done = [row for row in rows if row is not None and row.state == "complete"]
    values = [_value(row) for row in rows]
    tested = [scores.get(row.number, math.nan) if row else math.nan for row in rows]
    took = [row.duration_s for row in done if row.duration_s]
    factor, level = _named(levels)
    label = " + ".join(f"{name} = {setting}" for name, setting in levels.items()) or BASELINE
    reasons = tuple(_failure(row) for row in rows)
    shares = _shares([np.equal(*val[row.number]) for row in done if row.number in val])
    return Runs(
        Arm(label, factor, level, np.array(values, dtype=np.float64), reasons),
        np.array(tested, dtype=np.float64),
        tuple(row.number if row else None for row in rows),
        float(np.mean(took)) if took else math.nan,
        None if shares is None else over_pictures(shares),
        shares,
        dict(levels),
    )


def _named(levels: Mapping[str, str]) -> tuple[str, str]:
    if not levels:
        return BASELINE, ""
    if len(levels) == 1:
        return next(iter(levels.items()))
    return " + ".join(levels), " + ".join(levels.values())


def _value(row: TrialRow | None) -> float:
    is_done = row is not None and row.state == "complete" and row.value is not None
    return float(row.value) if is_done and row and row.value is not None else math.nan


def _failure(row: TrialRow | None) -> str | None:
    """Return why a run failed by itself; runs that were cut short from outside will come again."""
    if row is None or row.state != "failed" or row.reason in _CUT_SHORT:
        return None
    return row.reason or "failed"


def _shares(correct: Sequence[NDArray[np.bool_]]) -> NDArray[np.float64] | None:
    """Return the share of the runs that get each picture right, (N,)."""
    if not correct or len({len(each) for each in correct}) > 1 or len(correct[0]) < 2:
        return None
    return np.asarray(np.mean(correct, axis=0), dtype=np.float64)


def over_pictures(shares: NDArray[np.float64]) -> Interval:
    """Return a mean's normal 95 % interval over pictures.

    Args:
        shares: One figure a picture, (N,): the share of the seeds that get it right, or the
            difference of two such shares.
    """
    half = float(stats.norm.ppf(0.975) * shares.std(ddof=1) / math.sqrt(len(shares)))
    mean = float(shares.mean())
    return Interval(mean, mean - half, mean + half)
