import contextlib
import io
import json
import signal
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_study import rows_of

from command_line import without_figures
from study.cli.main import main
from study.execution.progress import EpochEnded, Event, JsonProgress
from study.record.record import Record
from support import classic_settings, make_folder

# Small checkpoints and a tenth of a second per run; what it learns does not matter here.
SETTINGS = (
    *(f"{key}={value}" for key, value in classic_settings().items()),
    *("train.backbone=squeezenet1_1", "train.weights=none", "train.image_size=32"),
    *("train.epochs=1", "train.batch_size=8", "train.device=cpu", "train.head_solver=sgd"),
)
TOML = """
[search]
pruner = "none"
recipes = false
[space]
freeze_depth = {low = 3, high = 5}
"""
FLAGS = ["--factor", "augment=none", "--factor", "head_lr_mult=1", "--replicates", "2"]


@dataclass(frozen=True)
class Bees:
    """A search `bees`, its ablation `bees-ablation`, and what the ablation printed."""

    home: Path
    printed: str = ""

    @property
    def storage(self) -> list[str]:
        return ["--storage", str(self.home / "s.db")]

    def file(self, images: str) -> list[str]:
        """Return a configuration file and its options, on a folder of images."""
        places = [f"data.cache_dir={self.home / 'cache'}", f"study.output={self.home / 'runs'}"]
        sets = [part for text in (*SETTINGS, *places) for part in ("--set", text)]
        return [str(self.home / "bees.toml"), "--data", str(self.home / images), *sets]


@pytest.fixture(scope="module")
def bees(tmp_path_factory: pytest.TempPathFactory) -> Bees:
    made = Bees(tmp_path_factory.mktemp("bees"))
    make_folder(made.home / "photos", {"red": 12, "blue": 12})
    (made.home / "bees.toml").write_text(TOML)
    search = ["run", "--config", *made.file("photos"), "--name", "bees", "--trials", "2"]
    with contextlib.redirect_stdout(io.StringIO()), without_figures():
        assert main([*search, "--quiet", *made.storage]) == 0
    with contextlib.redirect_stdout(io.StringIO()) as printed, without_figures():
        assert main(["ablate", "bees", *FLAGS, *made.storage]) == 0
    return Bees(made.home, printed.getvalue())


def test_ablate_prints_plan_results_and_next_commands(bees: Bees) -> None:
    plan, _, results = bees.printed.partition("Ablation bees-ablation: 6 of 6 runs are done")
    assert "study bees, its best: study bees-ablation" in plan
    rows = [line.split() for line in plan.splitlines()]
    assert ["augment", "standard", "none"] in rows and ["head_lr_mult", "10", "1"] in rows
    effects = [line.split()[:3] for line in results.splitlines()[3:5]]
    assert effects == [["augment", "(standard)", "none"], ["head_lr_mult", "(10)", "1"]]
    report = bees.home / "runs" / "bees-ablation" / "ablation" / "ablation.html"
    assert f"Report: {report}" in results and report.is_file()
    storage = " ".join(bees.storage)
    assert f"-m study test bees-ablation {storage} --levels all" in results


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--factor", "augment=none", "--replicates", "1"], ["warning: ", "Runs: 2 (1 replicate"]),
        ([*FLAGS, "--design", "factorial"], ["study other", "Runs: 8", "of checkpoints"]),
        (
            ["--factor", "augment=none", "--adaptive", "--replicates", "4"],
            ["Runs: at most 40 (20 replicates, seeds 1 to 20", "after 4, 6, 9, 20 replicates"],
        ),
        ([*FLAGS, "--folds", "3"], ["one of 3 folds of all 20 images but the test split"]),
    ],
)
def test_a_dry_run_says_what_it_costs_and_can_decide_and_writes_nothing(
    flags: list[str], parts: list[str], bees: Bees, answered: Callable[..., str]
) -> None:
    line = ["ablate", "bees", "--name", "other", *flags, "--dry-run", *bees.storage]
    shown = " ".join(answered(*line).split())
    assert all(part in shown for part in parts)
    with Record(str(bees.home / "s.db")) as store:
        assert store.find_study("other") is None
    assert not (bees.home / "runs" / "other").exists()


def test_dry_run_of_a_file_makes_no_database(
    bees: Bees, tmp_path: Path, answered: Callable[..., str]
) -> None:
    line = ["ablate", *bees.file("photos"), "--storage", str(tmp_path / "new.db"), *FLAGS]
    found = json.loads(answered(*line, "--json", "--dry-run").splitlines()[-1])
    assert found["estimate"]["n_trials"] == 6 == 2 * len(found["design"]["cells"])
    assert not (tmp_path / "new.db").exists()


@pytest.mark.usefixtures("no_figures")
def test_report_names_its_files_and_compares_with_other_ablations(
    bees: Bees, tmp_path: Path, answered: Callable[..., str]
) -> None:
    make_folder(bees.home / "more", {"red": 12, "blue": 12}, seed=9)
    line = ["ablate", *bees.file("more"), *FLAGS, "--replicates", "1", *bees.storage]
    answered(*line, "--name", "wasps", "--quiet")
    report = ["report", "bees-ablation", "--out", str(tmp_path), *bees.storage]
    page, *files = [Path(text) for text in answered(*report).splitlines()]
    assert page == tmp_path / "ablation.html" and "wasps" not in page.read_text()
    assert all(path.stat().st_size > 0 for path in files)
    answered(*report, "--beside", "wasps")
    assert "wasps" in page.read_text()


