import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.metrics import EpochMetrics
from study.__main__ import _print_next, main
from study.config.load import load_config
from study.config.study_config import StudyConfig
from study.execution.progress import Counts
from study.parser import DEFAULT_STORAGE, make_parser
from study.record.models import Trial
from study.record.record import Record
from study.search.search import SearchOutcome
from support import distributions_of, make_folder

ROOT = Path(__file__).parents[2]
COMMANDS = [
    *("run", "resume", "init", "schema", "backbones", "list"),
    *("show", "diff", "delete", "test", "report"),
]


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
    with Record.open(DEFAULT_STORAGE, create=True) as store:
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
                config={"base_lr": 0.1 * (number + 1), "epochs": 1},
                config_hash=str(number),
                device="cpu",
            )
            key = store.begin_trial(trial)
            figures = (value, value, value, 0.1, 1.0, 9.0, 0.0, 0.0, 0.0, 1, 32, True)
            store.add_epoch(key, EpochMetrics(0, 0.5, 0.4, *figures), 1.0)
            folder = here / f"trial-{number}"
            folder.mkdir()
            store.end_trial(
                key,
                "complete",
                reason=None,
                value=value,
                best_epoch=0,
                epochs_done=1,
                duration_s=1.0,
                checkpoint=str(folder) if number else None,
            )
        store.end_run(run_id, "trials")
    return here


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run a command that must end with exit status 2; return what it said on stderr."""
    try:
        status = main(args)
    except SystemExit as end:
        status = int(end.code or 0)
    captured = capsys.readouterr()
    assert status == 2
    assert "Traceback" not in captured.err
    return captured.err


def answered(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(args) == 0
    return capsys.readouterr().out


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out.split()
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"python -m study {command}" in capsys.readouterr().out


def test_help_loads_no_library() -> None:
    code = (
        "import sys\n"
        "from study.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'rich', 'pydantic', 'optuna', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_waiting_threads_are_passive_unless_the_user_says_otherwise() -> None:
    code = "import os, study.__main__; print(os.environ['OMP_WAIT_POLICY'])"
    plain = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    for given, expected in ((plain, "PASSIVE"), (plain | {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=given,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["rum"], "invalid choice: 'rum'"),
        (["rum"], "Did you mean run?"),
        (["run", "--trails", "3"], "unrecognized arguments: --trails 3. Did you mean --trials?"),
        (["run", "--trials", "many"], "invalid int value: 'many'"),
        (["diff", "ants"], "the following arguments are required: --trials"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_wrong_command_line_is_refused(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "--config", "no.toml"], "no.toml: there is no such file"),
        (["run", "--set", "epoch=3"], "--set: epoch: is no section or key. Did you mean epochs?"),
        (["run", "--trials", "0"], "--trials: study.trials: must be greater than"),
        (["run", "--timeout", "soon"], "--timeout: study.timeout: must be seconds or a text"),
        (["run", "--name", "a/b"], "--name: study.name: must begin and end with"),
        (["run", "--data", "nowhere"], "data.source: data folder nowhere must exist"),
        (
            ["run", "--data", ""],
            "--data: data.source: must name a folder of images, but got",
        ),
        (["run", "--data", "nowhere", "--dry-run"], "data.source: data folder nowhere must"),
        (["list"], "there is no database studies.db"),
        (["resume", "ants"], "there is no database studies.db"),
        (["show", "ants", "--storage", "other.db"], "there is no database other.db"),
    ],
)
def test_a_users_mistake_is_one_message_and_status_2(
    args: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, *args)
    assert told.startswith("error: ")
    assert message in told
    assert not list(here.iterdir())


def test_several_faults_are_told_together(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, "run", "--trials", "0", "--set", "epochs=x", "--set", "sampler=tp")
    assert len(told.splitlines()) == 3


def test_an_unknown_backbone_is_refused_before_pictures_are_read(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, "run", "--set", "backbone=resnet19")
    assert not list(here.iterdir())
    assert "train.backbone: backbone must be a torchvision classification model" in told
    assert "resnet18" in told


def test_an_error_of_ours_keeps_its_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("study.config.load.load_config", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["init"])


def test_ctrl_c_ends_with_the_shells_status(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("study.config.load.load_config", stopped)
    assert main(["init"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m study schema | head -n 1",
        cwd=ROOT,
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("{\n", "")


def test_the_demo_says_that_a_study_file_lies_beside_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("study.toml").touch()
    told = refused(capsys, "run", "--trials", "0")
    assert "--config study.toml" in told
    assert "--config" not in refused(capsys, "run", "--data", "digits", "--trials", "0")


def test_init_writes_a_study_that_loads(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "run --config study.toml" in answered(capsys, "init", "--data", "photos")
    config = load_config(Path("study.toml"))
    assert (config.data.source, config.study.name) == ("folder:photos", "photos")
    assert "--force replaces it" in refused(capsys, "init")
    answered(capsys, "init", "--force", "--demo")
    assert load_config(Path("study.toml")).train.image_size == 64


def test_schema_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(answered(capsys, "schema"))["title"] == "Frostline study"


def test_backbones_are_listed_by_a_part_of_their_name(capsys: pytest.CaptureFixture[str]) -> None:
    names = answered(capsys, "backbones", "resnet1").splitlines()
    assert names[0] == "resnet101"
    assert "timm:resnet18" in names
    assert all("resnet1" in name for name in names)
    assert json.loads(answered(capsys, "backbones", "resnet1", "--json")) == names


def test_a_backbones_levels_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    lines = answered(capsys, "backbones", "squeezenet1_1").splitlines()
    assert lines[0] == "squeezenet1_1"
    assert [line.split()[0] for line in lines[2:8]] == list("012345")
    levels = json.loads(answered(capsys, "backbones", "squeezenet1_1", "--json"))
    assert [level["depth"] for level in levels] == [0, 1, 2, 3, 4, 5]


def test_an_unknown_backbone_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Near: " in refused(capsys, "backbones", "resnte18")


def test_list_show_and_diff_read_the_record(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answered(capsys, "list").splitlines()[1].split()[:4] == ["ants", "75.0", "%", "1"]
    assert "digits: 8 train, 4 val, 0 test, 1 classes" in answered(capsys, "show", "ants")
    assert "75.0 % (validation, epoch 1)" in answered(capsys, "show", "ants", "--trial", "1")
    assert "+25.0 points" in answered(capsys, "diff", "ants", "--trials", "0", "1")


def test_the_same_as_json(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def read(*args: str) -> object:
        return json.loads(answered(capsys, *args, "--json"))

    assert read("list")[0]["best_value"] == 0.75  # type: ignore[index]
    assert [row["number"] for row in read("show", "ants")["trials"]] == [0, 1]  # type: ignore[index]
    trial = read("show", "ants", "--trial", "1")
    assert trial["epochs"][0]["val_acc"] == 0.75  # type: ignore[index]
    assert read("diff", "ants", "--trials", "0", "1")["value"] == [0.5, 0.75]  # type: ignore[index]


def test_an_unknown_study_or_trial_is_told(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no study ant in studies.db. There is: ants." in refused(capsys, "show", "ant")
    assert "trial" in refused(capsys, "show", "ants", "--trial", "7")


def test_delete_asks_and_without_a_terminal_refuses(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))
    assert "delete must be confirmed" in refused(capsys, "delete", "ants")
    assert (recorded / "trial-1").is_dir()


@pytest.mark.parametrize(("answer", "is_gone"), [("n", False), ("", False), ("yes", True)])
def test_delete_does_what_is_answered(
    answer: str, is_gone: bool, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(f"{answer}\n"))
    assert main(["delete", "ants"]) == 0
    with Record.open(DEFAULT_STORAGE) as store:
        assert (store.find_study("ants") is None) == is_gone
    assert (recorded / "trial-1").is_dir() != is_gone


def test_delete_removes_the_study_from_optuna_too(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import optuna

    storage = f"sqlite:///{DEFAULT_STORAGE}"
    assert optuna.get_all_study_names(storage) == ["ants"]
    told = answered(capsys, "delete", "ants", "--yes")
    assert told == "Deleted study ants: 2 trials, 1 checkpoints.\n"
    assert optuna.get_all_study_names(storage) == []
    assert (recorded / "trial-0").is_dir()


def test_the_default_storage_is_the_configurations() -> None:
    assert load_config().study.storage == DEFAULT_STORAGE


def test_run_takes_the_documented_flags() -> None:
    line = "run --data p --config c --name n --trials 3 --timeout 2h --set a=1 --set b=2 --dry-run"
    args = make_parser().parse_args([*line.split(), "--quiet", "--json", "--storage", "s"])
    assert (args.data, args.trials, args.set, args.dry_run) == ("p", 3, ["a=1", "b=2"], True)
    args = make_parser().parse_args(["run", "--allow-changes", "--take-over"])
    assert args.allow_changes
    assert args.take_over


def test_a_dry_run_tells_and_keeps_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(here / "photos", {"red": 12, "blue": 12}, side=40)
    fixed = ("train.backbone=resnet18", "train.weights=none", "train.image_size=32")
    words = ["run", "--data", "photos", "--dry-run", "--quiet", "--set", "train.batch_size=4"]
    words += [word for key in fixed for word in ("--set", key)]
    words += ["--set", "data.cache_dir=cache"]
    shown = answered(capsys, *words)
    assert "20 trials on cpu" in shown
    assert not (here / DEFAULT_STORAGE).exists()
    said = refused(capsys, *words, "--set", "train.batch_size=999")
    assert "train.batch_size must be <= the number of training pictures" in said


@pytest.mark.parametrize(("best", "is_tested"), [(0, True), (None, False)])
def test_after_a_run_what_can_be_done_is_named(
    best: int | None, is_tested: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = SearchOutcome("ants", "trials", Counts(), best, None, {}, None, 10, 1.0)
    _print_next(load_config(flags={"study.name": "ants"}), outcome, Path("report.html"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].endswith("-m study show ants")
    assert any("-m study test ants" in line for line in lines) == is_tested


@pytest.mark.parametrize(
    ("because", "is_named"), [("interrupted", True), ("timeout", True), ("trials", False)]
)
def test_resume_is_named_after_a_study_that_was_only_halted(
    because: str, *, is_named: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = SearchOutcome("ants", because, Counts(complete=2), 1, 0.8, {}, None, 10, 1.0)
    _print_next(load_config(flags={"study.name": "ants"}), outcome, Path("report.html"))
    assert ("-m study resume ants" in capsys.readouterr().out) == is_named


def test_no_password_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "list", "--storage", "postgresql+nosuch://me:hunter2@db/x")
    assert "hunter2" not in said and "postgresql+nosuch://me:***@db/x" in said
