import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import optuna
import pytest

from study.cli.dashboard import publish
from study.cli.main import DEFAULT_STORAGE, cli, main
from study.config.load import load_config
from study.record.record import Record
from support import ROOT, make_folder

COMMANDS = (
    *("run", "resume", "ablate", "audit", "list", "show", "status", "stop", "delete", "test"),
    *("report", "archive", "dashboard", "init", "backbones"),
)
HEAVY = (
    *("torch", "torchvision", "timm", "optuna", "sqlalchemy", "pandas", "scipy", "matplotlib"),
    *("sklearn", "pydantic", "numpy", "rich", "plotly"),
)


def test_waiting_threads_are_passive_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, answered: Callable[..., str]
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    answered("--help")
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    answered("--help")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_help_of_every_command_loads_nothing_heavy() -> None:
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


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("", ["Missing command", "python -m study --help"]),
        ("rum", ["'rum'", "'run'"]),
        ("run --trails 3", ["'--trails'", "'--trials'", "python -m study run --help"]),
        ("run --config no.toml", ["no.toml: there is no such file", "python -m study init"]),
        ("run --timeout soon", ["--time: study.time"]),
        ("run --data nowhere", ["data.source", "nowhere"]),
        ("list", ["no database studies.db"]),
        ("ablate ants", ["no database studies.db"]),
        ("list --storage postgresql+no://me:hunter2@db/x", ["postgresql+no://me:***@db"]),
        ("backbones resnte18", ["Near: "]),
        ("show \udcff", ["UTF-8", "'\\udcff'"]),
        ("show a\0b", ["NUL", "'a\\x00b'"]),
        ("show ants --trial 9223372036854775808", ["--trial", "9223372036854775807"]),
        (f"list --storage {'x' * 256}", ["xxx: File name too long"]),
        (f"run --name {'x' * 241}", ["--name: study.name", "at most 240 bytes, but has 241"]),
        ("run --set space.epochs=0", ["--set: space.epochs: must be", "epochs=0"]),
        ("run --set train.seed=9223372036854775808", ["--set: train.seed", "64 bits"]),
        (f"run --set epochs=0x{'f' * 5000}", ["--set: train.epochs", "64 bits"]),
        (f"run --set epochs={'9' * 5000}", ["--set: train.epochs: must be at most 4096 char"]),
        (f"run --set space.base_lr={'[' * 3000}", ["--set: space.base_lr"]),
        (f"run --set epochs={'[' * 9}{']' * 9}", ["--set: train.epochs", "at most 8 deep"]),
        ('run --set data.root="a\\u001bb"', ["--set: data.root", "a control char", "a\\x1bb"]),
        ("run --set base_lr=1e400", ["--set: train.base_lr", "finite"]),
    ],
)
def test_a_users_mistake_is_told_in_one_line_and_changes_nothing(
    line: str, parts: list[str], here: Path, refused: Callable[..., str]
) -> None:
    message = refused(*line.split())
    assert message.count("\n") == 1
    assert all(part in message for part in parts)
    assert not list(here.iterdir())


def test_a_report_into_no_folder_and_an_unconfirmed_deletion_are_refused(
    recorded: Path, refused: Callable[..., str]
) -> None:
    assert "studies.db" in refused("report", "ants", "--out", "studies.db/report")
    assert "--yes" in refused("delete", "ants")  # there is no terminal
    assert (recorded / "frostline-runs/ants/trial-0001").is_dir()