@pytest.mark.usefixtures("no_figures")
def test_levels_are_tested_once_with_the_baseline_and_that_is_an_analysis(
    bees: Bees, answered: Callable[..., str]
) -> None:
    line = ["test", "bees-ablation", *bees.storage, "--levels"]
    assert "Tested 4 runs." in answered(*line, "augment = none")
    with Record(str(bees.home / "s.db")) as store:
        study = store.study("bees-ablation").id
        tests = store.tests(study)
        rows = {row.number: row for row in store.trials(study)}
        tested = {(rows[t.trial_number].factor, rows[t.trial_number].seed) for t in tests}
        assert tested == {("baseline", 1), ("baseline", 2), ("augment", 1), ("augment", 2)}
        again = json.loads(answered(*line, "augment = none", "--json"))
        assert [row["trial_number"] for row in again] == [test.trial_number for test in tests]
        assert store.tests(study) == tests
        answered(*line, "all", "--json")
        (design,) = store.designs(study)
    found = [(each["split"], each["order"], each.get("cells")) for each in design.spec["analyses"]]
    assert found == [("val", 1, None), ("test", 2, [0, 1]), ("test", 3, [0, 1, 2])]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["test", "bees-ablation"], ["python -m study test bees-ablation", "--levels all"]),
        (["resume", "bees-ablation"], ["python -m study ablate bees-ablation"]),
        (["test", "bees", "--levels", "all"], ["--levels", "bees is a search"]),
        (["test", "bees-ablation", "--trial", "0", "--levels", "all"], ["must not both be given"]),
        (
            ["test", "bees-ablation", "--levels", "augment=none", "--levels", "flip = 1"],
            ["augment=none, flip = 1", "baseline; augment = none; head_lr_mult = 1."],
        ),
        (["report", "bees-ablation", "--beside", "bees"], ["bees is no ablation"]),
        (["ablate", "bees", "--design", "ofatt"], ["--design", "'ofatt'", "'ofat'"]),
        (["ablate", "bees", "--adaptive", "--design", "path"], ["--design ofat or loco"]),
        (["ablate", "bees", "--name", "bees"], ["study bees is a search"]),
    ],
)
def test_a_users_mistake_is_refused_and_changes_nothing(
    args: list[str], parts: list[str], bees: Bees, refused: Callable[..., str]
) -> None:
    before = rows_of(bees.home, "bees-ablation")
    message = refused(*args, *bees.storage)
    assert all(part in message for part in parts)
    assert rows_of(bees.home, "bees-ablation") == before


def test_ctrl_c_ends_with_status_130_and_without_a_report(
    bees: Bees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupts(progress: JsonProgress, event: Event) -> None:
        emit(progress, event)
        if isinstance(event, EpochEnded):
            signal.raise_signal(signal.SIGINT)

    emit = JsonProgress.emit
    monkeypatch.setattr(JsonProgress, "emit", interrupts)
    line = ["ablate", *bees.file("photos"), "--set", "train.epochs=50", *FLAGS, "--json"]
    assert main([*line, "--storage", str(tmp_path / "s.db")]) == 130
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["event"], last["stopped_because"]) == ("ablation_ended", "interrupted")
    assert (last["n_done"], last["report"]) == (0, None)


@pytest.mark.usefixtures("no_figures")
def test_an_adaptive_ablation_stops_by_the_rules_of_its_report(
    bees: Bees, answered: Callable[..., str]
) -> None:
    # Few images and no pretrained weights: nothing can be decided, so it runs to the end.
    line = ["ablate", "bees", "--name", "adaptive", "--factor", "augment=none", "--adaptive"]
    most = ["--replicates", "2", "--set", "ablation.max_replicates=4"]
    *events, last = map(json.loads, answered(*line, *most, "--json", *bees.storage).splitlines())
    assert all("event" in event for event in events)
    assert (last["event"], last["stopped_because"]) == ("ablation_ended", "complete")
    (effect,) = last["effects"]
    assert set(effect) == {
        *("factor", "level", "n", "n_failed", "difference", "low", "high", "p", "p_family"),
        *("verdict", "n_needed", "images_needed"),
    }
    assert Path(last["report"]).is_file()
    assert effect["verdict"] in ("inconclusive", "identical")
    assert (effect["n"], last["n_done"], last["n_planned"]) == (4, 8, 8)


def test_an_archive_renders_the_same_tables_elsewhere(
    bees: Bees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bees.zip"
    command = ["archive", "bees-ablation", *bees.storage, "--out", str(file)]
    assert main(["report", "bees-ablation", *bees.storage]) == 0
    assert main(command) == 0
    assert main(command) == 2
    assert f"--out must name a new file, but {file} exists." in capsys.readouterr().err
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path / "other")
    monkeypatch.chdir(tmp_path / "other")
    with Record("studies.db") as store:
        assert [study.name for study in store.studies()] == ["bees-ablation"]
    csv = Path("frostline-runs/bees-ablation/ablation/ofat-effects.csv")
    csv.unlink()
    assert 'storage = "studies.db"' in Path("study.toml").read_text()
    assert main(["report", "bees-ablation"]) == 0
    assert csv.read_bytes() == (bees.home / "runs" / Path(*csv.parts[1:])).read_bytes()
    assert main(["ablate", "study.toml", "--data", str(bees.home / "photos"), "--dry-run"]) == 0
