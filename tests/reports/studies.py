"""Studies for the reports' tests: made with the real store and the real designs, nothing trained.

The only module of these tests that writes into a store: `make_study` enters a search,
`make_ablation` an ablation, `in_memory` makes an ablation without a store.
"""

import dataclasses
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from PIL import Image
from sqlalchemy import update

from core.config import TrainConfig
from core.metrics import EpochMetrics
from reports.ablation import Ablation, Runs
from reports.effects import Arm, Rules
from study.ablation.designs import DESIGNS, Cell, Design
from study.ablation.designs import Path as PathDesign
from study.ablation.factors import Factor, Level
from study.config.search_space import apply_params
from study.config.study_config import AblationSection
from study.record.models import Design as RecordedDesign
from study.record.models import Misclassified, Run, Study, Test, Trial
from study.record.record import LEVELS, Record, config_hash
from support import distributions_of

BEGAN = datetime(2026, 3, 1, 20, 0)
VERSIONS = {"python": "3.11.2", "torch": "2.15.0", "frostline": "0.1.0"}
SPACE: dict[str, Any] = {
    "backbone": {"choices": ["resnet18", "mobilenet_v3_large", "timm:tf_efficientnet_lite0"]},
    "freeze_depth": {"low": 0, "high": 5},
    "base_lr": {"low": 1e-4, "high": 3e-2, "log": True},
    "head_lr_mult": {"low": 1.0, "high": 100.0, "log": True},
    "weight_decay": {"low": 1e-6, "high": 1e-2, "log": True},
}
COSTS = {"resnet18": 6.0, "mobilenet_v3_large": 3.0, "timm:tf_efficientnet_lite0": 4.0}


@dataclass
class Plan:
    """A trial to be entered: its settings, its accuracy after each epoch, and how it ended."""

    params: dict[str, Any]
    curve: Sequence[float]
    state: str = "complete"
    reason: str | None = None
    origin: str = "sampler"
    epoch_s: float = 4.0
    duration_s: float | None = None
    score: float | None = None


def metrics(epoch: int, val_acc: float, *, is_best: bool) -> EpochMetrics:
    loss = 2.3 * (1 - val_acc) + 0.05
    return EpochMetrics(
        epoch=epoch, train_loss=0.9 * loss, val_loss=loss, val_acc=val_acc,
        val_balanced_acc=max(val_acc - 0.01, 0.0), val_macro_f1=max(val_acc - 0.02, 0.0),
        base_lr=0.01 / (epoch + 1), head_lr=0.1 / (epoch + 1), images_per_s=240.0, data_s=0.4,
        train_s=3.0, eval_s=0.5, peak_memory_bytes=2**30, micro_batch_size=32, is_best=is_best,
    )  # fmt: skip


def _data(
    source: str, classes: Sequence[str], n_val: int, n_test: int, warnings: Sequence[str]
) -> dict[str, Any]:
    counts = {"n_train": 1360, "n_val": n_val, "n_test": n_test}
    texts = {"fingerprint": "9f2c" * 16, "warnings": list(warnings)}
    return {"source": source, "classes": list(classes)} | counts | texts


def make_study(
    path: Path,
    plans: Sequence[Plan],
    *,
    name: str = "pets",
    space: dict[str, Any] | None = None,
    classes: Sequence[str] = ("cat", "dog"),
    n_val: int = 340,
    n_test: int = 400,
    warnings: Sequence[str] = (),
) -> Record:
    """Enter the planned trials one after the other, as a run would have."""
    store = Record.open(str(path), create=True)
    config = {
        "study": {"name": name, "trials": len(plans), "seed": 7, "storage": "studies.db"},
        "data": {"source": "folder:pets"},
        "search": {"sampler": "tpe", "pruner": "hyperband"},
        "space": SPACE if space is None else space,
    }
    data = _data("folder:pets", classes, n_val, n_test, warnings)
    study_id = store.create_study(name, config, data, VERSIONS)
    run_id = store.begin_run(
        study_id,
        command=f"python -m study run --data pets --name {name}",
        device="cpu",
        versions=VERSIONS,
    )
    now, dimensions = BEGAN, distributions_of(*(plan.params for plan in plans))
    for number, plan in enumerate(plans):
        now = _enter(store, study_id, run_id, number, plan, now, dimensions)
    store.end_run(run_id, "trials")
    with store.engine.begin() as connection:
        connection.execute(
            update(Run).where(Run.id == run_id).values(started_at=BEGAN, ended_at=now)
        )
    return store


