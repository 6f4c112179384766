"""The program as its user sees it, for tests that shall outlive a rewriting of the inside.

Whatever these tests read of a study (Optuna's public interface, `show --json`) stands in this
file, so that a renaming touches one place.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import optuna

from study.cli.main import main
from support import ROOT, classic_settings

CUT_SHORT = {"killed", "interrupted", "running"}
FIGURES = ("train_loss", "val_loss", "val_acc", "val_macro_f1")
DIGITS: dict[str, object] = {
    "data.limit": 60,
    "data.val_fraction": 0.05,
    "data.cache_dir": "cache",
    "train.image_size": 32,
    "train.batch_size": 16,
    "train.epochs": 2,
    "train.device": "cpu",
}
PRETRAINED: dict[str, object] = {"train.backbone": "timm:tf_efficientnet_lite0"}
VIT: dict[str, object] = {
    "train.backbone": "timm:test_vit",
    "train.weights": "none",
    "train.optimizer": "adamw",
    "train.base_lr": 1e-3,
    "train.head_lr_mult": 1,
}


def study(home: Path, *args: str) -> str:
    """Run `python -m study` in this process and a folder, with success; return what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(home), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(args)
    assert code == 0, f"study {' '.join(args)} ended with {code}:\n{err.getvalue()}"
    return out.getvalue()


def search(
    home: Path, name: str, space: str, trials: int, more: Mapping[str, object]
) -> list[str]:
    """Write a classic search; return its command, on digits where no other images are named."""
    (home / f"{name}.toml").write_text(f"[space]\n{space}")
    searched = {f"train.{key}" for key in tomllib.loads(space)}
    own = classic_settings() | DIGITS | more
    given = _settings({key: value for key, value in own.items() if key not in searched})
    return ["run", "--config", f"{name}.toml", "--name", name, "--trials", str(trials), *given]


def ablation(home: Path, more: Mapping[str, object], *factors: str) -> list[str]:
    """Write a file that searches nothing; return the command that varies factors around it."""
    (home / "baseline.toml").write_text("[space]\n")
    varied = [word for factor in factors for word in ("--factor", factor)]
    return ["ablate", "baseline.toml", *varied, *_settings(classic_settings() | DIGITS | more)]


@contextlib.contextmanager
def without_figures() -> Iterator[None]:
    """Let an ablation's report save no figures: they take most of the time of a small one."""
    with mock.patch("matplotlib.figure.Figure.savefig", lambda *how, **more: None):
        yield


def start(home: Path, *args: str) -> subprocess.Popen[str]:
    """Begin `python -m study` in a process of its own; its output is to be read."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "study", *args],
        cwd=home,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_after_epoch(process: subprocess.Popen[str], trial: int) -> None:
    """Kill a process that runs with --json at a trial's first epoch (kill -9)."""
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "epoch" and event["trial"] == trial:
            break
    process.kill()
    process.communicate()


def _settings(values: Mapping[str, object]) -> list[str]:
    """Write keys and values as --set flags."""
    return [
        word
        for key, value in values.items()
        for word in ("--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    ]


@dataclass(frozen=True, slots=True)
class Run:
    """A trial as the user sees it.

    Attributes:
        reported: What was reported to Optuna, by epochs done.
    """

    number: int
    state: str
    params: dict[str, Any]
    config: dict[str, Any]
    value: float | None
    reported: dict[int, float]
    epochs: list[dict[str, float]]
    checkpoint: Path | None


def read_runs(home: Path, name: str) -> list[Run]:
    """Read a study's trials that came to an end of their own, by number.

    The trials of a killed or stopped process are left out: their settings are run again.
    """
    known = _optuna_trials(home, name)
    runs = []
    for row in shown(home, name)["trials"]:
        if {row["reason"], row["state"]} & CUT_SHORT:
            continue
        found = shown(home, name, "--trial", str(row["number"]))
        runs.append(
            Run(
                **{key: row[key] for key in ("number", "state", "params", "value")},
                config=found["config"],
                reported=known[row["number"]].intermediate_values,
                epochs=[{key: epoch[key] for key in FIGURES} for epoch in found["epochs"]],
                checkpoint=home / row["checkpoint"] if row["checkpoint"] else None,
            )
        )
    return runs


def _optuna_trials(home: Path, name: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{home / 'studies.db'}").trials


def shown(home: Path, name: str, *args: str) -> dict[str, Any]:
    """Return what `show --json` prints of a study, or of a trial of it."""
    found: dict[str, Any] = json.loads(study(home, "show", name, "--json", *args))
    return found


def best(home: Path, name: str) -> tuple[int, float]:
    """Return a study's best trial and its accuracy."""
    (row,) = [r for r in json.loads(study(home, "list", "--json")) if r["name"] == name]
    return row["best_number"], row["best_value"]


def open_trials(home: Path, name: str) -> list[int]:
    """Return the numbers of the trials that Optuna holds for running."""
    running = optuna.trial.TrialState.RUNNING
    return [trial.number for trial in _optuna_trials(home, name) if trial.state is running]


def figures(runs: list[Run]) -> list[tuple[str, str, list[dict[str, float]]]]:
    """Return what must be equal where two studies trained the same, in the settings' order."""
    return sorted((json.dumps(r.params, sort_keys=True), r.state, r.epochs) for r in runs)


def effects(home: Path, *command: str) -> dict[str, dict[str, Any]]:
    """Run an ablation; return each level's effect by `factor = level`."""
    last = json.loads(study(home, *command, "--json").splitlines()[-1])
    return {f"{row['factor']} = {row['level']}": row for row in last["effects"]}
