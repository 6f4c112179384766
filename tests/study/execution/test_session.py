import hashlib
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from small_study import Listener, config_of, make_home

from core.cache import ArrayCache
from core.config import TrainConfig
from core.models.sources import BackboneError
from core.models.weights import WeightsError
from study.config.errors import ConfigError
from study.config.load import load_config
from study.config.search_space import distributions
from study.config.study_config import StudyConfig, config_diff
from study.execution.session import StudyHalted, corner_configs, made_with, open_session
from study.record.database import RecordError
from study.record.record import Record
from support import make_folder

NO_LINEAR_HEAD = ["backbone=squeezenet1_1", "image_size=64", "head_solver=logistic"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path, "[space]\nbase_lr = [0.1, 0.01]\n", n=10)


@pytest.fixture
def record(home: Path) -> Iterator[Record]:
    with Record(str(home / "s.db"), create=True) as record:
        yield record


def _config(home: Path, *settings: str) -> StudyConfig:
    return config_of(home, 20, *settings)


def _open(
    record: Record, config: StudyConfig, trains: list[TrainConfig] | None = None, **more: object
):
    trains = trains or [config.train]
    return open_session(record, config, trains, progress=Listener(), command="test", **more)


def _enter(record: Record, config: StudyConfig, **more: object) -> None:
    """Work on a study for no time at all."""
    with _open(record, config, **more):
        pass


def test_a_deadline_ends_the_decoding_of_images_and_nothing_is_recorded(
    tmp_path: Path, record: Record
) -> None:
    home = make_home(tmp_path, n=40)
    with pytest.raises(StudyHalted, match="64 of 80 were decoded when it ended"):
        _enter(record, _config(home), deadline=time.monotonic())
    assert record.find_study("photos") is None
    _enter(record, _config(home), deadline=time.monotonic() + 300)


def test_a_session_enters_the_study_warns_of_its_images_and_signs_off_with_its_reason(
    home: Path, record: Record
) -> None:
    config = _config(home)
    with _open(record, config) as session:
        (run,) = record.runs(session.study_id)
        assert (run.id, run.ended_at) == (session.run_id, None)
        session.because = "trials"
    assert "few training images: blue (6), red (6)." in session.progress.notes
    study = record.study("photos")
    assert record.runs(study.id)[0].outcome == "trials"
    assert not config_diff(StudyConfig.from_record(study.config), config)
    assert study.output == session.output == home / "runs" / "photos"
    assert (study.data["n_train"], study.data["n_val"], study.data["n_test"]) == (12, 4, 4)
    assert study.data["classes"] == ["blue", "red"]


def test_a_session_that_breaks_signs_off_as_an_error_and_gives_signals_back(
    home: Path, record: Record
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), _open(record, _config(home)):
        assert signal.getsignal(signal.SIGINT) is not before[0]
        raise KeyError("broken")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert record.runs(record.study("photos").id)[0].outcome == "error"
    _enter(record, _config(home))  # the next process may begin


@contextmanager
def _ignored(number: signal.Signals) -> Iterator[None]:
    before = signal.signal(number, signal.SIG_IGN)
    yield
    signal.signal(number, before)


def test_the_first_signal_is_a_wish_to_stop(home: Path, record: Record) -> None:
    with _open(record, _config(home)) as session:
        assert not session.stop.is_set()
        signal.raise_signal(signal.SIGTERM)
        assert (session.stop.is_set(), session.progress.stopped_by) == (True, signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)  # a terminal that closes may send several
    with _ignored(signal.SIGHUP), _open(record, _config(home)) as session:  # under nohup
        signal.raise_signal(signal.SIGHUP)
        assert not session.stop.is_set()


def test_the_cache_has_the_budget_of_the_study_or_a_tenth_of_the_free_disk(
    home: Path, record: Record
) -> None:
    def cache_of(*settings: str) -> ArrayCache | None:
        with _open(record, _config(home, *settings)) as session:
            return session.cache

    asked, free = cache_of("study.cache=8GB"), cache_of()
    assert asked is not None and free is not None
    assert (asked.folder, asked.budget) == (home / "cache" / "arrays", 8 * 10**9)
    assert 0 < free.budget <= 0.11 * psutil.disk_usage(str(home)).free
    assert cache_of("study.cache=0") is None