def _enter(
    store: Record,
    study_id: int,
    run_id: int,
    number: int,
    plan: Plan,
    now: datetime,
    space: Mapping[str, BaseDistribution],
) -> datetime:
    config = {"epochs": 10, "optimizer": "sgd", "seed": 7, **plan.params}
    network = {"backbone": "resnet18", "freeze_depth": 0}
    trial = store.start_trial(study_id, plan.params, space)
    row = Trial(
        study_id=study_id, number=number, run_id=run_id, origin=plan.origin,
        config=network | config, config_hash=config_hash(config), device="cpu",
        trained_parameters=5_130, total_parameters=11_181_642, started_at=now,
    )  # fmt: skip
    store.begin_trial(row)
    best = -1.0
    for epoch, val_acc in enumerate(plan.curve):
        is_best, best = val_acc > best, max(val_acc, best)
        seconds = plan.epoch_s * (epoch + 1)
        store.add_epoch(row, metrics(epoch, val_acc, is_best=is_best), seconds)
        trial.report(val_acc, epoch + 1)
    duration = plan.duration_s
    if duration is None:
        duration = 1.0 + plan.epoch_s * len(plan.curve)
    ended = now + timedelta(seconds=duration)
    if plan.state != "running":
        row.reason, row.duration_s = plan.reason, duration
        row.value = best if plan.curve else plan.score
        row.score = row.score if plan.score is None else plan.score
        if plan.state == "complete":
            row.checkpoint = f"frostline-runs/pets/trial-{number:04d}"
        store.end_trial(row, plan.state)
    times = {"started_at": now, "ended_at": None if plan.state == "running" else ended}
    with store.engine.begin() as connection:
        connection.execute(update(Trial).where(Trial.id == row.id).values(**times))
    return ended


def curve(final: float, n_epochs: int, rng: np.random.Generator) -> list[float]:
    """Draw a learning curve that ends near `final`."""
    rise = final - (final - 0.35) * np.exp(-0.55 * np.arange(1, n_epochs + 1))
    noisy = rise + rng.normal(0, 0.006, n_epochs)
    return [float(v) for v in np.clip(noisy, 0.0, 1.0)]


def searched_plans(n: int, seed: int) -> list[Plan]:
    """Plan a search like a real one: recipes first, a third pruned, a few failures."""
    rng = np.random.default_rng(seed)
    plans: list[Plan] = []
    backbones = itertools.cycle(SPACE["backbone"]["choices"])
    best_at_3: list[float] = []
    for number in range(n):
        params = {
            "backbone": next(backbones) if number < 6 else str(rng.choice([*COSTS])),
            "freeze_depth": int(rng.integers(0, 6)),
            "base_lr": float(10 ** rng.uniform(-4, np.log10(3e-2))),
            "head_lr_mult": float(10 ** rng.uniform(0, 2)),
            "weight_decay": float(10 ** rng.uniform(-6, -2)),
        }
        origin = "sampler"
        if number < 3:
            params |= {"freeze_depth": 5, "base_lr": 0.01, "head_lr_mult": 10.0}
            origin = f"recipe:linear-probe-{params['backbone']}"
        points = curve(_accuracy(**params) + rng.normal(0, 0.01), 10, rng)
        cost = COSTS[params["backbone"]] * (1.6 - 0.22 * params["freeze_depth"])
        if number % 19 == 11:
            reason = "diverged: the loss is nan at epoch 1, step 12. Lower base_lr."
            plans.append(Plan(params, points[:1], "failed", reason, origin, cost))
        elif number % 31 == 17:
            reason = "out of memory: even one image at a time does not fit (8 GiB)"
            plans.append(Plan(params, [], "failed", reason, origin, cost, 3.0))
        elif number > 5 and points[2] < float(np.quantile(best_at_3, 0.4)):
            plans.append(Plan(params, points[:3], "pruned", "pruned after epoch 3", origin, cost))
        else:
            plans.append(Plan(params, points, "complete", None, origin, cost))
        best_at_3.append(points[2])
    return plans


def _accuracy(
    backbone: str, freeze_depth: int, base_lr: float, head_lr_mult: float, weight_decay: float
) -> float:
    depth = -0.012 * (freeze_depth - 2) ** 2
    rate = -0.09 * (np.log10(base_lr) + 2.4) ** 2
    return float(0.93 + depth + rate + 0.02 * (backbone == "resnet18"))


