"""Studies for the reports' tests, in the real store and of the real designs: nothing trained."""

import dataclasses
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from optuna.distributions import BaseDistribution, FloatDistribution
from PIL import Image

from core.config import TrainConfig
from core.metrics import EpochMetrics
from reports.ablation import Correct
from study.ablation.designs import DESIGNS, Cell, Design
from study.ablation.factors import Factor, Level
from study.config.study_config import AblationSection
from study.record.models import SPLITS_FILE, Misclassified, Test, Trial
from study.record.record import Record
from support import distributions_of

VERSIONS = {"python": "3.11.2", "torch": "2.15.0", "frostline": "0.1.0"}
DATA = {
    "source": "folder:pets", "classes": ["cat", "dog"], "n_train": 1360, "n_val": 400,
    "n_test": 400, "fingerprint": "9f2c" * 16, "warnings": [],
}  # fmt: skip
NOTHING: Mapping[str, Any] = {}
TRAIN = dataclasses.asdict(TrainConfig(backbone="resnet18", freeze_depth=0, seed=7))
SPACE: dict[str, Any] = {
    "backbone": {"choices": ["resnet18", "mobilenet_v3_large", "timm:tf_efficientnet_lite0"]},
    "freeze_depth": {"low": 0, "high": 5},
    "base_lr": {"low": 1e-4, "high": 3e-2, "log": True},
    "head_lr_mult": {"low": 1.0, "high": 100.0, "log": True},
    "weight_decay": {"low": 1e-6, "high": 1e-2, "log": True},
}


@dataclass
class Plan:
    """A trial to be entered: its settings, its accuracy after each epoch, and how it ended."""

    params: dict[str, Any]
    curve: Sequence[float]
    state: str = "complete"
    reason: str | None = None
    origin: str = "sampler"
    epoch_s: float = 4.0
    score: float | None = None
    config_hash: str = ""
    config: dict[str, Any] = field(default_factory=dict)


def _begin(
    path: Path, name: str, config: dict[str, Any], data: dict[str, Any], command: str
) -> tuple[Record, int, int]:
    store = Record(str(path), create=True)
    study_id = store.create_study(name, config, DATA | data, VERSIONS)
    run_id = store.begin_run(study_id, command=command, device="cpu", versions=VERSIONS)
    return store, study_id, run_id


def enter(
    store: Record, study_id: int, run_id: int, plan: Plan, space: Mapping[str, BaseDistribution]
) -> Trial:
    """Enter a trial, as a run would have."""
    trial = store.start_trial(study_id, plan.params, space)
    row = Trial(
        study_id=study_id, number=trial.number, run_id=run_id, origin=plan.origin,
        config=TRAIN | plan.params | plan.config,
        config_hash=plan.config_hash, device="cpu",
        trained_parameters=5_130, total_parameters=11_181_642,
    )  # fmt: skip
    store.save(row)
    for epoch, val_acc in enumerate(plan.curve, start=1):
        is_best = val_acc > max(plan.curve[: epoch - 1], default=-1)
        losses, rates, times = (1.1 - val_acc, 1.2 - val_acc), (0.01, 0.1), (240.0, 0.4, 3.0, 0.5)
        accuracies = (val_acc, max(val_acc - 0.01, 0.0), max(val_acc - 0.02, 0.0))
        figures = EpochMetrics(epoch, *losses, *accuracies, *rates, *times, 2**30, 32, is_best)
        store.add_epoch(row, figures, plan.epoch_s * epoch)
        trial.report(val_acc, epoch)
    if plan.state != "running":
        row.reason, row.duration_s = plan.reason, 1.0 + plan.epoch_s * len(plan.curve)
        if plan.score is not None:
            row.score, row.value = plan.score, row.value if plan.curve else plan.score
        store.end_trial(row, plan.state)
    return row


def make_study(
    path: Path,
    plans: Sequence[Plan],
    *,
    name: str = "pets",
    space: dict[str, Any] | None = None,
    **data: Any,
) -> Record:
    """Enter the planned trials one after the other, as a run would have; `data` as in `DATA`."""
    places = {"storage": "studies.db", "output": "frostline-runs"}
    own = {"name": name, "trials": len(plans), "seed": 7} | places
    config = {"study": own, "space": SPACE if space is None else space}
    command = f"python -m study run --data pets --name {name}"
    store, study_id, run_id = _begin(path, name, config, data, command)
    dimensions = distributions_of(*(plan.params for plan in plans))
    for name in set(SPACE) & set(dimensions):
        if SPACE[name].get("log"):
            dimensions[name] = FloatDistribution(**SPACE[name])
    for plan in plans:
        enter(store, study_id, run_id, plan, dimensions)
    store.end_run(run_id, "trials")
    return store