def test_another_process_at_work_is_refused_and_nothing_of_the_study_changes(
    home: Path, record: Record
) -> None:
    with _open(record, _config(home)):
        before = record.study("photos")
        with pytest.raises(RecordError, match="is being run by process"):
            _enter(record, config_of(home, 99))
        assert record.study("photos") == before


def test_another_configuration_is_refused_with_what_differs_in_the_results(
    home: Path, record: Record
) -> None:
    free = ("train.workers=0", "ablation.replicates=9")
    other = _config(home, "train.epochs=3", *free)
    _enter(record, _config(home))
    with pytest.raises(ConfigError) as caught:
        _enter(record, other)
    assert str(caught.value).count("->") == 1 and "train.epochs: 2 -> 3" in str(caught.value)
    assert len(record.runs(record.study("photos").id)) == 1
    _enter(record, _config(home, *free))
    assert record.study("photos").config["ablation"]["replicates"] == 9
    _enter(record, other, allow_changes=True)
    assert record.study("photos").config["train"]["epochs"] == 3


@pytest.mark.parametrize("dimension", ["[0.1, 0.3]", "{low = 0.1, high = 0.3}"])
def test_a_dimension_that_optuna_cannot_have_beside_the_old_one_is_refused(
    dimension: str, home: Path, record: Record
) -> None:
    _enter(record, _config(home))
    study, space = record.study("photos"), distributions(_config(home).space)
    record.tell(study.id, record.start_trial(study.id, {"base_lr": 0.1}, space).number, "failed")
    with pytest.raises(ConfigError, match=r"space.base_lr: must keep its choices.*another --name"):
        _enter(record, _config(home, f"space.base_lr={dimension}"), allow_changes=True)
    assert record.study("photos") == study
    _enter(record, _config(home, "space.crop_scale=[0.1, 0.3]"), allow_changes=True)


def test_changed_images_are_refused_with_counts(home: Path, record: Record) -> None:
    _enter(record, _config(home))
    make_folder(home / "photos", {"red": 15}, seed=3)
    with pytest.raises(ConfigError, match=r"began: 12 \+ 4 \+ . images of .* then, 15 \+ 5 "):
        _enter(record, _config(home))


@pytest.mark.parametrize(
    ("settings", "error", "shown"),
    [
        (["train.batch_size=13"], ConfigError, r"training images, 12, but got batch_size=13"),
        (["train.weights=nowhere.pth"], WeightsError, "there is no file"),
        ([*NO_LINEAR_HEAD, "space.freeze_depth=[3, 5]"], BackboneError, "train.head_solver=sgd"),
        (
            [*NO_LINEAR_HEAD, 'space.head_init=["default", "solved"]'],
            BackboneError,
            "train.backbone .*'squeezenet1_1'.*train.head_init=default",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_study_is_entered(
    settings: list[str], error: type[ValueError], shown: str, home: Path, record: Record
) -> None:
    config = _config(home, *settings)
    with pytest.raises(error, match=shown):
        _enter(record, config, trains=corner_configs(config, with_starts=True))
    assert record.studies() == []


def test_corners_are_every_network_at_the_largest_batch() -> None:
    backbones = ("resnet18", "resnet34", "resnet50")
    sizes = "image_size={low=32, high=64}, batch_size={low=4, high=8}"
    space = f"space={{backbone={list(backbones)}, {sizes}, base_lr=[0.1, 0.01]}}"
    for strategy, sides in (("sampler", (32, 64)), ("plan", (32,))):
        corners = corner_configs(load_config(None, [space, f"search.strategy={strategy}"]))
        found = [(c.backbone, c.image_size, c.batch_size) for c in corners]
        assert found == [(backbone, side, 8) for backbone in backbones for side in sides]
    starts = corner_configs(load_config(None, [space]), with_starts=True)
    assert {train.batch_size for train in starts} == {4, 8}  # 1 is refused for some networks


def test_a_run_keeps_the_commit_and_the_hash_of_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    file = tmp_path / "own.pth"
    file.write_bytes(b"weights")
    train = TrainConfig(backbone="resnet18", weights=str(file), normalize="none")
    found = made_with([train, train])
    assert found["weights of resnet18"] == hashlib.sha256(b"weights").hexdigest()
    assert "git commit" not in found
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "first")):
        subprocess.run([*git, *command], check=True)
    clean = made_with([])["git commit"]
    file.write_bytes(b"others")
    assert len(clean) == 12 and made_with([])["git commit"] == f"{clean}-dirty"
