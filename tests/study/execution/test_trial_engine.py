import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from optuna.artifacts import get_all_artifact_meta
from small_study import Listener, Reacts, config_of, optuna_trials, rows_of, run

from core.config import TrainConfig
from core.fit import fit
from core.metrics import EpochMetrics
from study.__main__ import main
from study.cli.delete import delete_study
from study.execution import session as session_module
from study.execution import trial_engine
from study.execution.progress import EpochEnded, StepDone, TrialEnded, TrialStarted
from study.execution.session import Session, StudyHalted, open_session, outside_cause
from study.execution.trial_engine import TrialEngine, TrialRequest, identity
from study.record.frames import read_confusion, read_misclassified
from study.record.record import Record


@contextmanager
def opened(home: Path) -> Iterator[Session]:
    config, shown = config_of(home, 1), {"progress": Listener(), "command": "test"}
    with (
        Record(str(home / "s.db"), create=True) as record,
        open_session(record, config, [config.train], **shown) as session,
    ):
        yield session


def _request(session: Session, **changes: object) -> TrialRequest:
    trial = session.record.start_trial(session.study_id, {}, {})
    config = replace(session.config.train, freeze_depth=5, **changes)
    return TrialRequest(trial.number, config, "by hand", {"base_lr": config.base_lr})


def test_a_trial_is_recorded_reported_and_shown(home: Path) -> None:
    with opened(home) as session:
        request = _request(session)
        result = TrialEngine(session, keep_best=1).run(request)
        row = session.record.trial(session.study_id, 0)
        n_wrong = len(read_misclassified(session.record, "photos", 0))
        confusion = read_confusion(session.record, "photos", 0)
        alone = [m.val_acc for m in fit(request.config, session.data)]
    assert (result.state, result.value) == ("complete", row.value)
    assert (row.state, row.epochs_done, row.origin) == ("complete", 2, "by hand")
    assert optuna_trials(home)[0].intermediate_values == {1: alone[0], 2: alone[1]}
    with np.load(Path(str(row.checkpoint)) / "val_predictions.npz") as saved:
        is_right = saved["labels"] == saved["predicted"]
    assert row.value == alone[(row.best_epoch or 0) - 1] == is_right.mean()
    assert confusion is not None
    assert confusion.sum() - confusion.trace() == n_wrong == np.sum(~is_right)
    shown = [event for event in session.progress.events if hasattr(event, "trial")]
    kinds = [type(event) for event in shown if not isinstance(event, StepDone)]
    assert kinds == [TrialStarted, EpochEnded, EpochEnded, TrialEnded]
    done = [event.epochs for event in shown if isinstance(event, StepDone)]
    assert done == sorted(done) and done[-1] == 2


def test_optunas_dashboard_gets_attributes_and_artifacts_that_go_with_the_study(
    home: Path,
) -> None:
    run(config_of(home, 1))
    (trial,) = optuna_trials(home)
    assert {"seconds", "freeze level", "parameters trained"} <= set(trial.user_attrs)
    folder = home / "runs" / "optuna-artifacts"
    with Record(str(home / "s.db")) as record:
        found = get_all_artifact_meta(trial, storage=record.optuna_storage)
        files = {meta.filename: folder / meta.artifact_id for meta in found}
        assert sorted(files) == ["card.json", "confusion-matrix.csv", "learning-curve.csv"]
        assert pd.read_csv(files["learning-curve.csv"])["val_acc"].max() == trial.value
        confusion = pd.read_csv(files["confusion-matrix.csv"], index_col=0)
        assert list(confusion) == list(confusion.index) == ["blue", "red"]
        assert np.trace(confusion) / confusion.to_numpy().sum() == trial.value
        delete_study(record, "photos", command="delete")
    assert not folder.exists()


def test_the_caller_may_stop_a_trial_but_not_after_its_last_epoch(home: Path) -> None:
    asked: list[int] = []

    def stop(metrics: EpochMetrics) -> bool:
        asked.append(metrics.epoch)
        return metrics.epoch == 2

    with opened(home) as session:
        engine = TrialEngine(session)
        pruned = engine.run(_request(session, epochs=3), stop)
        whole = engine.run(_request(session, epochs=2), stop)
    assert (pruned.state, pruned.reason) == ("pruned", "pruned after epoch 2")
    assert (whole.state, asked) == ("complete", [1, 2, 1, 2])


def test_a_solved_head_is_one_epoch_that_cannot_be_pruned(home: Path) -> None:
    with opened(home) as session:
        request = _request(session, epochs=5, head_solver="logistic")
        result = TrialEngine(session).run(request, lambda _: True)
        row = session.record.trial(session.study_id, 0)
    assert (result.state, row.epochs_done) == ("complete", 1)
    assert "base_lr" in row.without_effect


def test_the_same_failure_three_times_in_a_row_halts_the_study_and_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> Iterator[EpochMetrics]:
        raise KeyError("a bug of ours")
        yield

    monkeypatch.setattr(trial_engine, "fit", broken)
    with pytest.raises(StudyHalted, match=r"3 trials in a row .* KeyError: 'a bug of ours'"):
        run(config_of(home, 9))
    rows = rows_of(home)
    assert [row.state for row in rows] == ["failed"] * 3
    with Record(str(home / "s.db")) as record:
        assert record.runs(record.study("photos").id)[0].outcome == "halted"
    assert main(["resume", "photos", "--storage", str(home / "s.db"), "--json"]) == 1
    assert "python -m study resume photos" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1 << 12, 1 << 20])  # of the record, of a checkpoint
def test_a_full_disk_ends_the_run_with_what_to_do_and_resume_continues(
    home: Path, size: int, limit_files: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        monkeypatch.context() as patch,
        pytest.raises(StudyHalted, match="disk.* Free space.*study resume photos"),
    ):
        patch.setattr("socket.gethostname", lambda: "elsewhere")  # it may not have signed off
        at = Reacts(lambda event: isinstance(event, EpochEnded), lambda: limit_files(size))
        run(config_of(home, 1), progress=at)
    limit_files(-1)
    (row,) = rows_of(home)
    assert row.ended_at is None
    storage = str(home / "s.db")
    assert main(["resume", "photos", "--storage", storage, "--json", "--take-over"]) == 0
    # A record that could not be written does not say why the process left.
    assert [row.state for row in rows_of(home) if row.reason != "killed"] == ["complete"]


def test_what_has_nothing_to_do_with_a_trial_is_told_apart() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = OSError("state.pt cannot be written")
    wrapped.__cause__ = full
    texted = OSError("m.safetensors cannot be written: No space left on device (os error 28)")
    for err in (full, wrapped, texted, OSError(errno.EROFS, "Read-only file system")):
        assert "Free space" in str(outside_cause(err))
    assert "Correct that" in str(outside_cause(FileNotFoundError("photo.png")))
    assert "the device failed" in str(outside_cause(RuntimeError("CUDA error: unknown error")))
    assert outside_cause(session_module.torch.OutOfMemoryError("CUDA error: memory")) is None
    assert outside_cause(ValueError("batch_size")) is None


def test_identity_leaves_out_what_does_not_change_the_numbers() -> None:
    plain = TrainConfig()
    assert identity(plain) == identity(replace(plain, workers=3))
    assert identity(plain) != identity(replace(plain, seed=3))
