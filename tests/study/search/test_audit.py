import json
from pathlib import Path

import pytest
from small_study import Listener, config_of, make_home, optuna_trials, rows_of, run

from reports.pruning import audit_of
from reports.record import read_record
from reports.search_report import write_report
from study.cli.main import main
from study.record.record import Record
from study.search.audit import audit_study

SETTINGS = [
    'train.backbone="resnet18"',
    "train.epochs=3",
    'search.pruner="halving"',
    "search.recipes=false",
    "space.base_lr={low=1e-5, high=1e-1, log=true}",
    "space.freeze_depth=[0, 5]",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search of which several trials were pruned."""
    home = tmp_path_factory.mktemp("audit")
    make_home(home, "[space]\n", n=24)
    run(config_of(home, 10, *SETTINGS))
    return home


def _audit(store: Record, n: int) -> object:
    return audit_study(store, "photos", n, progress=Listener(), command="test")


def test_an_audit_trains_pruned_trials_to_the_end_and_goes_on_where_it_was(home: Path) -> None:
    with Record(str(home / "s.db")) as store:
        pruned = {trial.number: trial for trial in rows_of(home) if trial.state == "pruned"}
        assert len(pruned) >= 3, "the pruner had nothing to do: the test shows nothing"
        _audit(store, 1)
        first = store.trials(store.study("photos-audit").id)
        assert len(first) == 1
        _audit(store, 3)
        rows = store.trials(store.study("photos-audit").id)
        assert len(rows) == 3
        assert rows[0] == first[0]  # not trained again
        assert len({row.level for row in rows}) == 3
        for row in rows:
            original = pruned[int(row.level or -1)]
            assert row.config == original.config
            assert (row.state, row.epochs_done) == ("complete", 3)
            # It repeats what the pruned trial had, and goes on.
            seen = [m.val_acc for m in store.epochs(row.id)]
            before = [m.val_acc for m in store.epochs(original.id)]
            assert seen[: len(before)] == before
    assert [t.value for t in optuna_trials(home, "photos-audit")] == [row.value for row in rows]


def test_the_share_that_would_have_won_is_counted_against_the_best_and_reported(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = ["--storage", str(home / "s.db")]
    assert main(["audit", "photos", "--sample", "3", "--quiet", *storage]) == 0
    shown = capsys.readouterr().out
    assert "Pruned trials trained to the end" in shown
    with Record(str(home / "s.db")) as store:
        found = audit_of(read_record(store, "photos"))
        rows = store.trials(store.study("photos-audit").id)
        page = write_report(store, "photos", home / "report").html.read_text()
    best, share = found.best_score, found.share_won
    assert best is not None and share is not None
    assert found.n_won == sum((row.ranked_by or 0) > best for row in rows)
    assert share.low <= found.n_won / 3 <= share.high
    assert all("Of 3 pruned trials trained to the end" in text for text in (shown, page))
    assert main(["audit", "photos", "--sample", "0", "--json", *storage]) == 0
    assert len(json.loads(capsys.readouterr().out)["trials"]) == len(found.trials) == 3
    assert main(["audit", "photos-audit", *storage]) == 2
    assert "photos-audit is no search" in capsys.readouterr().err
