import dataclasses
import signal
from pathlib import Path
from unittest import mock

import psutil
import pytest

from core.config import TrainConfig
from core.data.splits import ImageData
from core.fit import build_for
from core.models.builder import Network, input_of
from core.models.weights import WeightsError
from study import session as session_module
from study.config.errors import ConfigError
from study.config.load import load_config
from study.config.study_config import StudyConfig
from study.progress import QuietProgress
from study.record.database import RecordError
from study.record.models import Trial
from study.record.record import Record
from study.runner import Work
from study.session import (
    close_killed,
    corner_configs,
    load_pictures,
    open_session,
    picture_size,
    preflight,
    versions,
)
from support import make_folder

SETTINGS = [
    "train.backbone=resnet18",
    "train.weights=none",
    "train.image_size=32",
    "train.batch_size=8",
    "train.device=cpu",
]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    make_folder(tmp_path / "photos", {"red": 10, "blue": 10})
    (tmp_path / "study.toml").write_text("[space]\nbase_lr = [0.1, 0.01]\n")
    return tmp_path


def _config(home: Path, *settings: str) -> StudyConfig:
    flags = {
        "data.source": str(home / "photos"),
        "data.cache_dir": str(home / "cache"),
        "study.storage": str(home / "s.db"),
        "study.output": str(home / "runs"),
    }
    return load_config(home / "study.toml", [*SETTINGS, *settings], flags)


def _open(store: Record, config: StudyConfig, **more: object):
    progress = QuietProgress()
    return open_session(store, config, [config.train], progress=progress, command="test", **more)


@pytest.fixture
def store(home: Path) -> Record:
    return Record.open(str(home / "s.db"), create=True)


def test_a_session_enters_the_study_and_signs_off_with_its_reason(
    home: Path, store: Record
) -> None:
    config = _config(home)
    with _open(store, config) as session:
        (run,) = store.runs(session.work.study_id)
        assert (run.id, run.ended_at) == (session.work.run_id, None)
        assert session.work.output == home / "runs" / "photos"
        session.because = "trials"
    study = store.study("photos")
    assert store.runs(study.id)[0].outcome == "trials"
    assert StudyConfig.from_record(study.config) == config
    assert (study.data["n_train"], study.data["n_val"], study.data["n_test"]) == (12, 4, 4)
    assert study.data["classes"] == ["blue", "red"]


def test_a_session_that_breaks_signs_off_as_an_error_and_gives_signals_back(
    home: Path, store: Record
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), _open(store, _config(home)):
        assert signal.getsignal(signal.SIGINT) is not before[0]
        raise KeyError("broken")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert store.runs(store.study("photos").id)[0].outcome == "error"
    with _open(store, _config(home)) as session:  # and the next process may begin
        session.because = "trials"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_wish_to_stop(
    number: signal.Signals, home: Path, store: Record
) -> None:
    with _open(store, _config(home)) as session:
        assert not session.work.stop.is_set()
        signal.raise_signal(number)
        assert session.work.stop.is_set()


def test_one_budget_is_divided_between_memory_and_disk(home: Path, store: Record) -> None:
    with _open(store, _config(home, "study.cache=8GB")) as session:
        cache = session.work.cache
        assert cache is not None and cache.disk is not None
        assert (cache.budget_bytes, cache.disk.budget_bytes) == (4 * 10**9, 4 * 10**9)
        assert cache.disk.folder == home / "cache" / "entries"


def test_unasked_the_cache_takes_a_part_of_what_is_free_and_none_where_nothing_is_shared(
    home: Path, store: Record
) -> None:
    with _open(store, _config(home)) as session:
        cache = session.work.cache
        assert cache is not None and cache.disk is not None
        assert 0 < cache.budget_bytes < psutil.virtual_memory().total
        assert 0 < cache.disk.budget_bytes <= cache.budget_bytes
    with _open(store, _config(home, "study.cache=0")) as session:
        assert session.work.cache is None


def test_another_process_at_work_is_refused_and_nothing_of_the_study_changes(
    home: Path, store: Record
) -> None:
    with _open(store, _config(home)):
        before = store.study("photos")
        with (
            pytest.raises(RecordError, match="is being run by process"),
            _open(store, _config(home, "study.trials=99")),
        ):
            raise AssertionError("two sessions at once")
        assert store.study("photos") == before


def test_another_configuration_is_refused_with_the_difference(home: Path, store: Record) -> None:
    with _open(store, _config(home)):
        pass
    with (
        pytest.raises(ConfigError, match=r"already in .* with another configuration:\n  train.ep"),
        _open(store, _config(home, "train.epochs=3")),
    ):
        raise AssertionError("it began")
    assert len(store.runs(store.study("photos").id)) == 1
    with _open(store, _config(home, "train.epochs=3"), allow_changes=True):
        pass
    assert store.study("photos").config["train"]["epochs"] == 3


def test_keys_that_change_no_result_may_change(home: Path, store: Record) -> None:
    with _open(store, _config(home)):
        pass
    free = ["study.trials=50", "train.workers=0", "ablation.replicates=9"]
    with _open(store, _config(home, *free)):
        pass
    record = store.study("photos").config
    assert (record["study"]["trials"], record["ablation"]["replicates"]) == (50, 9)


def test_changed_pictures_are_refused_with_counts(home: Path, store: Record) -> None:
    with _open(store, _config(home)):
        pass
    make_folder(home / "photos", {"red": 15}, seed=3)
    with (
        pytest.raises(ConfigError, match=r"have changed since it began \(12 \+ 4 then, 15 \+ 5"),
        _open(store, _config(home)),
    ):
        raise AssertionError("it began")


