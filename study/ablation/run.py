"""Run an ablation: every cell of a design once per replicate, in the same record as a search."""

import dataclasses
import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path

import optuna

from core.config import TrainConfig
from core.data.splits import ImageData, load_data
from study.ablation.baseline import Baseline, factors_of
from study.ablation.designs import BASELINE, DESIGNS, Cell, Decide, Design
from study.config.errors import ConfigError
from study.config.load import check_backbones
from study.config.search_space import apply_params
from study.config.study_config import StudyConfig, config_diff
from study.progress import BestTrial, Counts, Progress
from study.record.models import Trial
from study.record.record import LEVELS, Record, config_hash
from study.roster import Roster
from study.runner import (
    REASON_DIVERGED,
    REASON_OUT_OF_MEMORY,
    RERUN_REASONS,
    Asked,
    Work,
    drop_checkpoint,
    identity,
    record_answers,
    run_trial,
)
from study.session import close_killed, corner_configs, open_session, picture_size

# Each interim analysis comes after half as many replicates again: few, so that little of the
# allowed error is spent on each.
_LOOK_GROWTH = 1.5


@dataclass(frozen=True, slots=True)
class Plan:
    """What an ablation is to do, settled before its first run.

    Attributes:
        baseline: What is compared against.
        design: Its cells; those of a path grow while it runs.
        looks: Replicates at each interim analysis, the last one's at the end; one alone unless
            the ablation is adaptive.
    """

    baseline: Baseline
    design: Design
    looks: tuple[int, ...]

    @property
    def n_runs(self) -> int:
        """Count the runs: all that an adaptive ablation may need, all steps of a path."""
        return self.design.n_runs(self.looks[-1])

    @property
    def n_tests(self) -> int:
        """Count the effects that are tested."""
        return self.design.n_tests(self.looks[-1])

    def configs(self) -> list[TrainConfig]:
        """Return what each cell trains, with the first replicate's seed.

        Raises:
            ConfigError: A combination of levels breaks a rule.
        """
        found = []
        for cell in self.design.cells:
            try:
                found.append(apply_params(self.baseline.config.train, cell.overrides))
            except ValueError as err:
                raise ConfigError(f"{cell.label}: {err}") from err
        return found


def make_plan(baseline: Baseline) -> Plan:
    """Make the design that a baseline's settings ask for.

    Raises:
        ConfigError: The factors do not suit the design, or it cannot be adaptive.
    """
    settings = baseline.settings
    first, most = settings.replicates, settings.max_replicates
    design = DESIGNS[settings.design](
        factors_of(baseline), max_cells=settings.max_cells, resolution=settings.resolution
    )
    if not settings.adaptive:
        return Plan(baseline, design, (first,))
    if design.combines_factors:
        alone = " or ".join(kind for kind, each in DESIGNS.items() if not each.combines_factors)
        raise ConfigError(
            f"--adaptive adds replicates to single levels, so it needs --design {alone}, but got "
            f"design={design.kind!r}."
        )
    if first < 2 or most <= first:
        raise ConfigError(
            "an adaptive ablation must begin with at least 2 replicates and may end with more "
            f"(ablation.max_replicates), but got {first} and {most}."
        )
    looks = [first]
    while looks[-1] < most:
        step = math.ceil(looks[-1] * _LOOK_GROWTH)
        # None that the last one follows closely: it would spend error and see little.
        looks.append(most if step * _LOOK_GROWTH > most else step)
    return Plan(baseline, design, tuple(looks))


def settled_config(plan: Plan, store: Record | None = None) -> StudyConfig:
    """Return the ablation's configuration with the size at which images are kept.

    What a run sees must not depend on the other cells of the design, so the size is that of the
    ablation in the record, or of the study that found the baseline, or enough for every cell.

    Args:
        plan: What is to be run.
        store: The record, if there is one.

    Raises:
        ConfigError: The study of this name is a search, or has another baseline.
    """
    config, source = plan.baseline.config, plan.baseline.source
    row = store.find_study(config.study.name) if store else None
    if row is not None and row.config["space"]:
        raise ConfigError(
            f"study {row.name} is a search, so it cannot hold an ablation too. Use another --name."
        )
    if config.data.store_size is None:
        if row is not None:
            size = row.config["data"]["store_size"]
        else:
            size = picture_size(corner_configs(source) if source else plan.configs())
        data = dataclasses.replace(config.data, store_size=size)
        config = config.model_copy(update={"data": data})
    if row is not None and (changes := config_diff(StudyConfig.from_record(row.config), config)):
        raise ConfigError(
            f"ablation {row.name} is already in {config.study.storage} with another baseline:\n  "
            + "\n  ".join(changes)
            + f"\nUse another --name, or continue that one: python -m study ablate {row.name}"
        )
    return config


