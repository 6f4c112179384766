"""Run an ablation: every cell of a design once per replicate, in the same record as a search."""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import TrainConfig
from core.data.splits import ImageData
from core.training.no_effect import without_effect
from study.ablation.baseline import Baseline, factors_of
from study.ablation.designs import BASELINE, DESIGNS, Cell, Decide, Design
from study.config.errors import ConfigError
from study.config.formatting import study_command
from study.config.search_space import apply_params
from study.config.study_config import StudyConfig, config_diff
from study.execution.progress import Progress, StudyState
from study.execution.recovery import recover
from study.execution.session import (
    Session,
    corner_configs,
    open_session,
    stored_side,
    write_splits,
)
from study.execution.trial_engine import FOLD, TrialEngine, TrialRequest, identity, is_settled
from study.record.models import Trial
from study.record.record import LEVELS, Record, config_hash

# Of a cross-validation, and validation images below which there is one. Assumption: at 400 images,
# two settings that disagree on a tenth of them leave +-3 points however many seeds there are.
_FOLDS = 5
_FEW_IMAGES = 400
# Each interim analysis comes after half as many replicates again: few, so that little of the
# allowed error is spent on each.
_LOOK_GROWTH = 1.5


@dataclass(frozen=True, slots=True)
class Plan:
    """What an ablation is to do, settled before its first run.

    Attributes:
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
    settings = baseline.config.ablation
    first, most = settings.replicates, settings.max_replicates
    design = DESIGNS[settings.design](factors_of(baseline), max_cells=settings.max_cells)
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


def choose_folds(baseline: Baseline, n_val: int) -> int:
    """Return the folds of cross-validation; 1 where all replicates share the validation split."""
    if baseline.config.ablation.folds is not None:
        return baseline.config.ablation.folds
    if baseline.config.data.judged_by == "ablation":
        return 1
    return _FOLDS if baseline.source is not None or n_val < _FEW_IMAGES else 1


def settled_config(plan: Plan, store: Record | None = None) -> StudyConfig:
    """Return the ablation's configuration with the size at which images are kept.

    What a run sees must not depend on the other cells of the design, so the size is that of the
    ablation in the record, or of the study that found the baseline, or enough for every cell.

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
            size = stored_side(corner_configs(source) if source else plan.configs())
        data = dataclasses.replace(config.data, store_size=size)
        config = config.model_copy(update={"data": data})
    if row is not None and (changes := config_diff(StudyConfig.from_record(row.config), config)):
        raise ConfigError(
            f"ablation {row.name} is already in {config.study.storage} with another baseline:\n  "
            + "\n  ".join(changes)
            + "\nUse another --name, or continue that one: "
            + study_command("ablate", row.name, config.study.storage)
        )
    return config


def check_begun(plan: Plan, n_folds: int) -> int:
    """Refuse, before a run, another study of the ablation's name, as `settled_config` does.

    Return which analysis of the ablation the plan's runs are for, from 1.
    """
    storage = plan.baseline.config.study.storage
    if "://" in storage or Path(storage).is_file():
        with Record(storage) as store:
            if study := store.find_study(settled_config(plan, store).study.name):
                return _order(store, study.id, plan, n_folds)
    return 1


@dataclass(frozen=True, slots=True)
class AblationOutcome:
    """How an ablation ended.

    Attributes:
        stopped_because: `complete`, `timeout` or `interrupted`.
        n_done: Runs of this design that are done.
        n_planned: Runs of this design in all, as far as it is known.
        duration_s: Wall time of this process.
    """

    stopped_because: str
    n_done: int
    n_planned: int
    duration_s: float


def run_ablation(
    plan: Plan,
    *,
    progress: Progress,
    command: str,
    decide: Decide,
    announce: Callable[[ImageData, int, int], None],
    take_over: bool = False,
) -> AblationOutcome:
    """Run or continue an ablation; it raises what `open_session` does, with the same arguments.

    `decide` says which cells are still open; it is asked by adaptive ablations only. `announce` is
    called before the first run with the images, the folds, and which analysis of the ablation this
    will be.

    Raises:
        ConfigError: The ablation of this name has another baseline.
    """
    begin = time.monotonic()
    with Record(plan.baseline.config.study.storage, create=True) as store:
        config = settled_config(plan, store)
        name = config.study.name
        with open_session(
            store,
            config,
            plan.configs(),
            progress=progress,
            command=command,
            resume=study_command("ablate", name, store.storage),
            take_over=take_over,
        ) as session:
            ablation = _Ablation(plan, session)
            order = _order(store, session.study_id, plan, ablation.n_folds)
            announce(session.data, ablation.n_folds, order)
            session.because = ablation.run(command, decide, begin)
            n_done, duration_s = len(ablation.done_rows()), time.monotonic() - begin
            return AblationOutcome(session.because, n_done, plan.n_runs, duration_s)


