"""What a planned search leaves: the model, its refits, its deadline and its resumption."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from small_study import config_of, make_home, rows_of, run

from core.config import TrainConfig
from core.metrics import Evaluation, Reference
from core.model import load_model
from core.training.checkpoint import write_predictions
from study.cli.delete import delete_study
from study.config.errors import ConfigError
from study.execution.progress import QuietProgress
from study.execution.session import StudyHalted
from study.record.models import Trial
from study.record.record import Record
from study.search import first_look, search
from study.search.choice import choose
from study.search.final_test import test_model as read_test_split

SPACE = """
[search]
strategy = "plan"
[space]
freeze_depth = {low = 3, high = 5}
features = ["several", "last"]
"""
SETTINGS = ('train.head_solver="logistic"', "train.epochs=4")
NETWORKS = {"space.backbone": ["timm:test_resnet", "timm:test_efficientnet"]}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planned search that came to its end; tests leave it as it is."""
    home = make_home(tmp_path_factory.mktemp("done"), SPACE, n=40)
    outcome = run(config_of(home, 30, *SETTINGS, **NETWORKS))
    assert outcome.stopped_because == "no gain"
    return home


def _model(home: Path) -> dict[str, Any]:
    return json.loads((home / "runs" / "photos" / "model" / "model.json").read_bytes())


def test_a_plan_solves_heads_thaws_and_ends_with_a_model_that_is_refitted(done: Path) -> None:
    rows = rows_of(done)
    assert [row.freeze_depth for row in rows[:4]] == [5, 5, 5, 4]
    assert all(row.origin.startswith("plan: ") for row in rows)
    model = _model(done)
    best = max(row.ranked_by or 0 for row in rows if row.state == "complete")
    assert model["score"] >= best
    assert model["refitted"] == [True] * len(model["trials"])
    photos = sorted((done / "photos").rglob("*.png"))
    assert load_model(done / "runs" / "photos" / "model").predict(photos).shape == (len(photos), 2)


def test_a_refit_has_other_weights_than_its_trial_and_the_model_has_them(done: Path) -> None:
    for member, number in zip(_model(done)["members"], _model(done)["trials"], strict=True):
        folder = done / "runs" / "photos"
        own = safetensors.torch.load_file(folder / f"trial-{number:04d}" / "model.safetensors")
        refit = safetensors.torch.load_file(folder / f"trial-{number:04d}" / "refit.safetensors")
        found = safetensors.torch.load_file(
            folder / "model" / member["folder"] / "model.safetensors"
        )
        assert found.keys() == own.keys() and refit.keys() <= own.keys()
        assert all((found[name] == refit[name]).all() for name in refit)
        assert any((own[name] != refit[name]).any() for name in refit)


def test_the_model_is_tested_once_and_only_its_own_files_go_with_the_study(tmp_path: Path) -> None:
    home = make_home(tmp_path, SPACE, n=40)
    run(config_of(home, 3, *SETTINGS, **NETWORKS))
    own = home / "runs" / "photos" / "model"
    (own / "notes.txt").write_text("mine")
    with Record(str(home / "s.db")) as record:
        options: dict[str, Any] = {"progress": QuietProgress(), "command": "test"}
        first = read_test_split(record, "photos", **options)
        assert read_test_split(record, "photos", **options).id == first.id
        assert first.of == "the model" and first.val_acc == _model(home)["val_acc"]
        delete_study(record, "photos", command="delete")
    assert [path.name for path in own.iterdir()] == ["notes.txt"]


def test_a_trial_that_meets_the_deadline_is_continued_and_gives_what_it_would_have(
    tmp_path: Path,
) -> None:
    settings = (*SETTINGS, "train.epochs=300", "space.freeze_depth=4", "train.views=2")
    cut, whole = (make_home(tmp_path / name, SPACE, n=40) for name in ("cut", "whole"))
    outcome = run(config_of(cut, 1, *settings, **{"study.time": 6.0}))
    assert outcome.stopped_because == "timeout"
    assert [row.state for row in rows_of(cut)] == ["interrupted"]
    for home in (cut, whole):
        assert run(config_of(home, 1, *settings)).stopped_because == "trials"
    one, two = rows_of(cut), rows_of(whole)
    assert [(row.number, row.score, row.weights_hash) for row in one] == [
        (row.number, row.score, row.weights_hash) for row in two
    ]