def thumbnail(seed: int, size: tuple[int, int] = (96, 72)) -> bytes:
    """Make a small JPEG."""
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 255, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(low).resize(size).save(buffer, format="JPEG")
    return buffer.getvalue()


def add_results(
    store: Record, name: str, number: int, classes: Sequence[str], n_wrong: int
) -> None:
    """Give a trial predictions and worst images, as a finished one has."""
    rng = np.random.default_rng(3)
    k = len(classes)
    right = np.repeat(np.arange(k), rng.integers(20, 36, k))
    wrong = [rng.choice(k, 2, replace=False) for _ in range(n_wrong)]
    labels, predicted = np.concatenate([np.stack([right, right], axis=1), wrong]).T.tolist()
    trial = store.trial(store.study(name).id, number)
    store.add_predictions(trial.id, "val", labels, predicted)
    rows = []
    for rank in range(min(12, n_wrong)):
        i, j = rng.choice(k, 2, replace=False)
        size = (96, 72) if rank % 2 else (64, 96)
        row = Misclassified(
            trial_id=trial.id, split="val", rank=rank, path=f"val/{classes[i]}/IMG_{rank:04d}.jpg",
            label=classes[i], predicted=classes[j], probability=0.01 * rank,
            thumbnail=thumbnail(rank, size),
        )  # fmt: skip
        rows.append(row)
    store.add_misclassified(trial.id, rows)


def add_test(
    store: Record, name: str, number: int, accuracy: float, val_acc: float, n: int = 400
) -> None:
    """Enter a reading of the test split."""
    test = Test(
        study_id=store.study(name).id, trial_number=number, n=n, n_correct=round(accuracy * n),
        val_acc=val_acc, balanced_acc=accuracy, macro_f1=accuracy, confusion=[[1]],
        command=f"python -m study test {name}",
    )  # fmt: skip
    store.save(test)


# Ablations


Score = float | str | None
"""A run's validation accuracy, why it failed, or None where it was not run."""
Simulator = Callable[[Cell, int], Score]
"""Says how a cell's replicate went."""

CLASSES = ("cat", "dog", "bird", "fish")
FIRST_SEED = 7
TRAIN = TrainConfig(
    backbone="resnet18", weights="imagenet:IMAGENET1K_V1", image_size=64, epochs=8, seed=FIRST_SEED
)
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


def two_levels(*names: str) -> list[Factor]:
    """Make factors with one level beside the baseline's."""
    return factors_of([(name, ("off", "on")) for name in names])


def design_of(kind: str, factors: Sequence[Factor], **settings: Any) -> Design:
    return DESIGNS[kind](factors, **settings)


def section(**settings: Any) -> AblationSection:
    return AblationSection(**{"replicates": 5, **settings})


def follow(design: PathDesign, score: Simulator, n: int) -> tuple[PathDesign, list[str]]:
    """Run a path to its end, the candidates one after the other; return it with its steps."""
    while candidates := design.candidates():
        means = {}
        for name, cell in candidates.items():
            done = [v for r in range(n) if isinstance(v := score(cell, r), float)]
            means[name] = sum(done) / n if len(done) == n else -1.0
        design.take(max(means, key=lambda name: means[name]))
    return design, design.steps


def spec_of(
    design: Design,
    looks: Sequence[int],
    settings: AblationSection,
    steps: Sequence[str] = (),
    origin: str = "trial 4 of study pets, its best",
) -> dict[str, Any]:
    """Write a design as an ablation does."""
    return design.to_record() | {
        "origin": origin,
        "settings": dataclasses.asdict(settings) | {"factors": None},
        "looks": list(looks),
        "steps": list(steps),
        "first_seed": FIRST_SEED,
        "runs": [
            [_identity(cell, replicate, settings.resplit) for replicate in range(looks[-1])]
            for cell in design.cells
        ],
    }


