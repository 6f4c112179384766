"""Run an ablation: every cell of a design once a replicate, in the same record as a search."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from core.config import TrainConfig
from study.ablation_plan import Plan, as_begun_config, cell_configs, n_runs
from study.baseline import given_factors
from study.config.load import check_backbones
from study.config.search_space import apply_params
from study.designs import BASELINE, Cell, candidates, extend_path
from study.execution.progress import Counts, Progress, StudyEnded, StudyStarted
from study.execution.session import Session, open_session
from study.execution.trial_engine import (
    VAL_SEED,
    TrialEngine,
    TrialRequest,
    identity,
    is_settled,
)
from study.record.models import Trial
from study.record.record import LEVELS, Record, config_hash

Scores = list[list[float | None]]
"""Validation accuracy by cell and replicate; None where a run failed."""
Decide = Callable[[Scores, Sequence[int]], set[int]]
"""Given the scores and the looks so far, the cells whose question is still open."""


@dataclass(frozen=True, slots=True)
class AblationOutcome:
    """How an ablation ended.

    Attributes:
        study_name: The ablation's study.
        stopped_because: `complete`, `timeout` or `interrupted`.
        counts: Trials of the study by state.
        n_done: Runs of this design that are done.
        n_planned: Runs of this design in all, as far as it is known.
        best_number: The best complete trial, if any.
        best_value: Its validation accuracy, in [0, 1].
        checkpoint: Always None: an ablation chooses nothing.
        duration_s: Wall time of this run.
    """

    study_name: str
    stopped_because: str
    counts: Counts
    n_done: int
    n_planned: int
    best_number: int | None
    best_value: float | None
    checkpoint: Path | None
    duration_s: float


def run_ablation(
    plan: Plan,
    *,
    progress: Progress,
    command: str,
    decide: Decide,
    take_over: bool = False,
) -> AblationOutcome:
    """Run or continue an ablation.

    Args:
        plan: What to run.
        progress: What the user sees.
        command: Command line, for the record.
        decide: Says which cells are still open; asked by adaptive ablations only.
        take_over: Begin although a process of another machine has not signed off.

    Raises:
        ConfigError: The ablation of this name has another baseline, or cannot be run.
        RecordError: The database is not ours, or the study is being run elsewhere.
        ValueError: Pictures, weights, backbone or device cannot be used.
    """
    begin = time.monotonic()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config = plan.baseline.config
    check_backbones(config)
    with Record.open(config.study.storage, create=True) as store:
        config = as_begun_config(store, plan)
        with open_session(
            store,
            config,
            cell_configs(plan),
            progress=progress,
            command=command,
            resume=f"python -m study ablate {config.study.name}",
            take_over=take_over,
        ) as session:
            ablation = _Ablation(session, plan, decide, command, begin)
            session.because = ablation.run()
            outcome = ablation.outcome(session.because)
            progress.emit(StudyEnded(outcome))
            return outcome


class _Ablation:
    """One process's part in an ablation."""

    def __init__(
        self, session: Session, plan: Plan, decide: Decide, command: str, begin: float
    ) -> None:
        self.session = session
        self.config = session.config
        self.plan = plan
        self.design = plan.design
        self.decide = decide
        self.command = command
        self.begin = begin
        self.chosen: list[str] = []
        self.rows: dict[str, Trial] = {}
        keeps_all = plan.baseline.settings.keep_checkpoints
        self.engine = TrialEngine(session, keep_best=None if keeps_all else 0)

    @property
    def settings(self) -> Any:
        """Return what the ablation was told."""
        return self.plan.baseline.settings

    def run(self) -> str:
        """Run what is missing; return why it ended."""
        self.session.images(self._val_seed(0))  # a source that cannot be split again shows here
        continued = self.engine.recover()
        for row in self.session.record.trials(self.session.study_id):
            if is_settled(row):
                self.rows.setdefault(row.config_hash, row)
        self._put_design()
        best = self._best()
        self.session.progress.emit(
            StudyStarted(
                self.config.study.name,
                self._n_planned(),
                self._own_counts(),
                best.value if best else None,
                best.ranked_by if best else None,
            )
        )
        for request in continued:
            self._run(request)
        for cell, replicate in self._missing():
            because = self._reason_to_stop()
            if because is not None:
                return because
            self._one(cell, replicate)
            if self._hash(cell, replicate) not in self.rows:  # stopped
                return "interrupted"
        self._put_design()
        return "complete"

    def _missing(self) -> Iterator[tuple[int, int]]:
        """Give the runs to do, in order; what comes later may depend on how earlier ones went."""
        if self.design.kind == "path":
            yield from self._path()
            return
        active = set(range(len(self.design.cells)))
        for k, n in enumerate(self.plan.looks):
            yield from self._undone(active, n)
            if k + 1 < len(self.plan.looks):
                active = self.decide(self._scores(n), self.plan.looks[: k + 1])
                if not active:
                    return
                active |= {0}

    def _path(self) -> Iterator[tuple[int, int]]:
        n = self.plan.looks[-1]
        yield from self._undone([0], n)
        while steps := candidates(self.design, self.chosen):
            yield from self._undone(steps.values(), n)
            scores = self._scores(n)
            means = {name: _mean(scores[cell]) for name, cell in steps.items()}
            self.chosen.append(max(means, key=lambda name: means[name]))
            self.design = extend_path(self.design, self.chosen)
            self._put_design()

    def _undone(self, cells: Any, n: int) -> Iterator[tuple[int, int]]:
        """Give the runs of cells that are missing, a whole replicate after the other."""
        for replicate in range(n):
            for cell in sorted(cells):
                if self._hash(cell, replicate) not in self.rows:
                    yield cell, replicate

    def _scores(self, n: int) -> Scores:
        """Return the accuracy of every cell's first replicates, as far as they are done."""
        found: Scores = []
        for cell in range(len(self.design.cells)):
            rows = [self.rows.get(self._hash(cell, r)) for r in range(n)]
            found.append([row.value if row.state == "complete" else None for row in rows if row])
        return found

    def _config(self, cell: int, replicate: int) -> TrainConfig:
        train = apply_params(self.config.train, self.design.cells[cell].overrides)
        return dataclasses.replace(train, seed=train.seed + replicate)

    def _hash(self, cell: int, replicate: int) -> str:
        return run_identity(self._config(cell, replicate), self._val_seed(replicate))

    def _val_seed(self, replicate: int) -> int | None:
        """Return the seed of a replicate's own validation split; None for the study's.

        The study's own split is not among them: a search has chosen the baseline on it.
        """
        if not self.settings.resplit:
            return None
        known = self.config.data.val_seed
        first = self.config.data.split_seed if known is None else known
        return first + 1 + replicate

    def _one(self, cell: int, replicate: int) -> None:
        config, shown = self._config(cell, replicate), self.design.cells[cell]
        val_seed = self._val_seed(replicate)
        levels = {
            factor.name: shown.levels.get(factor.name, factor.baseline)
            for factor in self.design.factors
        }
        attrs = {"cell": shown.label, "replicate": replicate, LEVELS: levels, VAL_SEED: val_seed}
        record, study_id = self.session.record, self.session.study_id
        trial = record.start_trial(study_id, {}, {}, attrs)
        factor, level = _place(shown)
        self._run(
            TrialRequest(
                number=trial.number,
                config=config,
                origin=f"{shown.label}, replicate {replicate + 1}",
                params=levels,
                val_seed=val_seed,
                factor=factor,
                level=level,
                replicate=replicate,
                identity=run_identity(config, val_seed),
            )
        )

    def _run(self, request: TrialRequest) -> None:
        if self.engine.run(request).state != "stopped":
            row = self.session.record.trial(self.session.study_id, request.number)
            self.rows[row.config_hash] = row

    def _put_design(self) -> None:
        """Bring the design in the record up to date."""
        baseline, n = self.plan.baseline, self.plan.looks[-1]
        spec = self.design.to_record() | {
            "origin": baseline.origin,
            "settings": dataclasses.asdict(baseline.settings) | {"factors": None},
            "given": given_factors(self.design.factors),
            "looks": list(self.plan.looks),
            "steps": list(self.chosen),
            "first_seed": self.config.train.seed,
            "runs": [
                [self._hash(cell, replicate) for replicate in range(n)]
                for cell in range(len(self.design.cells))
            ],
        }
        key = config_hash(
            {
                "kind": self.design.kind,
                "factors": spec["factors"],
                "coded": spec["coded"],
                "resplit": self.settings.resplit,
            }
        )
        self.session.record.put_design(
            self.session.study_id, key, self.design.kind, spec, self.command
        )

    def _reason_to_stop(self) -> str | None:
        timeout = self.config.study.timeout
        if self.session.stop.is_set():
            return "interrupted"
        if timeout is not None and time.monotonic() - self.begin > timeout:
            return "timeout"
        return None

    def _n_planned(self) -> int:
        return n_runs(self.plan)

    def _n_done(self) -> int:
        cells, n = range(len(self.design.cells)), self.plan.looks[-1]
        return sum(self._hash(cell, r) in self.rows for cell in cells for r in range(n))

    def _own_counts(self) -> Counts:
        """Count the runs of this design alone, for the progress towards its target."""
        n = self.plan.looks[-1]
        hashes = [self._hash(c, r) for c in range(len(self.design.cells)) for r in range(n)]
        states = [self.rows[text].state for text in dict.fromkeys(hashes) if text in self.rows]
        return Counts(complete=states.count("complete"), failed=states.count("failed"))

    def _best(self) -> Trial | None:
        done = [row for row in self.rows.values() if row.state == "complete"]
        return min(done, key=lambda row: row.rank, default=None)

    def outcome(self, because: str) -> AblationOutcome:
        """Sum up after this run."""
        best = self._best()
        return AblationOutcome(
            study_name=self.config.study.name,
            stopped_because=because,
            counts=Counts.of(self.session.record.trials(self.session.study_id)),
            n_done=self._n_done(),
            n_planned=self._n_planned(),
            best_number=best.number if best else None,
            best_value=best.value if best else None,
            checkpoint=None,
            duration_s=time.monotonic() - self.begin,
        )


def run_identity(config: TrainConfig, val_seed: int | None) -> str:
    """Return the hash by which two runs are the same: settings, seed, and split."""
    own = identity(config)
    return own if val_seed is None else config_hash({"run": own, "val_seed": val_seed})


def _place(cell: Cell) -> tuple[str | None, str | None]:
    """Return factor and level for the record's columns."""
    if not cell.levels:
        return BASELINE, None
    if len(cell.levels) == 1:
        return next(iter(cell.levels.items()))
    return ", ".join(cell.levels), ", ".join(cell.levels.values())


def _mean(scores: Sequence[float | None]) -> float:
    """Return the mean accuracy; a cell of which a run failed comes last."""
    done = [score for score in scores if score is not None]
    return -1.0 if len(done) < len(scores) or not done else sum(done) / len(done)
