"""All that a report says about one ablation, read from the record once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from study.config.formatting import study_command
from study.record.database import RecordError
from study.record.frames import read_predictions
from study.record.models import UNFINISHED, Design, Study, Trial, chosen_by
from study.record.record import Record

BASELINE = "baseline"
_CUT_SHORT = ("interrupted", "killed")

Split = Literal["val", "test"]
Correct = NDArray[np.float64]
"""Whether each image was classified correctly, 0 or 1, shape (N,)."""


@dataclass(frozen=True, slots=True)
class Look:
    """An analysis of the first n replicates, which may spend this share of alpha.

    Attributes:
        cells: Those that it saw; None for all.
    """

    n: int
    share: float
    cells: frozenset[int] | None = None


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs of one cell.

    Attributes:
        levels: Factor -> level, without those at the baseline's.
        accuracies: By split and replicate, (R,), fractions in [0, 1]; NaN where there is none.
        failures: Why a replicate failed, (R,); None where it did not, or was not run yet.
        numbers: Trial by replicate, (R,); None where it was not run.
        correct: By split and replicate, (R,), what was classified correctly; None where it is not
            known.
        seconds: Median duration of a finished run; NaN without one.
        parameters: Parameters that are trained; None where no run says so.
        is_solved: Whether its replicates cannot differ: a solved head has no seed.
    """

    label: str
    levels: Mapping[str, str]
    accuracies: Mapping[Split, NDArray[np.float64]]
    failures: tuple[str | None, ...]
    numbers: tuple[int | None, ...]
    correct: Mapping[Split, tuple[Correct | None, ...]]
    seconds: float
    parameters: int | None
    is_solved: bool

    @property
    def n_failed(self) -> int:
        """Count the replicates that diverged or broke."""
        return sum(reason is not None for reason in self.failures)

    @property
    def done(self) -> NDArray[np.float64]:
        """Return the accuracies of the finished runs."""
        values = self.accuracies["val"]
        return values[np.isfinite(values)]

    @property
    def mean(self) -> float:
        """Return the mean accuracy of the finished runs; NaN without any."""
        return float(self.done.mean()) if len(self.done) else math.nan

    def n_run(self, split: Split = "val") -> int:
        """Count the replicates, from the first, of which nothing is missing on a split."""
        has_failed = np.array([reason is not None for reason in self.failures], bool)
        is_done = np.isfinite(self.accuracies[split]) | has_failed
        return int(np.argmin([*is_done, False]))


@dataclass(frozen=True, slots=True)
class Ablation:
    """One design of one ablation as the database knows it.

    Attributes:
        runs: By cell, in the design's order.
        n_analyses: Analyses of the whole ablation so far: all designs and the test split.
    """

    study: Study
    design: Design
    runs: tuple[Runs, ...]
    n_analyses: int

    @property
    def spec(self) -> Mapping[str, Any]:
        """Return the design's factors, cells and rules."""
        return self.design.spec

    @property
    def kind(self) -> str:
        """Return the design's kind."""
        return self.design.kind

    @property
    def alpha(self) -> float:
        """Return the family-wise error that all analyses of an ablation hold together."""
        return float(self.spec["settings"]["alpha"])

    @property
    def margin(self) -> float:
        """Return the difference that does not matter, as a fraction."""
        return float(self.spec["settings"]["margin"] / 100)

    @property
    def first_seed(self) -> int:
        """Return the seed of the first replicate."""
        return int(self.spec["first_seed"])

    @property
    def own_levels(self) -> dict[str, str]:
        """Return the baseline's level of each factor."""
        return {str(each["name"]): str(each["baseline"]) for each in self.spec["factors"]}

    @property
    def baseline(self) -> Runs | None:
        """Return the baseline's runs; None where it is not among the cells."""
        return next((runs for runs in self.runs if not runs.levels), None)

    @property
    def replicates(self) -> int:
        """Return how many replicates are done at most."""
        return max((runs.n_run() for runs in self.runs), default=0)

    @property
    def is_adaptive(self) -> bool:
        """Say whether replicates were added where a question was open."""
        return len(self.spec["looks"]) > 1

    @property
    def n_folds(self) -> int:
        """Return the folds of cross-validation; 1 where all runs share a validation split."""
        return int(self.spec["n_folds"])

    @property
    def n_tests(self) -> int:
        """Return over how many comparisons Holm's correction goes; 1 for a path."""
        return 1 if self.kind == "path" else int(self.spec["n_tests"])

    @property
    def n_images(self) -> int:
        """Count the images that the runs are judged by: of one split, or of the folds so far."""
        n = self.n_images_planned
        return n if self.n_folds == 1 else round(n * min(1.0, self.replicates / self.n_folds))

    @property
    def n_images_planned(self) -> int:
        """Count the images of the validation split, or of all folds."""
        data = self.study.data
        return int(data["n_val"]) + int(data["n_train"]) * (self.n_folds > 1)

    @property
    def chosen_by(self) -> str:
        """Return what the best epoch of each run was chosen by."""
        return chosen_by(self.study.config.get("train", {}))

    @property
    def n_missing(self) -> int:
        """Count the runs that are planned and not done (of an adaptive one, of the first look)."""
        n = self.spec["looks"][0]
        return sum(max(0, n - runs.n_run()) for runs in self.runs)

    @property
    def n_tested(self) -> int:
        """Count the runs of which the test split was read."""
        return sum(int(np.isfinite(runs.accuracies["test"]).sum()) for runs in self.runs)

    def looks(self, split: Split) -> list[Look]:
        """List the analyses of a split that were recorded before their runs, in order.

        The k-th analysis of an ablation, over all designs and the test split, has the error
        alpha / 2^k. Its planned interim analyses spend by (n / last n)^2 of that, less what is
        spent: later ones see more.

        References:
            Kim & DeMets 1987, https://doi.org/10.1093/biomet/74.1.149 (power family).
        """
        looks: list[Look] = []
        for analysis in self.spec["analyses"]:
            if analysis["split"] == split:
                replicates = analysis["replicates"]
                steps = np.diff([0.0, *((n / replicates[-1]) ** 2 for n in replicates)])
                shares = (steps / 2 ** analysis["order"]).tolist()
                seen = frozenset(analysis["cells"]) if "cells" in analysis else None
                looks += [Look(*each, seen) for each in zip(replicates, shares, strict=True)]
        return looks

    def position(self, levels: Mapping[str, str]) -> int:
        """Find the cell with these levels."""
        return next(k for k, runs in enumerate(self.runs) if runs.levels == levels)

    def path_cells(self) -> list[int]:
        """Return the cells that a path went through as far as it was run, the start first."""
        levels = {f["name"]: str(f["levels"][0]["label"]) for f in self.spec["factors"]}
        cells = [self.position(levels)]
        for name in self.spec["steps"]:
            levels.pop(name)
            cells.append(self.position(levels))
        return cells


