"""The program as its user sees it, for tests that shall outlive a rewriting of the inside.

Whatever these tests read of a study (Optuna's public interface, `show --json`) stands in this
file, so that a renaming touches one place.
"""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import optuna

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ("train_loss", "val_loss", "val_acc", "val_macro_f1")
_CUT_SHORT = ("killed", "interrupted")


def study(home: Path, *args: str) -> str:
    """Run `python -m study` in this process and a folder; return what it printed.

    Args:
        home: Working folder: the database, checkpoints and reports lie here.
        args: The command and its flags; it must end with status 0.
    """
    out, err = io.StringIO(), io.StringIO()
    known, argv = sys.modules.pop("study.__main__", None), sys.argv
    sys.argv = ["study", *args]
    code: Any = 0
    try:
        with (
            contextlib.chdir(home),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            runpy.run_module("study", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = argv
        if known is not None:
            sys.modules["study.__main__"] = known
    assert code == 0, f"study {' '.join(args)} ended with {code}:\n{err.getvalue()}"
    return out.getvalue()


@contextlib.contextmanager
def without_figures() -> Iterator[None]:
    """Let reports draw nothing: their figures take most of the time of a small study."""
    # Not a Mock: pyplot, which Optuna's plots import, copies the function's name.
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


def settings(values: Mapping[str, object]) -> list[str]:
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
        number: Its number.
        state: `complete`, `pruned` or `failed`.
        params: Values of the searched settings.
        config: Its whole training configuration.
        value: Validation accuracy of its best epoch.
        reported: What was reported to Optuna, by epochs done.
        epochs: `FIGURES` of each epoch.
        checkpoint: Its folder, where one is kept.
        level: An ablation's level, or the trial that an audit trained.
    """

    number: int
    state: str
    params: dict[str, Any]
    config: dict[str, Any]
    value: float | None
    reported: dict[int, float]
    epochs: list[dict[str, float]]
    checkpoint: Path | None
    level: str | None

    @property
    def key(self) -> str:
        """Its settings as a text, to find its like in another study."""
        return json.dumps(self.params, sort_keys=True)


def read_runs(home: Path, name: str) -> list[Run]:
    """Read a study's trials that came to an end of their own, by number.

    The trials of a killed or stopped process are left out: their settings are run again.
    """
    known = optuna.load_study(study_name=name, storage=f"sqlite:///{home / 'studies.db'}").trials
    runs = []
    for row in shown(home, name)["trials"]:
        if row["reason"] in _CUT_SHORT or row["state"] in ("running", "interrupted"):
            continue
        trial = known[row["number"]]
        state = {"FAIL": "failed"}.get(trial.state.name, trial.state.name.lower())
        params = trial.user_attrs.get("levels", trial.params)  # of an ablation, of a search
        assert (state, params) == (row["state"], row["params"]), "two records, two truths"
        found = shown(home, name, "--trial", str(row["number"]))
        runs.append(
            Run(
                number=trial.number,
                state=state,
                params=params,
                config=found["config"],
                value=row["value"],
                reported=trial.intermediate_values,
                epochs=[{key: epoch[key] for key in FIGURES} for epoch in found["epochs"]],
                checkpoint=home / row["checkpoint"] if row["checkpoint"] else None,
                level=row["level"],
            )
        )
    return runs


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
    found = optuna.load_study(study_name=name, storage=f"sqlite:///{home / 'studies.db'}")
    return [t.number for t in found.trials if t.state is optuna.trial.TrialState.RUNNING]


def figures(runs: list[Run]) -> list[tuple[str, str, list[dict[str, float]]]]:
    """Return what must be equal where two studies trained the same, in the settings' order."""
    return sorted((run.key, run.state, run.epochs) for run in runs)


def effects(home: Path, *args: str) -> dict[str, dict[str, Any]]:
    """Run `ablate --json`; return each level's effect by `factor = level`."""
    last = json.loads(study(home, "ablate", *args, "--json").splitlines()[-1])
    return {f"{row['factor']} = {row['level']}": row for row in last["effects"]}
