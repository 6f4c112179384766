"""Ablations for the reports' tests: simulated, with the real designs and the real store."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from core.config import TrainConfig
from reports.ablation import Ablation, Runs
from reports.effects import Arm, Rules
from reports.intervals import Interval
from study.designs import Cell, Design, candidates, extend_path, make_design
from study.factors import Factor, Level
from study.rows import DesignRow, StudyRow
from study.sections import AblationSection
from study.space import apply_params
from study.store import LEVELS, Store, config_hash

Score = float | str | None
"""A run's validation accuracy, why it failed, or None where it was not run."""
Simulator = Callable[[Cell, int], Score]
"""Says how a cell's replicate went."""

CLASSES = ("cat", "dog", "bird", "fish")
FIRST_SEED = 7
TRAIN = TrainConfig(
    backbone="resnet18", weights="imagenet:IMAGENET1K_V1", image_size=64, epochs=8, seed=FIRST_SEED
)
VERSIONS = {"python": "3.11.2", "torch": "2.15.0", "frostline": "0.1.0"}
# What a factor of a made-up name sets, so that factors of one design never share a key.
_KEYS = (
    "weight_decay", "base_lr", "head_lr_mult", "momentum", "label_smoothing", "cutmix",
    "warmup_epochs", "clip_norm", "ema_decay", "image_size", "epochs",
)  # fmt: skip


def make_factors(**named: Sequence[str]) -> list[Factor]:
    """Make factors by name: the baseline's label, then those of the other levels."""
    return factors_of(list(named.items()))


def factors_of(named: Sequence[tuple[str, Sequence[str]]]) -> list[Factor]:
    found = []
    for k, (name, (baseline, *labels)) in enumerate(named):
        key = _KEYS[k % len(_KEYS)]
        unit = 16 if key in ("image_size", "epochs") else 1e-3
        levels = [Level(label, {key: unit * (n + 1)}) for n, label in enumerate(labels)]
        found.append(Factor(name, baseline, tuple(levels)))
    return found


def bracketed(*keys: str) -> list[Factor]:
    """Make factors with a level on each side of the baseline's, as definitive screening needs."""
    return [
        Factor(key, "0.01", (Level("0.001", {key: 0.001}), Level("0.1", {key: 0.1})))
        for key in keys
    ]


def two_levels(*names: str) -> list[Factor]:
    """Make factors with one level beside the baseline's."""
    return factors_of([(name, ("off", "on")) for name in names])


def design_of(kind: str, factors: Sequence[Factor], **settings: Any) -> Design:
    return make_design(factors, section(design=kind, **settings))


def section(**settings: Any) -> AblationSection:
    return AblationSection(**{"replicates": 5, **settings})


def follow(design: Design, score: Simulator, n: int) -> tuple[Design, list[str]]:
    """Walk a path as `study.ablate` does: every candidate is run, the best mean is kept."""
    chosen: list[str] = []
    while steps := candidates(design, chosen):
        means = {}
        for name, cell in steps.items():
            values = [score(design.cells[cell], r) for r in range(n)]
            done = [v for v in values if isinstance(v, float)]
            means[name] = sum(done) / n if len(done) == n else -1.0
        chosen.append(max(means, key=lambda name: means[name]))
        design = extend_path(design, chosen)
    return design, chosen


def spec_of(
    design: Design,
    looks: Sequence[int],
    settings: AblationSection,
    steps: Sequence[str] = (),
    origin: str = "trial 4 of study pets, its best",
) -> dict[str, Any]:
    """Write a design as `study.ablate` does."""
    return design.to_record() | {
        "origin": origin,
        "settings": dataclasses.asdict(settings) | {"factors": None},
        "given": {},
        "looks": list(looks),
        "steps": list(steps),
        "first_seed": FIRST_SEED,
        "runs": [
            [_identity(cell, replicate, settings.resplit) for replicate in range(looks[-1])]
            for cell in design.cells
        ],
    }


def _identity(cell: Cell, replicate: int, resplit: bool) -> str:
    told = {"overrides": cell.overrides, "levels": cell.levels, "seed": FIRST_SEED + replicate}
    return config_hash(told | {"val_seed": replicate if resplit else None})