def _trial(
    folder: Path, number: int, backbone: str, probabilities: Any, freeze_depth: int = 5
) -> Trial:
    folder = folder / f"trial-{number:04d}"
    folder.mkdir()
    labels = np.arange(len(probabilities)) // 2 % 2
    paths = [f"{i}.png" for i in range(len(labels))]
    evaluation = Evaluation(labels, np.log(probabilities))
    rest = evaluation if freeze_depth == 5 else None
    write_predictions(folder, evaluation, paths, rest)
    score = Reference().score(Evaluation(labels, np.log(probabilities)), "val_loss")
    config = {**asdict(TrainConfig()), "backbone": backbone, "freeze_depth": freeze_depth}
    row = Trial(study_id=1, number=number, run_id=1, origin="plan", config=config, config_hash="",
                device="cpu", score=score)  # fmt: skip
    row.state, row.value, row.checkpoint = "complete", score, str(folder)
    return row


@pytest.mark.parametrize(("finish", "n_members"), [("ensemble", 2), ("single", 1)])
def test_trials_that_err_on_different_images_are_averaged(
    tmp_path: Path, finish: str, n_members: int
) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(400) // 2 % 2
    rows = []
    for number, backbone in enumerate(("a", "b")):
        right = np.where(rng.random(400) < 0.85, 0.85, 0.15)
        first = np.where(labels == 0, right, 1 - right)
        probabilities = np.stack([first, 1 - first], axis=1)
        rows.append(_trial(tmp_path, number, backbone, probabilities))
    found = choose(rows, finish, "val_loss")
    assert len(found.trials) == n_members
    best = max(row.score or 0 for row in rows)
    assert found.score == pytest.approx(best) if n_members == 1 else found.score > best


@pytest.mark.parametrize(("skill", "n_members"), [(0.9, 3), (0.72, 2)])
def test_a_thawed_trial_joins_the_heads_where_it_lowers_their_loss_beyond_doubt(
    tmp_path: Path, skill: float, n_members: int
) -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(300) // 2 % 2
    rows = []
    for number, (level, own) in enumerate(((5, 0.85), (5, 0.85), (3, skill))):
        right = np.where(rng.random(300) < own, own, 1 - own)
        first = np.where(labels == 0, right, 1 - right)
        probabilities = np.stack([first, 1 - first], axis=1)
        rows.append(_trial(tmp_path, number, "abc"[number], probabilities, level))
    heads, found = (choose(part, "ensemble", "val_loss") for part in (rows[:2], rows))
    assert len(found.trials) == n_members
    assert sum(found.weights) == pytest.approx(1)
    assert found.score > heads.score if n_members == 3 else found.score == heads.score


@pytest.mark.parametrize("n_heads", [1, 2])
def test_a_thawed_trial_of_a_high_score_alone_does_not_replace_the_heads(
    tmp_path: Path, n_heads: int
) -> None:
    labels = np.arange(60) // 2 % 2
    first = np.where(labels == np.where(np.arange(60) % 7 == 0, 1, 0), 0.85, 0.15)
    probabilities = np.stack([first, 1 - first], axis=1)
    rows = [_trial(tmp_path, n, "ab"[n], probabilities) for n in range(n_heads)]
    rows.append(_trial(tmp_path, 2, "b", probabilities, freeze_depth=3))
    rows[-1].score = 0.99  # one fold is more difficult for its own head than for the others
    assert 2 not in [row.number for row in choose(rows, "ensemble", "val_loss").trials]
    assert [row.number for row in choose(rows, "single", "val_loss").trials] == [2]