def _identity(cell: Cell, replicate: int, resplit: bool) -> str:
    own = {"overrides": cell.overrides, "levels": cell.levels, "seed": FIRST_SEED + replicate}
    return config_hash(own | {"val_seed": replicate if resplit else None})


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
    origin: str = "trial 4 of study pets, its best",
) -> Record:
    """Enter a simulated ablation, replicate by replicate, as a run would have; add to a database.

    Args:
        path: Database; made where it is missing.
        design: What is run.
        score: How each run goes.
        name: Of the study.
        looks: Numbers of replicates at which an adaptive one looks; one for a fixed one.
        settings: By default what suits the design.
        steps: Of a path: the changes taken.
        test: Test accuracy of a run; None for a run that was not tested.
    """
    if settings is None:
        settings = section(design=design.kind, replicates=looks[0], adaptive=len(looks) > 1)
    store = Record.open(str(path), create=True)
    study_id = _enter_study(store, name, settings, source, n_val, n_test, warnings)
    run_id = store.begin_run(study_id, command=command, device="cpu", versions=VERSIONS)
    number = 0
    for replicate in range(looks[-1]):
        for cell in design.cells:
            found = score(cell, replicate)
            if found is None:
                continue
            _enter_run(store, study_id, run_id, number, cell, replicate, settings, found)
            on_test = test(cell, replicate) if test and isinstance(found, float) else None
            if isinstance(on_test, float):
                add_test(store, name, number, on_test, found, n_test)
            number += 1
    store.end_run(run_id, "complete")
    spec = spec_of(design, looks, settings, steps, origin)
    store.put_design(study_id, config_hash({"coded": spec["coded"]}), design.kind, spec, command)
    return store


def repeat_design(store: Record, name: str) -> None:
    """Enter an ablation's design once more, as a further one."""
    row = store.designs(store.study(name).id)[0]
    store.put_design(row.study_id, "another", row.kind, row.spec, "python -m study again")


def _enter_study(
    store: Record,
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
    data = _data(source, CLASSES, n_val, n_test, warnings)
    return store.create_study(name, config, data, VERSIONS)


def _enter_run(
    store: Record,
    study_id: int,
    run_id: int,
    number: int,
    cell: Cell,
    replicate: int,
    settings: AblationSection,
    score: float | str,
) -> None:
    train = apply_params(TRAIN, cell.overrides)
    config = dataclasses.asdict(dataclasses.replace(train, seed=FIRST_SEED + replicate))
    store.start_trial(study_id, {}, {}, {LEVELS: cell.levels})
    trial = Trial(
        study_id=study_id, number=number, run_id=run_id,
        origin=f"{cell.label}, replicate {replicate + 1}", config=config,
        config_hash=_identity(cell, replicate, settings.resplit), device="cpu",
        factor=", ".join(cell.levels) or "baseline",
        level=", ".join(cell.levels.values()) or None, replicate=replicate,
    )  # fmt: skip
    store.begin_trial(trial)
    trial.duration_s = 12.5 + 0.1 * number
    if isinstance(score, float):
        trial.value, trial.best_epoch, trial.epochs_done = score, 7, 8
        store.end_trial(trial, "complete")
    else:
        trial.reason, trial.epochs_done = str(score), 1
        store.end_trial(trial, "failed")


# Without a store: thousands of them in seconds.


def in_memory(
    design: Design,
    scores: Any,
    *,
    steps: Sequence[str] = (),
) -> Ablation:
    """Make an ablation as it would be read; `scores` (cells, R), NaN for a failed run."""
    values = np.asarray(scores, dtype=np.float64)
    looks = [values.shape[1]]
    settings = section(design=design.kind, replicates=looks[0])
    spec = {
        **design.to_record(),
        "settings": dataclasses.asdict(settings),
        "looks": looks,
        "steps": list(steps),
        "first_seed": FIRST_SEED,
        "origin": "a trial",
    }
    study = Study(id=1, name="pets", config={}, data={"n_val": 400}, versions={})
    row = RecordedDesign(
        id=1, study_id=1, key="key", kind=design.kind, spec=spec, command="", updated_at=BEGAN
    )
    runs = tuple(_runs(cell, own) for cell, own in zip(design.cells, values, strict=True))
    rules = Rules(settings.alpha, settings.margin / 100)
    return Ablation(study, row, runs, rules)


def _runs(cell: Cell, values: Any) -> Runs:
    arm = make_arm(cell.label, values, ", ".join(cell.levels), ", ".join(cell.levels.values()))
    nothing = np.full(len(values), math.nan)
    numbers = tuple(range(len(values)))
    return Runs(arm, nothing, numbers, math.nan, dict(cell.levels))


def make_arm(label: str, values: Any, factor: str = "factor", level: str = "level") -> Arm:
    """Make a cell's runs; NaN is a run that failed."""
    scores = np.asarray(values, dtype=np.float64)
    failures = tuple(None if math.isfinite(v) else "diverged: the loss is nan" for v in scores)
    return Arm(label, factor, level, scores, failures)


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
