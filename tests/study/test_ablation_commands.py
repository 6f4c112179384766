import contextlib
import io
import json
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from core.config import TrainConfig
from core.fit import Interrupted
from core.metrics import EpochMetrics
from core.training.checkpoint import PREDICTIONS_FILE
from study.__main__ import main
from study.config.load import load_config
from study.execution.progress import EpochEnded, Event, QuietProgress
from study.record.record import Record
from study.search.search import run_search
from support import make_folder

# Small checkpoints and a tenth of a second a run; what it learns is not asked here.
SETTINGS = [
    "train.backbone=squeezenet1_1",
    "train.weights=none",
    "train.image_size=32",
    "train.epochs=1",
    "train.batch_size=8",
    "train.device=cpu",
]
TOML = """
[space]
freeze_depth = {low = 3, high = 5}
"""
FLAGS = ["--factor", "augment=none", "--factor", "head_lr_mult=1", "--replicates", "2"]


@dataclass(frozen=True)
class Recorded:
    """A search `bees`, its ablation `bees-ablation`, and what the ablation printed.

    Attributes:
        home: Folder of pictures, database and output.
        printed: Of the command that made the ablation.
    """

    home: Path
    printed: str

    @property
    def storage(self) -> list[str]:
        """Return the flags that name the database."""
        return ["--storage", str(self.home / "s.db")]

    def trials(self, name: str = "bees-ablation") -> list[object]:
        """List a study's trials."""
        with Record.open(str(self.home / "s.db")) as store:
            return list(store.trials(store.study(name).id))


def _sets(home: Path) -> list[str]:
    texts = [*SETTINGS, f"data.cache_dir={home / 'cache'}", f"study.output={home / 'runs'}"]
    return [part for text in texts for part in ("--set", text)]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    home = tmp_path_factory.mktemp("bees")
    make_folder(home / "photos", {"red": 12, "blue": 12})
    (home / "bees.toml").write_text(TOML)
    config = load_config(
        home / "bees.toml",
        [*SETTINGS, "search.recipes=false", "search.pruner=none"],
        {
            "study.name": "bees",
            "data.source": str(home / "photos"),
            "data.cache_dir": str(home / "cache"),
            "study.storage": str(home / "s.db"),
            "study.output": str(home / "runs"),
            "study.trials": 2,
        },
    )
    run_search(config, progress=QuietProgress(), command="python -m study run")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        line = ["ablate", "bees", *FLAGS, "--storage", str(home / "s.db")]
        assert main(line) == 0
    return Recorded(home, printed.getvalue())


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


def test_ablate_tells_the_plan_the_results_and_what_is_next(record: Recorded) -> None:
    told = record.printed
    assert "Ablation of trial" in told
    assert "of study bees, its best: study bees-ablation" in told
    assert "Design: one factor at a time" in told
    rows = [line.split() for line in told.splitlines()]
    assert ["augment", "standard", "none"] in rows
    assert ["head_lr_mult", "10", "1"] in rows
    assert "Runs: 6 (2 replicates, seeds 1 to 2, the same for every setting)" in told
    assert "Ablation bees-ablation: 6 of 6 runs are done" in told
    results = told.partition("6 of 6 runs are done")[2]
    assert [line.split()[:3] for line in results.splitlines()[3:5]] == [
        ["augment", "(standard)", "none"],
        ["head_lr_mult", "(10)", "1"],
    ]
    assert results.splitlines()[2].startswith("baseline")
    assert "Better than the baseline: no level" in results
    assert "Test split: The test split was not used." in results
    report = record.home / "runs" / "bees-ablation" / "ablation" / "ablation.html"
    assert f"Report: {report}" in results
    assert report.is_file()
    storage = " ".join(record.storage)
    assert f"python -m study report bees-ablation {storage} --methods" in results
    assert f"python -m study test bees-ablation {storage} --levels all" in results


