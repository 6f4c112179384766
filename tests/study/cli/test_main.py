import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from command_line import without_figures
from core.config import TrainConfig
from core.metrics import EpochMetrics
from study.cli.main import DEFAULT_STORAGE, cli, main
from study.config.load import load_config
from study.config.study_config import StudyConfig
from study.record.models import Trial
from study.record.record import Record
from support import distributions_of, make_folder

ROOT = Path(__file__).parents[3]
COMMANDS = (
    *("run", "resume", "ablate", "audit", "list", "show", "delete", "test", "report"),
    *("init", "backbones"),
)
HEAVY = (
    *("torch", "torchvision", "timm", "optuna", "sqlalchemy", "pandas", "scipy", "matplotlib"),
    *("sklearn", "pydantic", "numpy", "rich"),
)


class Terminal(io.StringIO):
    """A standard input at which somebody types."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recorded(here: Path) -> Path:
    """A working folder with one study of two trials; the second one's checkpoint is kept."""
    with Record(DEFAULT_STORAGE, create=True) as store:
        data = {"source": "digits", "classes": ["0"], "n_train": 8, "n_val": 4, "n_test": 0}
        study_id = store.create_study("ants", StudyConfig().to_record(), data, {})
        run_id = store.begin_run(study_id, command="c", device="cpu", versions={})
        for number, value in enumerate((0.5, 0.75)):
            params = {"base_lr": 0.1 * (number + 1)}
            store.start_trial(study_id, params, distributions_of(params))
            trial = Trial(
                study_id=study_id,
                number=number,
                run_id=run_id,
                origin="sampler",
                config=dataclasses.asdict(TrainConfig(**params, epochs=1)),
                config_hash=str(number),
                device="cpu",
            )
            store.begin_trial(trial)
            figures = (value, value, value, 0.1, 1.0, 9.0, 0.0, 0.0, 0.0, 1, 32, True)
            store.add_epoch(trial, EpochMetrics(0, 0.5, 0.4, *figures), 1.0)
            folder = here / f"trial-{number}"
            folder.mkdir()
            trial.duration_s, trial.checkpoint = 1.0, str(folder) if number else None
            store.end_trial(trial, "complete")
        store.end_run(run_id, "trials")
    return here