def searched_plans() -> list[Plan]:
    """Plan a search like a real one: recipes first, a quarter pruned, a few failures."""
    rng = np.random.default_rng(2)
    plans: list[Plan] = []
    at_3: list[float] = []
    for number in range(40):
        params = {
            "backbone": SPACE["backbone"]["choices"][number % 3],
            "freeze_depth": int(rng.integers(0, 6)),
            "base_lr": float(10 ** rng.uniform(-4, np.log10(3e-2))),
            "head_lr_mult": float(10 ** rng.uniform(0, 2)),
            "weight_decay": float(10 ** rng.uniform(-6, -2)),
        }
        if number < 3:
            params |= {"freeze_depth": 5, "base_lr": 0.01, "head_lr_mult": 10.0}
        origin = f"recipe:linear-probe-{params['backbone']}" if number < 3 else "sampler"
        off = 0.09 * (np.log10(params["base_lr"]) + 2.4) ** 2
        final = 0.95 - 0.01 * (number % 3) - 0.012 * (params["freeze_depth"] - 2) ** 2 - off
        final += rng.normal(0, 0.01)
        rise = final - (final - 0.35) * np.exp(-0.55 * np.arange(1, 11))
        points = np.clip(rise + rng.normal(0, 0.006, 10), 0, 1).tolist()
        ended: tuple[list[float], str, str | None] = points, "complete", None
        if number % 19 == 11:
            ended = points[:1], "failed", "diverged: the loss is nan at epoch 1. Lower base_lr."
        elif number == 17:
            ended = [], "failed", "out of memory: even one image at a time does not fit (8 GiB)"
        elif number > 5 and points[2] < np.quantile(at_3, 0.4):
            ended = points[:3], "pruned", "pruned after epoch 3"
        plans.append(Plan(params, *ended, origin, 6.0 - 2 * (number % 3)))
        at_3.append(points[2])
    return plans


def add_results(
    store: Record, name: str, number: int, classes: Sequence[str], n_wrong: int
) -> None:
    """Give a trial predictions and worst images, as a finished one has."""
    rng = np.random.default_rng(3)
    right = np.repeat(np.arange(len(classes)), 30)
    wrong = [rng.choice(len(classes), 2, replace=False) for _ in range(n_wrong)]
    labels, predicted = np.concatenate([np.stack([right, right], axis=1), wrong]).T.tolist()
    trial = store.trial(store.study(name).id, number)
    store.add_predictions(trial.id, "val", labels, predicted)
    photo = io.BytesIO()
    Image.new("RGB", (96, 72)).save(photo, format="JPEG")
    rows = [
        Misclassified(
            trial_id=trial.id, split="val", rank=rank, path=f"val/{classes[i]}/IMG_{rank:04d}.jpg",
            label=classes[i], predicted=classes[j], probability=0.01 * rank,
            thumbnail=photo.getvalue(),
        )
        for rank, (i, j) in enumerate(wrong[:12])
    ]  # fmt: skip
    store.add_misclassified(trial.id, rows)


def add_test(store: Record, name: str, number: int, accuracy: float, val_acc: float) -> None:
    """Enter a reading of the test split."""
    test = Test(
        study_id=store.study(name).id, trial_number=number, n=400, n_correct=round(accuracy * 400),
        val_acc=val_acc, balanced_acc=accuracy, macro_f1=accuracy, confusion=[[1]],
        command=f"python -m study test {name}",
    )  # fmt: skip
    store.save(test)


Score = Correct | float | str | None
"""What a run classified correctly, or its accuracy; why it failed; None where it was not run."""
Simulator = Callable[[Cell, int], Score]
"""Says how a cell's replicate went."""


def design_of(kind: str, *switches: str, **levels: Sequence[str]) -> Design:
    """Make a design: switches are off in the baseline; of `levels` the first is the baseline's."""
    factors = []
    for name, (own, *labels) in (dict.fromkeys(switches, ("off", "on")) | levels).items():
        others = [Level(label, {f"{name}_key": n}) for n, label in enumerate(labels)]
        if name == "train_fraction":
            others = [Level(label, {name: float(label)}) for label in labels]
        factors.append(Factor(name, own, tuple(others)))
    return DESIGNS[kind](factors)


def follow(design: Design, score: Simulator, n: int) -> Design:
    """Take all steps of a path whose runs go as `score` says."""

    def done(cell: Cell) -> dict[int, float | None]:
        return {r: v if isinstance(v := score(cell, r), float) else None for r in range(n)}

    assert list(design.missing([n], done, lambda: set())) == []
    return design


