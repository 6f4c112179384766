"""Studies for the reports' tests: made with the real store, without training anything."""

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from PIL import Image
from sqlalchemy import update

from core.metrics import EpochMetrics
from study.store import PictureRow, Store, config_hash
from study.tables import RunTable, TrialTable
from support import distributions_of

BEGAN = datetime(2026, 3, 1, 20, 0)
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
    duration_s: float | None = field(default=None)
    score: float | None = None


def metrics(epoch: int, val_acc: float, *, is_best: bool) -> EpochMetrics:
    loss = 2.3 * (1 - val_acc) + 0.05
    return EpochMetrics(
        epoch=epoch,
        train_loss=0.9 * loss,
        val_loss=loss,
        val_acc=val_acc,
        val_balanced_acc=max(val_acc - 0.01, 0.0),
        val_macro_f1=max(val_acc - 0.02, 0.0),
        base_lr=0.01 / (epoch + 1),
        head_lr=0.1 / (epoch + 1),
        images_per_s=240.0,
        data_s=0.4,
        train_s=3.0,
        eval_s=0.5,
        peak_memory_bytes=2**30,
        micro_batch_size=32,
        is_best=is_best,
    )


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
) -> Store:
    """Enter the planned trials one after the other, as a run would have."""
    store = Store.open(str(path), create=True)
    config = {
        "study": {"name": name, "trials": len(plans), "seed": 7, "storage": "studies.db"},
        "data": {"source": "folder:pets"},
        "search": {"sampler": "tpe", "pruner": "hyperband"},
        "space": SPACE if space is None else space,
    }
    data = {
        "source": "folder:pets",
        "classes": list(classes),
        "n_train": 1360,
        "n_val": n_val,
        "n_test": n_test,
        "fingerprint": "9f2c" * 16,
        "warnings": list(warnings),
    }
    versions = {"python": "3.11.2", "torch": "2.15.0", "frostline": "0.1.0"}
    study_id = store.create_study(name, config, data, versions)
    run_id = store.begin_run(
        study_id,
        command=f"python -m study run --data pets --name {name}",
        device="cpu",
        versions=versions,
    )
    now, dimensions = BEGAN, distributions_of(*(plan.params for plan in plans))
    for number, plan in enumerate(plans):
        now = _enter(store, study_id, run_id, number, plan, now, dimensions)
    store.end_run(run_id, "trials")
    with store._engine.begin() as connection:
        connection.execute(
            update(RunTable).where(RunTable.id == run_id).values(started_at=BEGAN, ended_at=now)
        )
    return store


def _enter(
    store: Store,
    study_id: int,
    run_id: int,
    number: int,
    plan: Plan,
    now: datetime,
    space: Mapping[str, BaseDistribution],
) -> datetime:
    config = {"epochs": 10, "optimizer": "sgd", **plan.params}
    trial = store.start_trial(study_id, plan.params, space)
    trial_id = store.begin_trial(
        study_id,
        number,
        run_id,
        origin=plan.origin,
        config=config,
        config_hash=config_hash(config),
        seed=7,
        backbone=plan.params.get("backbone", "resnet18"),
        freeze_depth=plan.params.get("freeze_depth", 0),
        device="cpu",
        trained_parameters=5_130,
        total_parameters=11_181_642,
    )
    best, best_epoch = -1.0, None
    for epoch, val_acc in enumerate(plan.curve):
        is_best = val_acc > best
        if is_best:
            best, best_epoch = val_acc, epoch
        seconds = plan.epoch_s * (epoch + 1)
        store.add_epoch(trial_id, metrics(epoch, val_acc, is_best=is_best), seconds)
        trial.report(val_acc, epoch + 1)
    duration = plan.duration_s
    if duration is None:
        duration = 1.0 + plan.epoch_s * len(plan.curve)
    ended = now + timedelta(seconds=duration)
    if plan.state != "running":
        store.end_trial(
            trial_id,
            plan.state,
            reason=plan.reason,
            value=best if plan.curve else None,
            score=plan.score,
            best_epoch=best_epoch,
            epochs_done=len(plan.curve),
            duration_s=duration,
            checkpoint=f"frostline-runs/pets/trial-{number:04d}"
            if plan.state == "complete"
            else None,
        )
    times = {"started_at": now, "ended_at": None if plan.state == "running" else ended}
    with store._engine.begin() as connection:
        connection.execute(update(TrialTable).where(TrialTable.id == trial_id).values(**times))
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
            reason = "out of memory: even one picture at a time does not fit (8 GiB)"
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
    store: Store, name: str, number: int, classes: Sequence[str], n_wrong: int
) -> None:
    """Give a trial a confusion matrix and worst pictures, as a finished one has."""
    rng = np.random.default_rng(3)
    k = len(classes)
    matrix = np.diag(rng.integers(20, 36, k))
    for _ in range(n_wrong):
        i, j = rng.choice(k, 2, replace=False)
        matrix[i, j] += 1
    trial = store.trial(store.study(name).id, number)
    store.add_confusion(trial.id, "val", matrix.tolist())
    rows = []
    for rank in range(min(12, n_wrong)):
        i, j = rng.choice(k, 2, replace=False)
        size = (96, 72) if rank % 2 else (64, 96)
        path = f"val/{classes[i]}/IMG_{rank:04d}.jpg"
        row = PictureRow(
            "val", rank, path, classes[i], classes[j], 0.01 * rank, thumbnail(rank, size)
        )
        rows.append(row)
    store.add_pictures(trial.id, rows)