def answered(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(args) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run a command that must be refused with status 2; return its message."""
    assert main(args) == 2
    message = capsys.readouterr().err
    assert "error: " in message
    return message


@pytest.mark.parametrize(("given", "policy"), [("", "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_are_passive_unless_the_user_says_otherwise(
    given: str, policy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", given)
    if not given:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    answered(capsys, "--help")
    assert os.environ["OMP_WAIT_POLICY"] == policy


def test_help_of_every_command_names_its_options_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from study.cli.main import cli, main\n"
        "for words in ([], *([name] for name in cli.commands)):\n"
        "    assert main([*words, '--help']) == 0\n"
        f"print(sorted(set({HEAVY}) & set(sys.modules)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert tuple(cli.commands) == COMMANDS
    assert shown.splitlines()[-1] == "[]"
    assert all(f"python -m study {name} " in shown for name in COMMANDS)
    documented = (
        "--data --config --name --trials --timeout --set --cache --dry-run "
        "--allow-changes --take-over --quiet --json --storage --from --design --factor "
        "--replicates --resplit --adaptive --sample --trial --levels --out --beside "
        "--yes --force"
    )
    assert set(documented.split()) <= set(shown.split())


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ([], ["Missing command", "python -m study --help"]),
        (["rum"], ["'rum'", "'run'"]),
        (["run", "--trails", "3"], ["'--trails'", "'--trials'", "python -m study run --help"]),
        (["run", "--trials", "many"], ["--trials", "'many'"]),
        (["run", "photos"], ["photos"]),
        (["show"], ["STUDY"]),
        (["audit", "ants", "--sample", "-1"], ["--sample", "-1"]),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    args: list[str], parts: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, *args)
    assert message.count("\n") == 1
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["run", "--config", "no.toml"], ["no.toml"]),
        (["run", "--set", "epoch=3"], ["--set: epoch", "epochs?"]),
        (["run", "--trials", "0"], ["--trials: study.trials"]),
        (["run", "--timeout", "soon"], ["--timeout: study.timeout"]),
        (["run", "--name", "a/b"], ["--name: study.name"]),
        (["run", "--data", "nowhere"], ["data.source", "nowhere"]),
        (["run", "--data", "nowhere", "--dry-run"], ["data.source", "nowhere"]),
        (["run", "--data", ""], ["--data: data.source"]),
        (["run", "--set", "backbone=resnet19"], ["train.backbone", "resnet18"]),
        (["list"], ["no database studies.db"]),
        (["resume", "ants"], ["no database studies.db"]),
        (["show", "ants", "--storage", "other.db"], ["no database other.db"]),
        (["list", "--storage", "postgresql+no://me:hunter2@db/x"], ["postgresql+no://me:***@db"]),
        (["backbones", "resnte18"], ["Near: "]),
    ],
)
def test_a_users_mistake_names_its_key_and_changes_nothing(
    args: list[str], parts: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, *args)
    assert all(part in message for part in parts)
    assert not list(here.iterdir())


def test_an_unknown_study_or_trial_is_refused(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "show", "ant")
    assert "ant" in message and "ants" in message
    assert "7" in refused(capsys, "show", "ants", "--trial", "7")


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (ValueError, None)])
def test_ctrl_c_is_status_130_and_a_bug_keeps_its_traceback(
    error: type[BaseException],
    status: int | None,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error("from inside")

    monkeypatch.setattr("study.config.load.load_config", broken)
    if status is None:
        with pytest.raises(error, match="from inside"):
            main(["init"])
    else:
        assert main(["init"]) == status


@pytest.mark.parametrize("command", ["backbones", "--help"])
def test_a_closed_pipe_is_no_error(command: str) -> None:
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m study {command} | true"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_demo_points_to_a_study_file_in_the_folder(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("study.toml").touch()
    assert main(["run", "--trials", "0"]) == 2
    assert "--config study.toml" in capsys.readouterr().err
    assert main(["run", "--data", "digits", "--trials", "0"]) == 2
    assert "--config" not in capsys.readouterr().err


def test_init_writes_a_study_that_loads(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "run --config study.toml" in answered(capsys, "init", "--data", "photos")
    config = load_config(Path("study.toml"))
    assert config.study.storage == DEFAULT_STORAGE
    assert (config.data.source, config.study.name) == ("folder:photos", "photos")
    assert "--force" in refused(capsys, "init")


def test_backbones_are_listed_by_a_part_of_their_name(capsys: pytest.CaptureFixture[str]) -> None:
    names = answered(capsys, "backbones", "resnet1").splitlines()
    assert {"resnet101", "timm:resnet18"} <= set(names)
    assert all("resnet1" in name for name in names)
    assert json.loads(answered(capsys, "backbones", "resnet1", "--json")) == names
    lines = answered(capsys, "backbones", "squeezenet1_1").splitlines()
    assert [line.split()[0] for line in lines[2:8]] == list("012345")


def test_list_and_show_read_the_record(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answered(capsys, "list").splitlines()[1].split()[:4] == ["ants", "75.0", "%", "1"]
    assert "digits: 8 train, 4 val, 0 test, 1 classes" in answered(capsys, "show", "ants")
    assert "75.0 % (validation, epoch 1)" in answered(capsys, "show", "ants", "--trial", "1")


def test_json_has_the_documented_fields(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(*args: str) -> Any:
        return json.loads(answered(capsys, *args, "--json"))

    (summary,) = read("list")
    assert (summary["name"], summary["best_value"], summary["counts"]["complete"]) == (
        "ants",
        0.75,
        2,
    )
    study = read("show", "ants")
    assert set(study) == {
        *("id", "name", "created_at", "config", "data", "versions", "trials", "tests")
    }
    trial = read("show", "ants", "--trial", "1")
    assert trial == {**study["trials"][1], "epochs": trial["epochs"]}
    assert set(trial) == {
        *("id", "study_id", "number", "run_id", "state", "reason", "origin", "params", "config"),
        *("config_hash", "device", "started_at", "ended_at"),
        *("duration_s", "epochs_done", "value", "best_epoch", "score", "trained_parameters"),
        *("total_parameters", "without_effect", "checkpoint", "factor", "level", "replicate"),
        "epochs",
    }
    assert trial["epochs"][0]["val_acc"] == 0.75


def test_a_report_that_cannot_be_written_names_its_folder(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "studies.db" in refused(capsys, "report", "ants", "--out", "studies.db/report")


def test_delete_without_a_terminal_needs_yes(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))
    assert "--yes" in refused(capsys, "delete", "ants")
    assert (recorded / "trial-1").is_dir()


@pytest.mark.parametrize(("answer", "is_gone"), [("n", False), ("", False), ("yes", True)])
def test_delete_does_what_is_answered(
    answer: str, is_gone: bool, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(f"{answer}\n"))
    assert main(["delete", "ants"]) == 0
    with Record(DEFAULT_STORAGE) as store:
        assert (store.find_study("ants") is None) == is_gone
    assert (not optuna.get_all_study_names(f"sqlite:///{DEFAULT_STORAGE}")) == is_gone
    assert (recorded / "trial-0").is_dir()  # no checkpoint of the record
    assert (recorded / "trial-1").is_dir() != is_gone


@pytest.fixture
def photos(here: Path) -> list[str]:
    """The options of a search of a tenth of a second per trial."""
    make_folder(here / "photos", {"red": 12, "blue": 12}, side=40)
    settings = ("backbone=resnet18", "weights=none", "image_size=32", "epochs=1", "batch_size=4")
    texts = [*(f"train.{text}" for text in settings), "data.cache_dir=cache"]
    return ["--data", "photos", *(word for text in texts for word in ("--set", text))]


@pytest.fixture
def no_figures() -> Iterator[None]:
    with without_figures():
        yield


def test_a_dry_run_prints_the_cost_and_keeps_nothing(
    photos: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", *photos, "--dry-run", "--quiet"]
    assert "20 trials on cpu" in answered(capsys, *words)
    found = json.loads(answered(capsys, *words, "--json").splitlines()[-1])
    assert found["config"]["train"]["image_size"] == 32
    assert found["estimate"]["n_trials"] == 20
    assert not (here / DEFAULT_STORAGE).exists()
    assert "train.batch_size" in refused(capsys, *words, "--set", "train.batch_size=999")


def test_run_resume_and_test_report_what_they_did(
    photos: list[str], no_figures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", *photos, "--set", "search.recipes=false", "--quiet", "--trials", "1"]
    shown = answered(capsys, *run)
    report = Path("frostline-runs/photos/report/report.html")
    assert f"Report: {report}" in shown
    assert report.is_file()
    assert "1 of 1 trials" in shown
    assert shown.index("-m study show photos") < shown.index("-m study test photos")
    *events, last = map(json.loads, answered(capsys, "resume", "photos", "--json").splitlines())
    assert all("event" in event for event in events)
    assert set(last) == {"event", "study", "stopped_because", "counts", "best", "report"}
    assert last["counts"]["complete"] == 1
    first = json.loads(answered(capsys, "test", "photos", "--json").splitlines()[-1])
    assert {"trial_number", "n", "accuracy", "low", "high", "val_acc", "confusion"} <= set(first)
    assert "From the record" in answered(capsys, "test", "photos")


def test_a_search_without_a_complete_trial_is_status_1(
    photos: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diverging = ["--set", "search.recipes=false", "--set", "train.base_lr=1e30"]
    frozen = ["--set", "train.freeze_depth=0", "--set", "train.warmup_epochs=0"]
    assert main(["run", *photos, *diverging, *frozen, "--quiet", "--trials", "1"]) == 1
    shown = capsys.readouterr().out
    assert "No trial is complete" in shown
    assert "-m study test" not in shown