def test_a_plan_that_a_study_left_is_run_again_and_gives_the_same(
    done: Path, tmp_path: Path
) -> None:
    home = make_home(tmp_path, SPACE, n=40)
    plan = done / "runs" / "photos" / "plan.json"
    outcome = run(config_of(home, 30, *SETTINGS, **NETWORKS), plan=plan)
    assert outcome.stopped_because == "plan"
    figures = [[(row.params, row.score, row.state) for row in rows_of(h)] for h in (done, home)]
    assert figures[0] == figures[1]
    untried = {**figures[0][0][0], "freeze_depth": 3, "features": "last"}
    (home / "plan.json").write_text(json.dumps([{"params": untried}]))
    with pytest.raises(ConfigError, match="has other trials"):
        run(config_of(home, 30, *SETTINGS, **NETWORKS), plan=home / "plan.json")


@pytest.mark.parametrize("text", ["", "[1]", '[{"params": {"freeze_depth": 9}}]'])
def test_a_plan_that_cannot_be_run_is_refused(tmp_path: Path, text: str) -> None:
    home = make_home(tmp_path, SPACE)
    (home / "plan.json").write_text(text)
    with pytest.raises(ConfigError, match="--plan"):
        run(config_of(home, 3, *SETTINGS, **NETWORKS), plan=home / "plan.json")
    assert not (home / "s.db").exists()


def test_without_refit_the_model_has_seen_no_validation_image(tmp_path: Path) -> None:
    home = make_home(tmp_path, SPACE, n=40)
    config = {**NETWORKS, "study.refit": False, "study.finish": "single"}
    own = home / "runs" / "photos" / "model" / "member-mine"
    own.mkdir(parents=True)  # a user's folder stays, whatever it is called
    run(config_of(home, 2, *SETTINGS, **config))
    (number,), (member,) = _model(home)["trials"], _model(home)["members"]
    trial = home / "runs" / "photos" / f"trial-{number:04d}" / "model.safetensors"
    model = home / "runs" / "photos" / "model" / member["folder"] / "model.safetensors"
    assert model.read_bytes() == trial.read_bytes() and own.is_dir()
    # A later process knows what is there, and a refit makes it another.
    before = (home / "runs" / "photos" / "model" / "model.json").read_bytes()
    run(config_of(home, 2, *SETTINGS, **config))
    assert (home / "runs" / "photos" / "model" / "model.json").read_bytes() == before
    run(config_of(home, 2, *SETTINGS, **config | {"study.refit": True}))
    assert _model(home)["refitted"] == [True]


def test_of_many_images_a_sample_gives_a_first_model_which_is_not_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_look, "_MANY", 30)
    monkeypatch.setattr(first_look, "_SAMPLE", 20)
    home = make_home(tmp_path, SPACE, n=40)
    settings = config_of(home, 1, *SETTINGS, **NETWORKS, **{"study.time": 300.0})
    model = home / "runs" / "photos" / "model"
    with monkeypatch.context() as patch:  # a run that ends before the first trial
        patch.setattr(search, "open_session", _fail)
        with pytest.raises(StudyHalted):
            run(settings)
    assert _model(home)["trials"] == [] and 15 < _model(home)["n_images"] <= 20
    assert load_model(model).classes == ("blue", "red")
    run(settings)
    assert _model(home)["trials"] == [0] and not (model.parent / "first-look").exists()


def _fail(*_: object, **__: object) -> Any:
    raise StudyHalted("no time")


@pytest.mark.parametrize("n_second", [100, 99], ids=["equal", "on other images"])
def test_trials_that_add_nothing_are_not_averaged(tmp_path: Path, n_second: int) -> None:
    first = np.where(np.arange(100) // 2 % 2 == 0, 0.8, 0.3)
    probabilities = np.stack([first, 1 - first], axis=1)
    sizes = (100, n_second)
    rows = [_trial(tmp_path, k, "ab"[k], probabilities[: sizes[k]]) for k in range(2)]
    assert len(choose(rows, "ensemble", "val_loss").trials) == 1