class _Ablation:
    """One process's part in an ablation: which runs are to be done, and which are."""

    def __init__(self, plan: Plan, session: Session) -> None:
        self.plan = plan
        self.design = plan.design
        self.session = session
        self.record, self.study_id = session.record, session.study_id
        self.config = session.config
        self.n_folds = choose_folds(plan.baseline, len(session.data.val))
        keeps_all = self.config.ablation.keep_checkpoints
        self.engine = TrialEngine(session, keep_best=None if keeps_all else 0)
        self.rows: dict[str, Trial] = {}  # by identity
        self._known: dict[tuple[tuple[str, str], ...], list[str]] = {}
        self._recorded: dict[str, object] = {}

    def run(self, command: str, decide: Decide, begin: float) -> str:
        """Run what is missing; return why it ended."""
        if self.n_folds > 1:
            write_splits(self.session.data, self.session.output, map(self._fold, self._replicates))
        continued = recover(self.engine)
        for row in self.record.trials(self.study_id):
            if is_settled(row):
                self.rows.setdefault(row.config_hash, row)
        self._record_design(command)
        if self.config.study.time is not None:
            self.session.deadline = begin + self.config.study.time
        self._show()
        for request in continued:
            self._run(request)
        for cell, replicate in self.design.missing(self.plan.looks, self._done, decide):
            self._record_design(command)  # a path may have taken a step
            if because := self.session.halted():
                return because
            if not self._run(self._request(cell, replicate)):
                return self.session.halted() or "interrupted"
        self._record_design(command)
        return "complete"

    def done_rows(self) -> list[Trial]:
        """Return the runs of this design that are done; levels that train the same share them."""
        texts = [text for cell in self.design.cells for text in self._identities(cell)]
        return [self.rows[text] for text in texts if text in self.rows]

    def _run(self, request: TrialRequest) -> bool:
        """Run a trial; return whether it ended."""
        if self.engine.run(request).state == "stopped":
            return False
        row = self.record.trial(self.study_id, request.number)
        self.rows[row.config_hash] = row
        self._show()
        return True

    def _show(self) -> None:
        name = self.config.study.name
        self.session.progress.emit(StudyState.of(name, self.plan.n_runs, self.done_rows()))

    def _request(self, cell: Cell, replicate: int) -> TrialRequest:
        """Begin a trial of Optuna's for a run, and return its request."""
        fold = self._fold(replicate)
        levels = {f.name: cell.levels.get(f.name, f.baseline) for f in self.design.factors}
        attrs = {"cell": cell.label, "replicate": replicate, LEVELS: levels, FOLD: fold}
        return TrialRequest(
            number=self.record.start_trial(self.study_id, {}, {}, attrs).number,
            config=self._train(cell, replicate),
            origin=f"{cell.label}, replicate {replicate + 1}",
            params=levels,
            fold=fold,
            factor=", ".join(cell.levels) or BASELINE,
            level=", ".join(cell.levels.values()) or None,
            replicate=replicate,
            identity=self._identities(cell)[replicate],
        )

    def _train(self, cell: Cell, replicate: int) -> TrainConfig:
        train = apply_params(self.config.train, cell.overrides)
        if self.n_folds == 1 and "seed" in without_effect(train):  # one run is all replicates
            return train
        return dataclasses.replace(train, seed=train.seed + replicate)

    @property
    def _replicates(self) -> range:
        return range(self.plan.looks[-1])

    def _fold(self, replicate: int) -> tuple[int, int, int] | None:
        """Return a replicate's fold; after all folds of one division comes another division."""
        if self.n_folds == 1:
            return None
        repetition, fold = divmod(replicate, self.n_folds)
        return self.n_folds, self.config.data.split_seed + repetition, fold

    def _identities(self, cell: Cell) -> list[str]:
        """Return per replicate the hash by which runs are the same: settings, seed and split."""
        key = tuple(cell.levels.items())
        if key not in self._known:
            hashes = [identity(self._train(cell, r)) for r in self._replicates]
            if self.n_folds > 1:
                runs = [{"run": hashes[r], "fold": self._fold(r)} for r in self._replicates]
                hashes = [config_hash(run) for run in runs]
            self._known[key] = hashes
        return self._known[key]

    def _done(self, cell: Cell) -> dict[int, float | None]:
        rows = {r: self.rows.get(text) for r, text in enumerate(self._identities(cell))}
        return {
            r: row.value if row.state == "complete" else None for r, row in rows.items() if row
        }

    def _record_design(self, command: str) -> None:
        """Bring the design in the record up to date."""
        settings = dataclasses.asdict(self.config.ablation)
        settings |= {"factors": None, "folds": self.n_folds}
        spec = self.design.to_record() | {
            "origin": self.plan.baseline.origin,
            "chosen": dict(self.plan.baseline.chosen),
            "settings": settings,
            "looks": list(self.plan.looks),
            "n_folds": self.n_folds,
            "first_seed": self.config.train.seed,
            "runs": [self._identities(cell) for cell in self.design.cells],
            "solved": ["seed" in without_effect(self._train(c, 0)) for c in self.design.cells],
        }
        if spec == self._recorded:
            return
        self._recorded = dict(spec)
        key = _key(self.design, self.n_folds)
        spec["analyses"] = self._analyses(key)
        self.record.put_design(self.study_id, key, self.design.kind, spec, command)

    def _analyses(self, key: str) -> list[dict[str, Any]]:
        """Return the analyses of the design of this key, the one that these runs are for last.

        It is recorded before its runs, with its number of replicates, and each further one of the
        ablation may spend half of the error of the one before: so runs that are added because of
        what an analysis showed are paid for.
        """
        designs = {design.key: design for design in self.record.designs(self.study_id)}
        known: list[dict[str, Any]] = designs[key].spec["analyses"] if key in designs else []
        looks = list(self.plan.looks)
        if not any(a["split"] == "val" and a["replicates"] == looks for a in known):
            order = _next_order(self.record, self.study_id)
            known = [*known, {"split": "val", "order": order, "replicates": looks}]
        return known


