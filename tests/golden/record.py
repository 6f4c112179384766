"""Figures of five small studies: `python tests/golden/record.py [STUDY ...]` records them.

README.md says when a recorded file may change; test_golden.py says which figures did.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from command_line import (  # noqa: E402 (found by the path above)
    Run,
    best,
    read_runs,
    settings,
    study,
    without_figures,
)
from support import classic_settings  # noqa: E402 (the same)

HEAD_ONLY = 5
"""The freeze level at which only the head is trained."""
SMALL: dict[str, object] = {
    "data.limit": 64,
    "data.val_fraction": 0.05,
    "data.cache_dir": "cache",
    "train.image_size": 32,
    "train.batch_size": 16,
    "train.epochs": 3,
    "train.flip": 0,
    "train.crop_scale": 0.7,
    "train.device": "cpu",
    "train.head_solver": "sgd",
    "train.workers": 0,
}
VIT: dict[str, object] = {
    "train.backbone": "timm:test_vit",
    "train.weights": "none",
    "train.optimizer": "adamw",
    "train.head_lr_mult": 1,
}
RATES = "base_lr = {low = 1e-5, high = 1e-2, log = true}\n"
Figures = dict[str, Any]


STUDIES: dict[str, tuple[str, int, dict[str, object]]] = {
    "tpe-hyperband": (
        "freeze_depth = {low = 0, high = 5}\n"
        "base_lr = {low = 1e-4, high = 1e-2, log = true}\n"
        "head_lr_mult = {low = 1.0, high = 30.0, log = true}\n",
        7,
        {"train.backbone": "timm:tf_efficientnet_lite0"},
    ),
    "tpe-median": (
        "freeze_depth = {low = 0, high = 4}\nweight_decay = [0, 1e-2]\n" + RATES,
        9,
        VIT | {"search.pruner": "median", "train.epochs": 4},
    ),
    "grid": (
        "freeze_depth = {low = 0, high = 5}\n",
        6,
        VIT | {"train.base_lr": 1e-3, "search.sampler": "grid", "search.pruner": "none"},
    ),
    "ofat": ("", 0, VIT | {"train.freeze_depth": 3, "train.base_lr": 1e-3}),
    "audit": (
        "freeze_depth = [0, 2, 4]\n" + RATES,
        6,
        VIT | {"search.sampler": "random", "search.pruner": "halving", "search.recipes": False},
    ),
}
"""The space, the number of trials and the settings of each study."""


def _train(name: str, home: Path) -> tuple[str, ...]:
    """Run study `s` in an empty folder; return the studies to read."""
    space, trials, more = STUDIES[name]
    (home / "study.toml").write_text(f"[space]\n{space}")
    given = settings(classic_settings(space) | SMALL | more)
    if name == "ofat":
        factors = ["--factor", "freeze_depth=0,5", "--factor", "augment=none"]
        study(home, "ablate", "study.toml", "--name", "s", "--replicates", "2", *factors, *given)
        return ("s",)
    study(home, "run", "--config", "study.toml", "--name", "s", "--trials", str(trials), *given)
    if name == "audit":
        study(home, "audit", "s", "--sample", "2")
    return ("s", "s-audit") if name == "audit" else ("s",)


def read_figures(name: str, home: Path, studies: tuple[str, ...]) -> dict[str, Figures]:
    """Read what studies gave, by file name: levels 0 to 4, and the head alone.

    The best trial of a search is put with the heads where there are any, as they may win.
    """
    bodies: Figures = {}
    heads: Figures = {}
    found: Figures = {}
    for known in studies:
        runs = read_runs(home, known)
        for place, run in enumerate(runs):
            is_head = run.config["freeze_depth"] == HEAD_ONLY
            (heads if is_head else bodies)[f"{known} trial {place}"] = _row(run)
        if not any(run.level for run in runs):  # of an ablation or audit, none is the best
            number, value = best(home, known)
            found[f"{known} best"] = [[run.number for run in runs].index(number), value]
    if not heads:
        return {f"{name}.json": bodies | found}
    return {f"{name}.json": bodies, f"{name}.heads.json": heads | found}


def _row(run: Run) -> Figures:
    return {
        "params": run.params,
        "state": run.state,
        "value": run.value,
        "val_acc": [epoch["val_acc"] for epoch in run.epochs],
        "val_loss": [epoch["val_loss"] for epoch in run.epochs],
    }


def measure(name: str) -> dict[str, Figures]:
    """Run a study in a new folder and read its figures."""
    with tempfile.TemporaryDirectory() as folder, without_figures():
        home = Path(folder)
        return read_figures(name, home, _train(name, home))


def recorded(name: str) -> dict[str, Figures]:
    """Return the recorded figures of a study by file name."""
    return {p.name: json.loads(p.read_text()) for p in sorted(HERE.glob(f"{name}.*json"))}


def flat(figures: Any, at: str = "") -> dict[str, Any]:
    """Return each figure by its place."""
    if not isinstance(figures, dict | list):
        return {at: figures}
    pairs = figures.items() if isinstance(figures, dict) else enumerate(figures)
    return {k: v for key, own in pairs for k, v in flat(own, f"{at}, {key}").items()}


def main() -> None:
    """Record the studies that are named, or all."""
    for name in sys.argv[1:] or STUDIES:
        for old in recorded(name):
            (HERE / old).unlink()
        for file, figures in measure(name).items():
            (HERE / file).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
            print(f"wrote {file}", flush=True)


if __name__ == "__main__":
    main()