def check_begun(plan: Plan) -> None:
    """Refuse, before a run, what the database has under the ablation's name, if it is another.

    Raises:
        ConfigError: The study of this name is a search, or has another baseline.
    """
    storage = plan.baseline.config.study.storage
    if "://" in storage or Path(storage).is_file():
        with Record.open(storage) as store:
            settled_config(plan, store)


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
        duration_s: Wall time of this run.
        checkpoint: Always None: an ablation chooses nothing.
    """

    study_name: str
    stopped_because: str
    counts: Counts
    n_done: int
    n_planned: int
    best_number: int | None
    best_value: float | None
    duration_s: float
    checkpoint: Path | None = None


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
        ValueError: Images, weights, backbone or device cannot be used.
    """
    begin = time.monotonic()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check_backbones(plan.baseline.config)
    with Record.open(plan.baseline.config.study.storage, create=True) as store:
        config = settled_config(plan, store)
        with open_session(
            store,
            config,
            plan.configs(),
            progress=progress,
            command=command,
            take_over=take_over,
        ) as session:
            ablation = _Ablation(plan, config, _Engine(session.work, config))
            session.because = ablation.run(command, decide, begin)
            outcome = ablation.outcome(session.because, time.monotonic() - begin)
            progress.study_ended(outcome)
            return outcome


@dataclass(frozen=True, slots=True)
class _Request:
    """A run that is to be done.

    Attributes:
        config: What to train.
        val_seed: Seed of its own validation split; None for the study's.
        cell: Its place in the design.
        replicate: Which of the cell's equal runs, from 0.
        levels: Factor -> label of its level, for all factors.
    """

    config: TrainConfig
    val_seed: int | None
    cell: Cell
    replicate: int
    levels: dict[str, str]

    @property
    def identity(self) -> str:
        """Return the hash by which two runs are the same: settings, seed, and split."""
        own = identity(self.config)
        if self.val_seed is None:
            return own
        return config_hash({"run": own, "val_seed": self.val_seed})


class _Engine:
    """Runs requests and records them: the one place that knows how trials are run."""

    def __init__(self, work: Work, config: StudyConfig) -> None:
        self.work = work
        self._config = config
        self.images_of = functools.lru_cache(maxsize=1)(self._load_images)

    def recover(self) -> list[Trial]:
        """Close what a killed process left open; return the runs that need not be done again."""
        close_killed(self.work)
        store = self.work.store
        done = [row for row in store.trials(self.work.study_id) if is_done(row)]
        for row in done:  # the process may have died just before it could add the predictions
            is_kept = row.checkpoint is not None and Path(row.checkpoint).is_dir()
            if is_kept and not store.has_predictions(row.id, "val"):
                record_answers(self.work, row.number)
        return done

    def run(self, request: _Request) -> Trial:
        """Run a request to its end, or until the user stops it."""
        work = dataclasses.replace(self.work, data=self.images_of(request.val_seed))
        cell, replicate = request.cell, request.replicate
        attrs = {"cell": cell.label, "replicate": replicate, LEVELS: request.levels}
        trial = work.store.start_trial(work.study_id, {}, {}, attrs)
        origin = f"{cell.label}, replicate {replicate + 1}"
        factor, level = ", ".join(cell.levels) or BASELINE, ", ".join(cell.levels.values()) or None
        asked = Asked(trial, origin, factor, level, replicate, request.identity)
        if run_trial(work, asked, request.config).state == "complete":
            record_answers(work, trial.number)
            if not self._config.ablation.keep_checkpoints:
                drop_checkpoint(work, trial.number)
        return work.store.trial(work.study_id, trial.number)

    def _load_images(self, val_seed: int | None) -> ImageData:
        """Load the images in a replicate's own split; the study's split has shown its warnings."""
        if val_seed is None:
            return self.work.data
        data = dataclasses.replace(self._config.data, val_seed=val_seed)
        assert data.store_size is not None, "an ablation's images have a settled size"
        return load_data(data, data.store_size, self.work.progress.pictures)