def read_ablations(store: Record, name: str) -> list[Ablation]:
    """Read every design of an ablation's study, the last one used first.

    Raises:
        RecordError: There is no such study, or it is no ablation.
    """
    study = store.study(name)
    designs = store.designs(study.id)
    if not designs:
        raise RecordError(
            f"study {name} is no ablation. Make one of it: "
            + study_command("ablate", name, store.storage)
        )
    rows = store.trials(study.id)
    trials = _by_identity(rows)
    accuracies: dict[Split, dict[int | None, float | None]] = {
        "val": {row.number: row.value for row in rows},
        "test": {row.trial_number: row.accuracy for row in store.tests(study.id)},
    }
    correct: dict[Split, dict[int, Correct]] = {
        split: {
            number: (labels == predicted).astype(np.float64)
            for number, (labels, predicted) in read_predictions(store, name, split).items()
        }
        for split in ("val", "test")
    }
    n_analyses = sum(len(design.spec["analyses"]) for design in designs)
    found = []
    for design in reversed(designs):
        cells = zip(*(design.spec[key] for key in ("cells", "runs", "solved")), strict=True)
        runs = tuple(
            _runs_of(cell["levels"], list(map(trials.get, hashes)), accuracies, correct, solved)
            for cell, hashes, solved in cells
        )
        found.append(Ablation(study, design, runs, n_analyses))
    return found


def _by_identity(rows: Sequence[Trial]) -> dict[str, Trial]:
    """Map settings and seed to the run that counts: a complete one, else the last that failed."""
    found: dict[str, Trial] = {}
    for row in rows:
        known = found.get(row.config_hash)
        if row.state not in UNFINISHED and (known is None or known.state != "complete"):
            found[row.config_hash] = row
    return found


def _runs_of(
    levels: Mapping[str, str],
    rows: Sequence[Trial | None],
    accuracies: Mapping[Split, Mapping[int | None, float | None]],
    correct: Mapping[Split, Mapping[int, Correct]],
    is_solved: bool,
) -> Runs:
    complete = [row if row is not None and row.state == "complete" else None for row in rows]
    done = [row for row in complete if row]
    took = [row.duration_s for row in done if row.duration_s]
    return Runs(
        label=", ".join(f"{name} = {setting}" for name, setting in levels.items()) or BASELINE,
        levels=levels,
        accuracies={
            split: np.array([known.get(row.number) if row else None for row in complete], float)
            for split, known in accuracies.items()
        },
        failures=tuple(map(_failure, rows)),
        numbers=tuple(row.number if row else None for row in rows),
        correct={
            split: tuple(known.get(row.number) if row else None for row in complete)
            for split, known in correct.items()
        },
        seconds=float(np.median(took)) if took else math.nan,
        parameters=done[0].trained_parameters if done else None,
        is_solved=is_solved,
    )


def _failure(row: Trial | None) -> str | None:
    """Return why a run failed by itself; runs that were cut short from outside will come again."""
    if row is None or row.state != "failed" or row.reason in _CUT_SHORT:
        return None
    return row.reason or "failed"