@pytest.mark.parametrize(
    ("line", "status", "shown"),
    [
        ("python -m study backbones resnet1 >&-", 0, ""),
        ("python -m study backbones no-such >&-", 2, "error: "),
        ("python -m study --help >/dev/full", 2, "error: the working folder or standard output"),
        ('mkdir x && cd x && rmdir "$OLDPWD/x"; python -m study list', 2, "error: the working fo"),
        (">\u00fc; PYTHONIOENCODING=ascii python -m study list --storage \u00fc", 2, "\\xfc"),
        ("unset HOME; COLUMNS=1 TMPDIR=/no python -m study backbones timm:test_vit", 0, ""),
    ],
)
def test_an_odd_environment_ends_in_no_traceback(
    line: str, status: int, shown: str, here: Path
) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # whose `python` may be another
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=env)
    assert done.returncode == status, done.stderr
    assert shown in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_is_status_130_and_a_bug_keeps_its_traceback(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Mock(side_effect=[KeyboardInterrupt, ValueError("a bug")])
    monkeypatch.setattr("study.config.load.load_config", broken)
    assert main(["init"]) == 130
    with pytest.raises(ValueError, match="a bug"):
        main(["init"])


@pytest.mark.parametrize("command", ["backbones", "--help"])
def test_a_closed_pipe_is_no_error(command: str) -> None:
    line = f"{sys.executable} -m study {command} | true"
    shell = ["bash", "-o", "pipefail", "-c", line]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_demo_points_to_a_study_file_in_the_folder(
    here: Path, refused: Callable[..., str]
) -> None:
    Path("study.toml").touch()
    assert "--config study.toml" in refused("run", "--trials", "0")
    assert "--config" not in refused("run", "--data", "digits", "--trials", "0")


def test_init_writes_a_study_that_loads(
    here: Path, answered: Callable[..., str], refused: Callable[..., str]
) -> None:
    assert "run --config study.toml" in answered("init", "--data", "photos")
    config = load_config(Path("study.toml"))
    assert config.study.storage == DEFAULT_STORAGE
    assert (config.data.source, config.study.name) == ("folder:photos", "photos")
    assert "study.toml: there is such a file already; --force" in refused("init")
    answered("init", "--force")
    assert load_config(Path("study.toml")).data.source == "digits"
    assert "cannot be written: No such file or directory" in refused("init", "no/study.toml")


def test_backbones_are_listed_by_a_part_of_their_name(answered: Callable[..., str]) -> None:
    names = answered("backbones", "resnet1").splitlines()
    assert {"resnet101", "timm:resnet18"} <= set(names)
    assert all("resnet1" in name for name in names)
    assert json.loads(answered("backbones", "resnet1", "--json")) == names
    lines = [line.split() for line in answered("backbones", "squeezenet1_1").splitlines()]
    assert [words[0] for words in lines[2:8]] == list("012345")
    assert lines[2][2:] == ["0", "%", "nothing"]


def test_list_and_show_read_the_record(recorded: Path, answered: Callable[..., str]) -> None:
    def lines_of(*args: str) -> list[str]:
        return [" ".join(line.split()) for line in answered(*args).splitlines()]

    assert lines_of("list")[1].startswith("ants 75.0 % 1 2 1 1 0")
    study = lines_of("show", "ants")
    assert any("digits: 8 train, 4 val, 0 test, 2 classes" in line for line in study)
    assert "Best trial: 1, 75.0 %." in study
    assert "1 75.0 % 2.0 s complete sampler: base_lr=0.01" in study
    assert "3 - 1.0 s failed sampler: base_lr=0.0001" in study
    pruned = lines_of("show", "ants", "--trial", "2")
    for part in ("pruned: hopeless", "5,130 of 11,181,642", "25.0 % (validation, epoch 1)"):
        assert part in "\n".join(pruned)
    assert "clip_norm none" in pruned
    assert "failed: diverged [bad]" in answered("show", "ants", "--trial", "3")


def test_a_running_study_is_shown_and_stopped(
    recorded: Path, answered: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *how: sent.append(how))
    assert "not running: 4 trials, best 75.0 %" in answered("status", "ants")
    assert "not running" in answered("stop", "ants") and sent == []
    with Record(str(recorded / "studies.db")) as store:
        store.begin_run(store.study("ants").id, command="run", device="cpu", versions={})
    assert "has been running for" in answered("status", "ants")
    assert json.loads(answered("status", "ants", "--json"))["process"] == os.getpid()
    answered("stop", "ants")
    assert sent == [(os.getpid(), signal.SIGINT)]


def test_the_dashboard_gets_the_figures_of_the_report(recorded: Path) -> None:
    with Record(str(recorded / "studies.db")) as store:
        for _ in range(2):  # the second time in their places
            publish(store, ["ants"])
        key = store.optuna_storage.get_study_id_from_name("ants")
        attrs = store.optuna_storage.get_study_system_attrs(key)
        assert store.optuna_study(store.study("ants").id).metric_names == ["validation accuracy"]
    keys = {key for key in attrs if key.startswith("dashboard:plot_data:")}
    assert any("history" in key for key in keys) and not any("parallel" in key for key in keys)


def test_json_has_the_documented_fields(recorded: Path, answered: Callable[..., str]) -> None:
    (summary,) = json.loads(answered("list", "--json"))
    assert (summary["name"], summary["best_value"]) == ("ants", 0.75)
    assert summary["counts"]["complete"] == 2
    study = json.loads(answered("show", "ants", "--json"))
    assert set(study) == {
        *("id", "name", "created_at", "config", "data", "versions", "trials", "tests")
    }
    trial = json.loads(answered("show", "ants", "--trial", "1", "--json"))
    assert trial == {**study["trials"][1], "epochs": trial["epochs"]}
    assert set(trial) == {
        *("id", "study_id", "number", "run_id", "state", "reason", "origin", "params", "config"),
        *("config_hash", "device", "started_at", "ended_at"),
        *("duration_s", "epochs_done", "value", "best_epoch", "score", "trained_parameters"),
        *("total_parameters", "without_effect", "factor", "level", "replicate"),
        *("weights_hash", "checkpoint", "epochs"),
    }
    assert trial["epochs"][0]["val_acc"] == 0.75


@pytest.mark.parametrize(("answer", "is_gone"), [("n", False), ("", False), ("yes", True)])
def test_delete_does_what_is_answered(
    answer: str, is_gone: bool, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = io.StringIO(f"{answer}\n")
    monkeypatch.setattr(typed, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", typed)
    assert main(["delete", "ants"]) == 0
    with Record(DEFAULT_STORAGE) as store:
        assert (store.find_study("ants") is None) == is_gone
    assert (not optuna.get_all_study_names(f"sqlite:///{DEFAULT_STORAGE}")) == is_gone
    output = recorded / "frostline-runs" / "ants"
    assert (output / "trial-0000").is_dir()  # no checkpoint of the record
    assert (output / "trial-0001").is_dir() != is_gone


def test_delete_leaves_and_names_what_another_study_wrote(
    recorded: Path, answered: Callable[..., str]
) -> None:
    folder = Path("frostline-runs/ants")
    theirs, link, state = folder / "trial-0001", folder / "trial-0002", folder / "state"
    (theirs / "model.safetensors").write_text("weights of another study")
    link.symlink_to(recorded)
    state.mkdir()
    (state / "trial-0003.pt").touch()
    shown = answered("delete", "ants", "--yes")
    assert "4 trials, 0 checkpoints" in shown
    left = (theirs, link, state / "trial-0003.pt")
    assert {str(path) for path in left} <= set(shown.split())
    assert all(path.exists() for path in (*left, Path(DEFAULT_STORAGE)))


def test_test_refuses_weights_that_are_not_the_trials(
    recorded: Path, refused: Callable[..., str]
) -> None:
    folder = Path("frostline-runs/ants/trial-0001")
    (folder / "model.safetensors").write_text("of another study")
    message = refused("test", "ants", "--trial", "1")
    assert "holds other weights" in message and str(folder) in message
    (folder / "model.safetensors").unlink()
    message = refused("test", "ants", "--trial", "1")
    assert "cannot be read" in message and str(folder) in message


SECRET = "hunter2"
SECRET_URLS = (
    f"nonsense://me:a {SECRET}@db/x",
    f"nonsense://db/x?p%61ssword=a@{SECRET}",
    f"nonsense://me:a?b@db:5/x?sslkey={SECRET}",
)


@pytest.mark.parametrize("url", SECRET_URLS)
def test_no_command_shows_a_password(
    url: str, recorded: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Record(DEFAULT_STORAGE) as store:
        row = store.study("ants")
        row.config["study"]["storage"] = url
        store.save(row)
    for command in COMMANDS[:-2]:
        name = [] if command in ("run", "list", "dashboard") else ["ants"]
        assert main([command, *name, "--storage", url]) == 2
    for line in ("list --json", "show ants", "show ants --json", "report ants", "test ants"):
        main(line.split())
    tiny = "run --dry-run --set weights=none --set image_size=32 --set space.backbone=resnet18"
    for flag in ("--quiet", "--json"):
        assert main([*tiny.split(), flag, "--storage", url]) == 0
    shown = "".join(capfd.readouterr())
    shown += "".join(path.read_text() for path in recorded.rglob("*.html"))
    assert shown.count("nonsense://") >= len(COMMANDS)
    assert SECRET not in shown


def test_the_record_keeps_no_password(here: Path, photos: list[str]) -> None:
    words = ["--storage", DEFAULT_STORAGE, "--name", "ants", "--trials", "1", "--quiet"]
    sets = ["--set", f"study.storage='{SECRET_URLS[2]}'"]  # which --storage overrides
    assert main(["run", *photos, *sets, *words]) == 0
    assert SECRET not in str(load_config(flags={"study.storage": SECRET_URLS[0]}).to_record())
    files = [path for path in here.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.fixture
def photos(here: Path) -> list[str]:
    """The options of a search of a tenth of a second per trial."""
    make_folder(here / "photos", {"red": 12, "blue": 12}, side=40)
    settings = ("backbone=resnet18", "weights=none", "image_size=32", "epochs=1", "batch_size=4")
    texts = [*(f"train.{text}" for text in settings), "data.cache_dir=cache"]
    return ["--data", "photos", *(word for text in texts for word in ("--set", text))]


def test_a_dry_run_prints_the_cost_and_keeps_nothing(
    photos: list[str], here: Path, answered: Callable[..., str], refused: Callable[..., str]
) -> None:
    words = ["run", *photos, "--dry-run", "--quiet"]
    assert "solved head" in answered(*words)
    words += ["--trials", "20", "--set", "search.strategy=sampler"]
    assert "20 trials on cpu" in answered(*words)
    found = json.loads(answered(*words, "--json").splitlines()[-1])
    assert found["config"]["train"]["image_size"] == 32
    assert found["estimate"]["n_trials"] == 20
    assert not (here / DEFAULT_STORAGE).exists()
    assert "train.batch_size" in refused(*words, "--set", "train.batch_size=999")


def test_run_resume_and_test_report_what_they_did(
    photos: list[str], no_figures: None, answered: Callable[..., str]
) -> None:
    shown = answered("run", *photos, "--set", "search.recipes=false", "--quiet", "--trials", "1")
    report = Path("frostline-runs/photos/report/report.html")
    assert f"Report: {report}" in shown and report.is_file()
    assert "1 of 1 trials" in shown
    assert "Model: trial 0" in shown and "frostline-runs/photos/model" in shown
    assert shown.index("-m study show photos") < shown.index("-m study test photos")
    *events, last = map(json.loads, answered("resume", "photos", "--json").splitlines())
    assert all("event" in event for event in events)
    assert set(last) == {"event", "study", "stopped_because", "counts", "best", "model", "report"}
    first = json.loads(answered("test", "photos", "--json").splitlines()[-1])
    assert {"trial_number", "n", "accuracy", "low", "high", "val_acc", "confusion"} <= set(first)
    assert "From the record" in answered("test", "photos")
    assert "Test accuracy of the model" in answered("show", "photos")


def test_a_search_without_a_complete_trial_is_status_1(
    photos: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["--set", "train.base_lr=1e30", "--set", "train.freeze_depth=0"]
    words = ["--set", "search.recipes=false", "--quiet", "--trials", "1"]
    assert main(["run", *photos, *sets, *words]) == 1
    shown = capsys.readouterr().out
    assert "No trial is complete. The last one failed: diverged: " in shown
    assert "-m study test" not in shown