def _key(design: Design, n_folds: int) -> str:
    """Return what makes a design the same one as in the record."""
    spec = design.to_record() | {"n_folds": n_folds}
    return config_hash({name: spec[name] for name in ("kind", "factors", "coded", "n_folds")})


def _order(record: Record, study_id: int, plan: Plan, n_folds: int) -> int:
    """Return which analysis of an ablation a plan's runs are for, from 1."""
    key, looks = _key(plan.design, n_folds), list(plan.looks)
    for design in record.designs(study_id):
        for known in design.spec["analyses"] if design.key == key else ():
            if known["split"] == "val" and known["replicates"] == looks:
                return int(known["order"])
    return _next_order(record, study_id)


def _next_order(record: Record, study_id: int) -> int:
    """Return which analysis of an ablation the next one is, from 1."""
    return 1 + sum(len(design.spec["analyses"]) for design in record.designs(study_id))


def record_test(record: Record, study_id: int) -> None:
    """Record an analysis of the test split for every design of which tested runs are new."""
    numbers = {row.trial_number for row in record.tests(study_id)}
    hashes = {row.config_hash for row in record.trials(study_id) if row.number in numbers}
    for design in record.designs(study_id):
        spec = dict(design.spec)
        n = sum(text in hashes for runs in spec["runs"] for text in runs)
        tested = [sum(text in hashes for text in runs) for runs in spec["runs"]]
        if not n or any(a["split"] == "test" and a["n_runs"] == n for a in spec["analyses"]):
            continue
        order = _next_order(record, study_id)
        analysis = {"split": "test", "order": order, "replicates": [max(tested)], "n_runs": n}
        analysis["cells"] = [k for k, n_tested in enumerate(tested) if n_tested]
        spec["analyses"] = [*spec["analyses"], analysis]
        record.put_design(study_id, design.key, design.kind, spec, design.command)