@pytest.mark.parametrize(
    ("setting", "error", "told"),
    [
        ("train.batch_size=13", ConfigError, r"training pictures, 12, but got batch_size=13"),
        ("train.weights=nowhere.pth", WeightsError, "there is no file"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_study_is_entered(
    setting: str, error: type[ValueError], told: str, home: Path, store: Record
) -> None:
    with pytest.raises(error, match=told), _open(store, _config(home, setting)):
        raise AssertionError("it began")
    assert store.studies() == []


def _data(home: Path) -> ImageData:
    return load_pictures(_config(home), QuietProgress())


def test_every_different_network_is_tried_once(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    def recorded(config: TrainConfig, classes: tuple[str, ...]) -> Network:
        built.append((config.backbone, config.weights, config.image_size, config.normalize))
        return build_for(config, classes)

    monkeypatch.setattr(session_module, "build_for", recorded)
    train = _config(home).train
    others = [
        dataclasses.replace(train, base_lr=0.5, seed=4, freeze_depth=2),
        dataclasses.replace(train, image_size=64),
        dataclasses.replace(train, backbone="resnet34"),
        dataclasses.replace(train, normalize="none"),
        dataclasses.replace(train, backbone="resnet34", augment="none"),
    ]
    preflight([train, *others], _data(home))
    assert built == [
        ("resnet18", "none", 32, "weights"),
        ("resnet18", "none", 64, "weights"),
        ("resnet34", "none", 32, "weights"),
        ("resnet18", "none", 32, "none"),
    ]


def test_the_largest_batch_of_all_must_fit(home: Path) -> None:
    train = _config(home).train
    fits = dataclasses.replace(train, batch_size=12)
    preflight([train, fits], _data(home))
    with pytest.raises(ConfigError, match="batch_size=13; set it smaller"):
        preflight([train, dataclasses.replace(train, batch_size=13), fits], _data(home))


def test_pictures_are_kept_large_enough_for_every_network() -> None:
    small = TrainConfig(backbone="resnet18", weights="none", image_size=32)
    large = dataclasses.replace(small, image_size=96)
    resize = input_of("resnet18", "none", 96).resize_size
    assert picture_size([small, large]) == round(1.25 * resize)
    assert picture_size([large]) == picture_size([large, small, small])
    assert picture_size([small]) < picture_size([large])


def test_corners_are_every_network_at_the_largest_batch(home: Path) -> None:
    (home / "study.toml").write_text(
        '[space]\nbackbone = ["resnet18", "resnet34", "resnet50"]\n'
        "image_size = {low = 32, high = 64}\nbatch_size = {low = 4, high = 8}\n"
        "base_lr = [0.1, 0.01]\n"
    )
    flags = {"data.source": str(home / "photos")}
    corners = corner_configs(load_config(home / "study.toml", [], flags))
    found = [(c.backbone, c.image_size, c.batch_size) for c in corners]
    assert found == [
        (backbone, size, 8)
        for backbone in ("resnet18", "resnet34", "resnet50")
        for size in (32, 64)
    ]


def test_warnings_about_pictures_are_told(home: Path) -> None:
    class Listens(QuietProgress):
        def __init__(self) -> None:
            super().__init__()
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    progress = Listens()
    load_pictures(_config(home), progress)
    assert progress.notes == ["few training images: blue (6), red (6)."]


def _begin(work: Work) -> int:
    trial = work.store.start_trial(work.study_id, {}, {})
    trial.report(0.75, 1)
    row = Trial(
        study_id=work.study_id,
        number=trial.number,
        run_id=work.run_id,
        origin="sampler",
        config={},
        config_hash="h",
        device="cpu",
    )
    return work.store.begin_trial(row)


def test_close_killed_fails_what_had_not_ended_and_reports_what_had(
    home: Path, store: Record
) -> None:
    with _open(store, _config(home)) as session:
        work = session.work
        _begin(work)
        for reason in (None, "pruned after epoch 1", "diverged: nan"):
            # As if the process had died between the two commits at a trial's end.
            with mock.patch.object(store, "tell"):
                store.end_trial(
                    _begin(work), "", reason=reason, value=0.75, best_epoch=0, epochs_done=1,
                    duration_s=1.0, checkpoint=None,
                )  # fmt: skip
        store.start_trial(work.study_id, {}, {})  # asked for, but never begun
        before = store.trials(work.study_id)
        assert [row.state for row in before] == ["running"] * 4
        close_killed(work)
        rows = store.trials(work.study_id)
        optunas = store.optuna_study(work.study_id).trials
    assert [(row.state, row.reason) for row in rows] == [
        ("failed", "killed"),
        ("complete", None),
        ("pruned", "pruned after epoch 1"),
        ("failed", "diverged: nan"),
    ]
    assert [trial.state.name for trial in optunas] == [
        "FAIL", "COMPLETE", "PRUNED", "FAIL", "FAIL",
    ]  # fmt: skip
    assert [trial.value for trial in optunas[1:3]] == [0.75, 0.75]
    assert rows[0].ended_at is not None
    assert rows[1:] == [
        dataclasses.replace(row, state=after.state)
        for row, after in zip(before[1:], rows[1:], strict=True)
    ]


def test_the_versions_that_decide_numbers_are_named() -> None:
    found = versions()
    assert {"python", "torch", "frostline", "optuna", "numpy", "pillow"} <= set(found)
    assert all(found.values())


def test_a_probe_on_a_head_that_is_no_linear_layer_is_refused_before_any_trial(
    home: Path,
) -> None:
    settings = ["train.backbone=squeezenet1_1", "train.image_size=64", "train.head_init=probe"]
    config = _config(home, *settings)
    data = load_pictures(config, QuietProgress())
    with pytest.raises(ValueError, match=r"head_init = probe needs .*--set train.head_init"):
        preflight([config.train], data)