def make_ablation(
    path: Path,
    design: Design,
    score: Simulator,
    *,
    name: str = "pets-ablation",
    looks: Sequence[int] = (5,),
    settings: AblationSection | None = None,
    steps: Sequence[str] = (),
    test: Simulator | None = None,
    n_val: int = 400,
    n_test: int = 400,
    source: str = "folder:pets",
    command: str = "python -m study ablate pets",
    warnings: Sequence[str] = (),
    with_answers: bool = False,
    origin: str = "trial 4 of study pets, its best",
) -> Store:
    """Enter a simulated ablation, replicate by replicate, as a run would have; add to a database.

    Args:
        path: Database; made where it is missing.
        design: What is run.
        score: How each run goes.
        name: Of the study.
        looks: Numbers of replicates at which an adaptive one looks; one for a fixed one.
        settings: What the ablation was told; by default what suits the design.
        steps: Of a path: the changes taken.
        test: Test accuracy of a run; None for a run that was not tested.
        n_val: Validation pictures.
        n_test: Test pictures.
        source: Where pictures come from.
        command: Command line.
        warnings: About the pictures.
        with_answers: Keep what each run says of each picture.
        origin: Where the baseline comes from.
    """
    if settings is None:
        settings = section(design=design.kind, replicates=looks[0], adaptive=len(looks) > 1)
    store = Store.open(str(path), create=True)
    study_id = _enter_study(store, name, settings, source, n_val, n_test, warnings)
    run_id = store.begin_run(study_id, command=command, device="cpu", versions=VERSIONS)
    number = 0
    for replicate in range(looks[-1]):
        for cell in design.cells:
            found = score(cell, replicate)
            if found is None:
                continue
            key = _enter_run(store, study_id, run_id, number, cell, replicate, settings, found)
            if isinstance(found, float) and with_answers:
                store.add_predictions(key, "val", *_answers(found, n_val, number))
            on_test = test(cell, replicate) if test and isinstance(found, float) else None
            if isinstance(on_test, float):
                _enter_test(store, study_id, key, number, on_test, found, n_test)
            number += 1
    store.end_run(run_id, "complete")
    spec = spec_of(design, looks, settings, steps, origin)
    store.put_design(study_id, config_hash({"coded": spec["coded"]}), design.kind, spec, command)
    return store


def _enter_study(
    store: Store,
    name: str,
    settings: AblationSection,
    source: str,
    n_val: int,
    n_test: int,
    warnings: Sequence[str],
) -> int:
    config = {
        "study": {"name": name, "storage": "studies.db", "output": "frostline-runs"},
        "data": {"source": source},
        "train": dataclasses.asdict(TRAIN),
        "space": {},
        "ablation": dataclasses.asdict(settings),
    }
    data = {
        "source": source,
        "classes": list(CLASSES),
        "n_train": 1360,
        "n_val": n_val,
        "n_test": n_test,
        "fingerprint": "9f2c" * 16,
        "warnings": list(warnings),
    }
    return store.create_study(name, config, data, VERSIONS)


def _enter_run(
    store: Store,
    study_id: int,
    run_id: int,
    number: int,
    cell: Cell,
    replicate: int,
    settings: AblationSection,
    score: float | str,
) -> int:
    train = apply_params(TRAIN, cell.overrides)
    config = dataclasses.asdict(dataclasses.replace(train, seed=FIRST_SEED + replicate))
    store.start_trial(study_id, {}, {}, {LEVELS: cell.levels})
    key = store.begin_trial(
        study_id,
        number,
        run_id,
        origin=f"{cell.label}, replicate {replicate + 1}",
        config=config,
        config_hash=_identity(cell, replicate, settings.resplit),
        seed=FIRST_SEED + replicate,
        backbone=train.backbone,
        freeze_depth=train.freeze_depth,
        device="cpu",
        factor=", ".join(cell.levels) or "baseline",
        level=", ".join(cell.levels.values()) or None,
        replicate=replicate,
    )
    is_done = isinstance(score, float)
    store.end_trial(
        key,
        "complete" if is_done else "failed",
        reason=None if is_done else str(score),
        value=score if isinstance(score, float) else None,
        best_epoch=7 if is_done else None,
        epochs_done=8 if is_done else 1,
        duration_s=12.5 + 0.1 * number,
        checkpoint=None,
    )
    return key