def right(accuracy: float, n: int = 400) -> Correct:
    """Say which images are classified correctly: the same ones are easy for every run."""
    easy_first = np.random.default_rng(n).permutation(n)
    return (easy_first < round(accuracy * n)).astype(np.float64)


def analysis(order: int, *replicates: int, split: str = "val") -> dict[str, Any]:
    """Write an analysis as an ablation records it."""
    return {"split": split, "order": order, "replicates": list(replicates), "n_runs": order}


def spec_of(
    design: Design,
    *analyses: dict[str, Any],
    n_folds: int = 1,
    margin: float = 1.0,
    origin: str = "trial 4 of study pets, its best",
    is_solved: bool = False,
) -> dict[str, Any]:
    """Write a design as an ablation does; the last analysis of the validation split is planned."""
    looks = [each["replicates"] for each in analyses if each["split"] == "val"][-1]
    settings = AblationSection(replicates=looks[0], margin=margin, design=design.kind)
    best = {"epochs": 60, "value": 0.8, "n_val": 400, "bias": 0.02}
    return design.to_record() | {
        "origin": origin,
        "chosen": best if origin.startswith("trial") else {},
        "settings": dataclasses.asdict(settings),
        "looks": looks,
        "n_folds": n_folds,
        "first_seed": 7,
        "solved": [is_solved] * len(design.cells),
        "runs": [[f"{cell.label} {r}" for r in range(looks[-1])] for cell in design.cells],
        "analyses": list(analyses),
    }


def make_ablation(
    path: Path,
    design: Design,
    score: Simulator,
    *analyses: dict[str, Any],
    name: str = "pets-ablation",
    test: Callable[[Cell, int], float | None] = lambda cell, replicate: None,
    command: str = "python -m study ablate pets",
    train: Mapping[str, Any] = NOTHING,
    data: Mapping[str, Any] = NOTHING,
    **spec: Any,
) -> Record:
    """Enter a simulated ablation, replicate by replicate, as a run would have; add to a database.

    `analyses` are one of 5 replicates if there is none; `test` gives the test accuracy of a run,
    None where it was not tested; `data` is as in `DATA`, `spec` as `spec_of` takes it.
    """
    own = TrainConfig(backbone="resnet18", weights="imagenet:IMAGENET1K_V1", epochs=8)
    config = {
        "study": {"output": str(path.parent / "runs")},
        "train": dataclasses.asdict(own) | dict(train),
        "data": {"split_seed": 0},
        "space": {},
    }
    data = DATA | dict(data)
    store, study_id, run_id = _begin(path, name, config, data, command)
    made = spec_of(design, *(analyses or [analysis(1, 5)]), **spec)
    cells, n_folds = list(enumerate(design.cells)), made["n_folds"]
    n = data["n_val"] if n_folds == 1 else (data["n_train"] + data["n_val"]) // n_folds
    for replicate, (k, cell) in itertools.product(range(made["looks"][-1]), cells):
        if (found := score(cell, replicate)) is None:
            continue
        plan = Plan({}, [], config_hash=made["runs"][k][replicate], config=dict(train))
        if isinstance(found, str):
            plan.state, plan.reason = "failed", found
            enter(store, study_id, run_id, plan, {})
            continue
        correct = right(found, n) if isinstance(found, float) else found
        plan.score = float(correct.mean())
        row = enter(store, study_id, run_id, plan, {})
        _predict(store, row, "val", correct)
        if (tested := test(cell, replicate)) is not None:
            add_test(store, name, row.number, tested, plan.score)
            _predict(store, row, "test", right(tested))
    store.end_run(run_id, "complete")
    store.put_design(study_id, f"key of {name}", design.kind, made, command)
    folder = path.parent / "runs" / name
    folder.mkdir(parents=True)
    _splits(data, n_folds, made["looks"][-1]).to_csv(folder / SPLITS_FILE, index=False)
    return store


def _predict(store: Record, row: Trial, split: str, correct: Correct) -> None:
    labels = np.arange(len(correct)) % 2
    predicted = np.where(correct, labels, 1 - labels)
    store.add_predictions(row.id, split, labels.tolist(), predicted.tolist())


def _splits(data: Mapping[str, Any], n_folds: int, replicates: int) -> pd.DataFrame:
    """Name the images, their classes taking turns in every split and fold."""
    frame = pd.DataFrame({"split": np.repeat(["train", "val"], [data["n_train"], data["n_val"]])})
    number = np.arange(len(frame))
    classes = np.take(data["classes"], number % 2)
    frame["path"] = [f"{name}/{k}.jpg" for name, k in zip(classes, number, strict=True)]
    frame["class"] = classes
    for seed in range(replicates // n_folds if n_folds > 1 else 0):
        frame[f"5-folds-{seed}"] = (number // 2 + seed) % n_folds
    return frame
