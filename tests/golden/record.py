"""Figures of five small studies: `python tests/golden/record.py [STUDY ...]` records them.

README.md says when a recorded file may change; test_golden.py says which figures did.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from command_line import (  # noqa: E402 (found by the path above)
    PRETRAINED,
    VIT,
    ablation,
    best,
    read_runs,
    search,
    study,
    without_figures,
)

SMALL: dict[str, object] = {
    "data.limit": 64,
    "train.epochs": 3,
    "train.flip": 0,
    "train.crop_scale": 0.7,
    "train.head_solver": "sgd",
    "train.workers": 0,
}
RATES = "base_lr = {low = 1e-5, high = 1e-2, log = true}\n"
STUDIES: dict[str, tuple[str, int, dict[str, object]]] = {
    "tpe-hyperband": (
        "freeze_depth = {low = 0, high = 5}\n"
        "base_lr = {low = 1e-4, high = 1e-2, log = true}\n"
        "head_lr_mult = {low = 1.0, high = 30.0, log = true}\n",
        7,
        PRETRAINED,
    ),
    "tpe-median": (
        "freeze_depth = {low = 0, high = 4}\nweight_decay = [0, 1e-2]\n" + RATES,
        9,
        VIT | {"search.pruner": "median", "train.epochs": 4},
    ),
    "grid": (
        "freeze_depth = {low = 0, high = 5}\n",
        6,
        VIT | {"search.sampler": "grid", "search.pruner": "none"},
    ),
    "ofat": ("", 0, VIT | {"train.freeze_depth": 3}),
    "audit": (
        "freeze_depth = [0, 2, 4]\n" + RATES,
        6,
        VIT | {"search.sampler": "random", "search.pruner": "halving", "search.recipes": False},
    ),
}
"""The space, the number of trials and the settings of each study."""


def measure(name: str) -> dict[str, Any]:
    """Run a study in a new folder; return what its trials gave, and which is the best."""
    space, trials, more = STUDIES[name]
    with tempfile.TemporaryDirectory() as folder, without_figures():
        home = Path(folder)
        if name == "ofat":
            command = ablation(home, SMALL | more, "freeze_depth=0,5", "augment=none")
            study(home, *command, "--name", "s", "--replicates", "2")
            return _figures(home, "s")
        study(home, *search(home, "s", space, trials, SMALL | more))
        found = _figures(home, "s") | {"s best": [*best(home, "s")]}
        if name == "audit":
            study(home, "audit", "s", "--sample", "2")
            found |= _figures(home, "s-audit")
        return found


def _figures(home: Path, name: str) -> dict[str, Any]:
    return {
        f"{name} trial {place}": {
            "params": run.params,
            "state": run.state,
            "value": run.value,
            "val_acc": [epoch["val_acc"] for epoch in run.epochs],
            "val_loss": [epoch["val_loss"] for epoch in run.epochs],
        }
        for place, run in enumerate(read_runs(home, name))
    }


if __name__ == "__main__":
    for study_name in sys.argv[1:] or STUDIES:
        file = HERE / f"{study_name}.json"
        file.write_text(json.dumps(measure(study_name), indent=1) + "\n", encoding="utf-8")
        print(f"wrote {file}", flush=True)