class _Ablation:
    """One process's part in an ablation: which runs are to be done, and which are."""

    def __init__(self, plan: Plan, config: StudyConfig, engine: _Engine) -> None:
        self.plan = plan
        self.design = plan.design
        self.config = config
        self.engine = engine
        self.work = engine.work
        self.rows: dict[str, Trial] = {}  # by identity
        self._known: dict[tuple[tuple[str, str], ...], list[str]] = {}
        self._recorded: dict[str, object] = {}

    def run(self, command: str, decide: Decide, begin: float) -> str:
        """Run what is missing; return why it ended."""
        self.engine.images_of(self._val_seed(0))  # a source that cannot be split again shows here
        for row in self.engine.recover():
            self.rows.setdefault(row.config_hash, row)
        self._record_design(command)
        best = self._best()
        self.work.progress.study_started(
            self.config.study.name,
            self.plan.n_runs,
            self._counts(),
            BestTrial.of(best) if best else None,
        )
        for cell, replicate in self.design.missing(self.plan.looks, self._done, decide):
            self._record_design(command)  # a path may have taken a step
            if self.work.stop.is_set():
                return "interrupted"
            timeout = self.config.study.timeout
            if timeout is not None and time.monotonic() - begin > timeout:
                return "timeout"
            request = self._request(cell, replicate)
            row = self.engine.run(request)
            if row.reason in RERUN_REASONS:
                return "interrupted"
            self.rows[request.identity] = row
        self._record_design(command)
        return "complete"

    def _request(self, cell: Cell, replicate: int) -> _Request:
        train = apply_params(self.config.train, cell.overrides)
        train = dataclasses.replace(train, seed=train.seed + replicate)
        levels = {f.name: cell.levels.get(f.name, f.baseline) for f in self.design.factors}
        return _Request(train, self._val_seed(replicate), cell, replicate, levels)

    def _val_seed(self, replicate: int) -> int | None:
        """Return the seed of a replicate's own validation split; None for the study's.

        The study's own split is not among them: a search has chosen the baseline on it.
        """
        if not self.config.ablation.resplit:
            return None
        known = self.config.data.val_seed
        return (self.config.data.split_seed if known is None else known) + 1 + replicate

    def _identities(self, cell: Cell) -> list[str]:
        """Return the identities of a cell's replicates."""
        key = tuple(cell.levels.items())
        if key not in self._known:
            requests = [self._request(cell, r) for r in range(self.plan.looks[-1])]
            self._known[key] = [request.identity for request in requests]
        return self._known[key]

    def _done(self, cell: Cell) -> dict[int, float | None]:
        rows = {r: self.rows.get(text) for r, text in enumerate(self._identities(cell))}
        return {
            r: row.value if row.state == "complete" else None for r, row in rows.items() if row
        }

    def _record_design(self, command: str) -> None:
        """Bring the design in the record up to date."""
        baseline = self.plan.baseline
        spec = self.design.to_record() | {
            "origin": baseline.origin,
            "settings": dataclasses.asdict(self.config.ablation) | {"factors": None},
            "looks": list(self.plan.looks),
            "first_seed": self.config.train.seed,
            "runs": [self._identities(cell) for cell in self.design.cells],
        }
        if spec == self._recorded:
            return
        self._recorded = spec
        parts = {name: spec[name] for name in ("kind", "factors", "coded")}
        key = config_hash(parts | {"resplit": self.config.ablation.resplit})
        self.work.store.put_design(self.work.study_id, key, self.design.kind, spec, command)

    def _counts(self) -> Counts:
        """Count the runs of this design that are done."""
        values = [value for cell in self.design.cells for value in self._done(cell).values()]
        n_failed = values.count(None)
        return Counts(complete=len(values) - n_failed, failed=n_failed)

    def _best(self) -> Trial | None:
        done = [row for row in self.rows.values() if row.state == "complete"]
        return min(done, key=lambda row: row.rank, default=None)

    def outcome(self, because: str, duration_s: float) -> AblationOutcome:
        """Sum up after this run."""
        best, done = self._best(), self._counts()
        return AblationOutcome(
            study_name=self.config.study.name,
            stopped_because=because,
            counts=Roster(self.work).counts(),
            n_done=done.complete + done.failed,
            n_planned=self.plan.n_runs,
            best_number=best.number if best else None,
            best_value=best.value if best else None,
            duration_s=duration_s,
        )


def is_done(row: Trial) -> bool:
    """Say whether a run need not be done again: it is complete, or fails for a reason of its own.

    A setting that diverges or does not fit into memory does so every time; that is its result.
    """
    own = (REASON_DIVERGED, REASON_OUT_OF_MEMORY)
    is_failure = row.state == "failed" and (row.reason or "").startswith(own)
    return row.state == "complete" or is_failure