def _answers(accuracy: float, n: int, seed: int) -> tuple[list[int], list[int]]:
    """Make true and chosen classes of which this share is right."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % len(CLASSES)
    wrong = rng.permutation(n)[: n - round(accuracy * n)]
    chosen = labels.copy()
    chosen[wrong] = (chosen[wrong] + 1) % len(CLASSES)
    return labels.tolist(), chosen.tolist()


def _enter_test(
    store: Store, study_id: int, key: int, number: int, accuracy: float, val: float, n: int
) -> None:
    labels, chosen = _answers(accuracy, n, number)
    store.add_predictions(key, "test", labels, chosen)
    right = sum(a == b for a, b in zip(labels, chosen, strict=True))
    store.add_test(
        study_id,
        number,
        n=n,
        n_correct=right,
        balanced_acc=right / n,
        macro_f1=right / n,
        val_acc=val,
        confusion=[[0] * len(CLASSES)] * len(CLASSES),
        command="python -m study test pets-ablation",
    )


# Without a store: thousands of them in seconds.


def in_memory(
    design: Design,
    scores: Any,
    *,
    steps: Sequence[str] = (),
    settings: AblationSection | None = None,
    resolution: float = 0.0,
) -> Ablation:
    """Make an ablation as it would be read.

    Args:
        design: Its cells.
        scores: Accuracy by cell and replicate, (cells, R); NaN for a failed run.
        steps: Of a path: the changes taken.
        settings: What it was told.
        resolution: Step in which accuracy moves.
    """
    values = np.asarray(scores, dtype=np.float64)
    looks = [values.shape[1]]
    settings = settings or section(design=design.kind, replicates=looks[0])
    spec = {
        **design.to_record(),
        "settings": dataclasses.asdict(settings),
        "looks": looks,
        "steps": list(steps),
        "first_seed": FIRST_SEED,
        "origin": "a trial",
    }
    now = datetime(2026, 3, 1)
    study = StudyRow(1, "pets", now, {}, {"n_val": 400}, {})
    row = DesignRow(1, 1, "key", design.kind, spec, "", now)
    runs = tuple(_runs(cell, own) for cell, own in zip(design.cells, values, strict=True))
    rules = Rules(settings.alpha, settings.margin / 100, settings.test, resolution=resolution)
    return Ablation(study, row, runs, rules, (), "cpu", {})


def _runs(cell: Cell, values: Any) -> Runs:
    arm = make_arm(cell.label, values, ", ".join(cell.levels), ", ".join(cell.levels.values()))
    nothing = np.full(len(values), math.nan)
    numbers = tuple(range(len(values)))
    return Runs(arm, nothing, numbers, math.nan, None, None, dict(cell.levels))


def make_arm(label: str, values: Any, factor: str = "factor", level: str = "level") -> Arm:
    """Make a cell's runs; NaN is a run that failed."""
    scores = np.asarray(values, dtype=np.float64)
    failures = tuple(None if math.isfinite(v) else "diverged: the loss is nan" for v in scores)
    return Arm(label, factor, level, scores, failures)


# Studies by the thousand, for the share of wrong verdicts.

SEED_SD = 0.02
"""Scatter that all settings of a seed share, and pairing removes."""
RUN_SD = 0.01
"""Scatter of a run; a paired difference has sqrt(2) times that."""


def draw_study(
    rng: np.random.Generator, effects: Sequence[float], n: int, run_sd: float = RUN_SD
) -> tuple[Arm, list[Arm]]:
    """Draw a baseline and levels with these true effects, n replicates with paired seeds."""
    shared = 0.8 + rng.normal(0, SEED_SD, n)
    true = [0.0, *effects]
    arms = [
        make_arm(f"factor = {k}", shared + effect + rng.normal(0, run_sd, n), "factor", str(k))
        for k, effect in enumerate(true)
    ]
    return arms[0], arms[1:]


def verdicts_only(monkeypatch: Any) -> None:
    """Leave out what no verdict of the t-test depends on: the most of an effect's time.

    `test_effects.py` holds that it does not.
    """
    nothing = Interval(math.nan, math.nan, math.nan)
    monkeypatch.setattr("reports.effects.bca_interval", lambda *args: nothing)
    monkeypatch.setattr("reports.effects.sign_flip", lambda *args: math.nan)
    monkeypatch.setattr("reports.effects.replicates_needed", lambda *args: None)