def test_json_is_one_event_a_line_and_ends_with_the_effects(
    record: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    before = record.trials()
    lines = answered(capsys, "ablate", "bees-ablation", "--json", *record.storage).splitlines()
    events = [json.loads(line) for line in lines]
    assert events[0]["event"] == "note"
    last = events[-1]
    assert last["event"] == "ablation_ended"
    assert (last["study"], last["stopped_because"]) == ("bees-ablation", "complete")
    assert (last["n_done"], last["n_planned"]) == (6, 6)
    effects = [(e["factor"], e["level"], e["n"], e["n_failed"]) for e in last["effects"]]
    assert effects == [("augment", "none", 2, 0), ("head_lr_mult", "1", 2, 0)]
    assert all(e["low"] <= e["difference"] <= e["high"] for e in last["effects"])
    assert Path(last["report"]).is_file()
    assert record.trials() == before  # all of it was done


def test_dry_run_tells_runs_and_cost_and_writes_nothing(
    record: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    before = record.trials()
    dry = ["ablate", "bees", "--name", "other", "--dry-run", *record.storage]
    told = answered(capsys, *dry, *FLAGS, "--design", "factorial")
    assert "study other" in told
    assert "Design: full factorial, 4 combinations" in told
    assert "Runs: 8 (2 replicates, seeds 1 to 2" in told
    assert "About " in told
    assert "of checkpoints" in told
    with Record.open(str(record.home / "s.db")) as store:
        assert {row.name for row in store.studies()} == {"bees", "bees-ablation"}
        assert len(store.designs(store.study("bees-ablation").id)) == 1
    assert record.trials() == before
    assert not (record.home / "runs" / "other").exists()


def test_dry_run_of_a_file_makes_no_database(
    record: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = [str(record.home / "bees.toml"), "--data", str(record.home / "photos")]
    storage = ["--storage", str(tmp_path / "new.db")]
    keep = ["--set", "ablation.keep_checkpoints=false"]
    line = ["ablate", *file, *storage, *_sets(record.home), *FLAGS, *keep, "--json", "--dry-run"]
    found = json.loads(answered(capsys, *line).splitlines()[-1])
    assert (found["n_runs"], found["checkpoint_bytes"]) == (6, 0)
    assert found["total_s"] > 0
    assert [cell["levels"] for cell in found["design"]["cells"]] == [
        {},
        {"augment": "none"},
        {"head_lr_mult": "1"},
    ]
    assert not (tmp_path / "new.db").exists()


def test_a_fractions_aliasing_is_told_before_it_runs(
    record: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    factors = ["augment=none", "head_lr_mult=1", "flip=0", "schedule=constant"]
    flags = [part for text in factors for part in ("--factor", text)]
    line = ["ablate", "bees", "--dry-run", "--design", "factorial", *flags, *record.storage]
    told = answered(capsys, *line, "--set", "ablation.max_cells=8")
    assert "2^(4-1) fractional factorial of resolution 4: 8 of 16 combinations" in told
    aliases = [line for line in told.splitlines() if line.startswith("Aliasing: ")]
    assert len(aliases) == 3
    assert "Aliasing: augment × head_lr_mult = flip × schedule" in aliases


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        (["--replicates", "1"], "warning: with one replicate nothing can be tested"),
        (
            ["--replicates", "3"],
            "warning: at 3 replicates the t-test finds a difference with 80 % power",
        ),
    ],
)
def test_a_run_that_could_decide_little_is_warned_of_before_it_runs(
    flags: list[str], warning: str, record: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["ablate", "bees", *FLAGS, *flags, "--dry-run", *record.storage]
    told = " ".join(answered(capsys, *line).split())
    assert warning in told


def test_enough_replicates_give_no_warning(
    record: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["ablate", "bees", *FLAGS, "--replicates", "10", "--dry-run"]
    assert "warning" not in answered(capsys, *line, *record.storage)


def test_methods_is_a_paragraph_and_nothing_else(
    record: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    told = answered(capsys, "report", "bees-ablation", "--methods", *record.storage)
    (paragraph,) = told.splitlines()
    assert paragraph.startswith("We ablated trial")
    for words in ("squeezenet1_1", "2 replicates (seeds 1 to 2", "paired", "Holm's correction"):
        assert words in paragraph


def _other(record: Recorded) -> None:
    """Add an ablation of the same levels on other pictures."""
    make_folder(record.home / "more", {"red": 12, "blue": 12}, seed=9)
    file = [str(record.home / "bees.toml"), "--data", str(record.home / "more")]
    line = ["ablate", *file, *_sets(record.home), *FLAGS, *record.storage]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*line, "--name", "wasps-ablation", "--quiet"]) == 0


def test_report_writes_every_file_that_it_names_and_compares_with_another(
    record: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _other(record)
    line = ["report", "bees-ablation", "--ablation", "--out", str(tmp_path), *record.storage]
    plain = [Path(text) for text in answered(capsys, *line).splitlines()]
    names = ["ablation.html", "tables.md", "tables.tex", "ofat-effects.csv", "ofat-runs.csv"]
    assert plain == [tmp_path / name for name in names]
    assert all(path.stat().st_size > 0 for path in plain)
    alone = (tmp_path / "ablation.html").read_text()
    assert "wasps-ablation" not in alone
    answered(capsys, *line, "--beside", "wasps-ablation")
    beside = (tmp_path / "ablation.html").read_text()
    assert "wasps-ablation" in beside
    assert "Mean rank" in beside


def test_levels_are_tested_once(
    record: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["test", "bees-ablation", "--levels", "augment = none", *record.storage]
    told = answered(capsys, *line)
    assert "Tested 4 runs." in told
    assert "augment = none" in told
    with Record.open(str(record.home / "s.db")) as store:
        study = store.study("bees-ablation").id
        looks = store.tests(study)
        rows = {row.number: row for row in store.trials(study)}
    tested = {(rows[look.trial_number].factor, rows[look.trial_number].seed) for look in looks}
    assert tested == {("baseline", 1), ("baseline", 2), ("augment", 1), ("augment", 2)}
    report = record.home / "runs" / "bees-ablation" / "ablation" / "ablation.html"
    text = report.read_text()
    assert "The test split was read for 4 runs." in text
    again = json.loads(answered(capsys, *line, "--json"))
    assert [row["trial_number"] for row in again] == [look.trial_number for look in looks]
    with Record.open(str(record.home / "s.db")) as store:
        assert store.tests(study) == looks


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["test", "bees-ablation"],
            "study bees-ablation is an ablation, of which no run is the best. Use: "
            "python -m study test bees-ablation --levels all",
        ),
        (
            ["resume", "bees-ablation"],
            "study bees-ablation is an ablation, of which no run is the best. Use: "
            "python -m study ablate bees-ablation",
        ),
        (
            ["test", "bees", "--levels", "all"],
            "--levels is for ablations, but study bees is a search.",
        ),
        (
            ["test", "bees-ablation", "--levels", "augment=none", "flip = 1"],
            "--levels must be all or levels of bees-ablation, but got augment=none, flip = 1. "
            "They are: baseline; augment = none; head_lr_mult = 1.",
        ),
        (["report", "bees", "--ablation"], "study bees is no ablation."),
        (["report", "bees", "--methods"], "study bees is no ablation."),
        (["report", "bees-ablation", "--beside", "bees"], "study bees is no ablation."),
        (["ablate", "bees", "--from", "9"], "there is no trial 9 in that study"),
        (["ablate", "bees", "--from", "first"], "--from must be best or a trial's number"),
        (["ablate", "bees", "--design", "ofatt"], "Did you mean ofat?"),
        (["ablate", "bees", "--factor", "augment"], "--factor: must be KEY=VALUE"),
        (
            ["ablate", "bees", "--factor", "augmnt=none"],
            "--factor: ablation.factors.augmnt: is no training key, so its levels must be tables "
            "of training keys. Did you mean augment?",
        ),
        (
            ["ablate", "bees", "--factor", "freeze_depth=9"],
            "--factor: ablation.factors.freeze_depth: must be less than or equal to 5, but got ",
        ),
        (
            ["ablate", "bees", "--factor", "augment=standard"],
            "ablation.factors.augment: must have a level other than the baseline's",
        ),
        (["ablate", "bees", "--replicates", "0"], "ablation.replicates: must be greater than"),
        (["ablate", "bees", "--timeout", "soon"], "study.timeout: must be seconds or a text"),
        (["ablate", "bees", "--name", "a/b"], "study.name: must begin and end with"),
        (["ablate", "bees", "--adaptive", "--design", "path"], "needs --design ofat or loco"),
        (["ablate", "bees", "--adptive"], "Did you mean --adaptive?"),
        (["ablate", "bees", "--name", "bees"], "study bees is a search"),
        (["ablate", "wasps"], "there is no study wasps"),
    ],
)
def test_a_users_mistake_is_told_with_status_2_and_changes_nothing(
    args: list[str], message: str, record: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    before = record.trials()
    assert message in refused(capsys, *args, *record.storage)
    assert record.trials() == before


@pytest.mark.parametrize(
    "args",
    [
        ["ablate", "bees"],
        ["report", "bees-ablation", "--ablation"],
        ["test", "bees-ablation", "--levels", "all"],
    ],
)
def test_a_missing_database_is_told_and_not_made(
    args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = str(tmp_path / "no.db")
    assert f"there is no database {storage}" in refused(capsys, *args, "--storage", storage)
    assert not list(tmp_path.iterdir())


def _script(monkeypatch: pytest.MonkeyPatch, accuracy: float = 0.5) -> None:
    """Let a script of two epochs' figures stand in for training."""

    def scripted(config: TrainConfig, data, *, checkpoint_dir: Path, should_stop, **_: object):
        figures = (0.5, 0.5, accuracy, 0.5, 0.5, 0.01, 0.1, 9.0, 0.0, 0.0, 0.0, 1, 8)
        for epoch in range(config.epochs):
            if should_stop():
                raise Interrupted
            yield EpochMetrics(epoch, *figures, is_best=epoch == 0)
        checkpoint_dir.mkdir(parents=True)
        np.savez(
            checkpoint_dir / PREDICTIONS_FILE, labels=data.val.labels, predicted=data.val.labels
        )

    monkeypatch.setattr("study.execution.trial_engine.fit", scripted)


class _Interrupts(QuietProgress):
    """Presses Ctrl-C in the second trial's first epoch."""

    def emit(self, event: Event) -> None:
        if isinstance(event, EpochEnded) and (event.trial, event.metrics.epoch) == (1, 0):
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_ends_with_status_130_and_the_command_to_go_on(
    record: Recorded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _script(monkeypatch)
    monkeypatch.setattr("study.execution.progress.choose_progress", lambda **_: _Interrupts())
    line = ["ablate", "bees", "--name", "cut", *FLAGS, "--set", "train.epochs=2"]
    assert main([*line, *record.storage]) == 130
    told = capsys.readouterr().out
    assert "Ablation cut: 1 of 6 runs are done" in told
    assert f"python -m study ablate cut {' '.join(record.storage)}" in told
    assert "Report:" not in told
    assert not (record.home / "runs" / "cut" / "ablation").exists()


def test_an_adaptive_ablation_looks_by_the_rules_of_its_report(
    record: Recorded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # No difference at all, on too few pictures to say so: open to the last look, as reported.
    _script(monkeypatch)
    line = ["ablate", "bees", "--name", "looks", "--factor", "augment=none", "--adaptive"]
    most = ["--replicates", "2", "--set", "ablation.max_replicates=4"]
    told = answered(capsys, *line, *most, "--json", *record.storage)
    last = json.loads(told.splitlines()[-1])
    (effect,) = last["effects"]
    assert effect["verdict"] == "undecided"
    assert (effect["n"], last["n_done"], last["n_planned"]) == (4, 8, 8)


def test_an_adaptive_plan_tells_its_looks(
    record: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["ablate", "bees", "--factor", "augment=none", "--adaptive", "--replicates", "4"]
    told = answered(capsys, *line, "--dry-run", *record.storage)
    assert "Runs: at most 40 (20 replicates, seeds 1 to 20" in told
    assert "Adaptive: looks after 4, 6, 9, 20 replicates" in told


def test_ablate_has_help_and_the_documented_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["ablate", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    flags = "--from --design --factor --replicates --resplit --adaptive --timeout --dry-run"
    assert all(flag in shown for flag in flags.split())
