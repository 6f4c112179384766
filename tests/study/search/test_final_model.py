"""What a planned search leaves: the model, its refits, its deadline and its resumption."""

import json
import shutil
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from small_study import Reacts, bare_trial, config_of, make_home, rows_of, run

from core.config import TrainConfig
from core.metrics import Evaluation, Reference
from core.model import load_model
from core.training.checkpoint import write_predictions
from study.cli.delete import delete_study
from study.cli.views import summary_view
from study.config.errors import ConfigError
from study.execution.progress import Note, QuietProgress
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
    folder = done / "runs" / "photos"
    for member, number in zip(_model(done)["members"], _model(done)["trials"], strict=True):
        trial, copy = folder / f"trial-{number:04d}", folder / "model" / member["folder"]
        files = (trial / "model", trial / "refit", copy / "model")
        paths = (file.with_suffix(".safetensors") for file in files)
        own, refit, found = map(safetensors.torch.load_file, paths)
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
        facts = (own / "model.json").read_text()
        (own / "model.json").write_text(json.dumps(_model(home) | {"created_at": "2020"}))
        with pytest.raises(ConfigError, match="must have its own model"):
            read_test_split(record, "photos", **options)
        (own / "model.json").write_text(facts)
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
    one, two = (
        [(row.number, row.score, row.weights_hash) for row in rows_of(home)]
        for home in (cut, whole)
    )
    assert one == two


def _trial(folder: Path, number: int, backbone: str, first: Any, freeze_depth: int = 5) -> Trial:
    """Make a trial that gives the first of two classes these probabilities."""
    folder = folder / f"trial-{number:04d}"
    folder.mkdir()
    labels = np.arange(len(first)) // 2 % 2
    paths = [f"{i}.png" for i in range(len(labels))]
    evaluation = Evaluation(labels, np.log(np.stack([first, 1 - first], axis=1)))
    write_predictions(folder, evaluation, paths, evaluation if freeze_depth == 5 else None)
    score = Reference().score(evaluation, "val_loss")
    config = {**asdict(TrainConfig()), "backbone": backbone, "freeze_depth": freeze_depth}
    row = bare_trial(number, config)
    row.state, row.score, row.value, row.checkpoint = "complete", score, score, str(folder)
    return row


def _drawn(folder: Path, seed: int, n: int, *members: tuple[int, float]) -> list[Trial]:
    """Make trials of levels and skills, each of which errs on images of its own."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, (level, skill) in enumerate(members):
        right = np.where(rng.random(n) < skill, skill, 1 - skill)
        first = np.where(np.arange(n) // 2 % 2 == 0, right, 1 - right)
        rows.append(_trial(folder, number, "abc"[number], first, level))
    return rows


def test_trials_that_err_on_different_images_are_averaged(tmp_path: Path) -> None:
    rows = _drawn(tmp_path, 0, 400, (5, 0.85), (5, 0.85))
    best = max(row.score or 0 for row in rows)
    alone, both = (choose(rows, finish, "val_loss") for finish in ("single", "ensemble"))
    assert (len(alone.trials), alone.score) == (1, pytest.approx(best))
    assert len(both.trials) == 2 and both.score > best


@pytest.mark.parametrize(("n", "skill", "n_members"), [(100, 0.85, 2), (400, 0.6, 1)])
def test_the_best_head_replaces_the_mean_only_beyond_doubt(
    tmp_path: Path, n: int, skill: float, n_members: int
) -> None:
    rows = _drawn(tmp_path, 2, n, (5, 0.9), (5, skill))
    found = choose(rows, "ensemble", "val_loss")
    assert len(found.trials) == n_members and found.score <= max(row.score or 0 for row in rows)


@pytest.mark.parametrize(("skill", "n_members"), [(0.9, 3), (0.72, 2)])
def test_a_thawed_trial_joins_the_heads_where_it_lowers_their_loss_beyond_doubt(
    tmp_path: Path, skill: float, n_members: int
) -> None:
    rows = _drawn(tmp_path, 1, 300, (5, 0.85), (5, 0.85), (3, skill))
    rows[-1].score = 0.99  # the best of many
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
    rows = [_trial(tmp_path, n, "ab"[n], first) for n in range(n_heads)]
    rows.append(_trial(tmp_path, 2, "b", first, freeze_depth=3))
    rows[-1].score = 0.99  # one fold is more difficult for its own head than for the others
    assert 2 not in [row.number for row in choose(rows, "ensemble", "val_loss").trials]
    assert [row.number for row in choose(rows, "single", "val_loss").trials] == [2]


def test_a_plan_that_a_study_left_is_run_again_and_gives_the_same(
    done: Path, tmp_path: Path
) -> None:
    home = make_home(tmp_path, SPACE, n=40)
    config, plan = config_of(home, 30, *SETTINGS, **NETWORKS), home / "plan.json"
    outcome = run(config, plan=done / "runs" / "photos" / "plan.json")
    assert outcome.stopped_because == "plan"
    first, again = (
        [(row.params, row.score, row.state) for row in rows_of(place)] for place in (done, home)
    )
    assert first == again
    assert run(config_of(home, 30, *SETTINGS, **NETWORKS)).stopped_because == "plan"  # resumed
    untried = first[0][0] | {"freeze_depth": 3, "features": "last"}
    plan.write_text(json.dumps([{"params": untried}]))
    with pytest.raises(ConfigError, match="has other trials"):
        run(config, plan=plan)


@pytest.mark.parametrize("text", ["", "[1]", '[{"params": {"freeze_depth": 9}}]'])
def test_a_plan_that_cannot_be_run_is_refused(tmp_path: Path, text: str) -> None:
    home = make_home(tmp_path, SPACE)
    (home / "plan.json").write_text(text)
    with pytest.raises(ConfigError, match="--plan"):
        run(config_of(home, 3, *SETTINGS, **NETWORKS), plan=home / "plan.json")
    assert not (home / "s.db").exists()


def test_ctrl_c_in_a_refit_ends_a_study_that_resume_refits(tmp_path: Path) -> None:
    home = make_home(tmp_path, SPACE, n=40)
    config = config_of(home, 3, *SETTINGS, "space.freeze_depth=4", "train.epochs=40")
    in_a_refit = Reacts(
        lambda event: isinstance(event, Note) and "fitted again" in event.text,
        lambda: signal.raise_signal(signal.SIGINT),
    )
    assert run(config, progress=in_a_refit).stopped_because == "interrupted"
    assert _model(home)["refitted"] == [False]
    assert run(config).stopped_because != "interrupted"
    assert _model(home)["refitted"] == [True]


def test_without_refit_the_model_has_seen_no_validation_image(tmp_path: Path) -> None:
    home = make_home(tmp_path, SPACE, n=40)
    config = {**NETWORKS, "study.refit": False, "study.finish": "single"}
    folder = home / "runs" / "photos"
    own = folder / "model" / "member-mine"
    own.mkdir(parents=True)  # a user's folder stays, whatever it is called
    run(config_of(home, 2, *SETTINGS, **config))
    (number,), (member,) = _model(home)["trials"], _model(home)["members"]
    trial = folder / f"trial-{number:04d}" / "model.safetensors"
    model = folder / "model" / member["folder"] / "model.safetensors"
    assert model.read_bytes() == trial.read_bytes() and own.is_dir()
    # A later process knows what is there, and a refit makes it another.
    before = _model(home)
    (folder / "splits.csv").write_text("split,pa")  # the disk was full
    run(config_of(home, 2, *SETTINGS, **config))
    assert _model(home) == before
    run(config_of(home, 2, *SETTINGS, **config | {"study.refit": True}))
    assert _model(home)["refitted"] == [True]
    shutil.rmtree(trial.parent)  # then another trial's checkpoint gives the model
    run(config_of(home, 2, *SETTINGS, **config))
    assert _model(home)["trials"] != [number]


def test_of_many_images_a_sample_gives_a_first_model_which_is_not_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_look, "_MANY", 60)
    monkeypatch.setattr(first_look, "_SAMPLE", 40)
    home = make_home(tmp_path, SPACE, n=40)
    settings = config_of(home, 1, *SETTINGS, **NETWORKS, **{"study.time": 30.0})  # half of both
    model = home / "runs" / "photos" / "model"
    with monkeypatch.context() as patch:  # a run that ends before the first trial
        patch.setattr(search._Search, "_reason_to_stop", lambda _: "timeout")
        found = run(settings)
    n = _model(home)["n_images"]
    assert _model(home)["trials"] == [] and found.n_first_look == n and 15 < n <= 20
    assert (
        f"from {n} of the images" in summary_view(found, settings.study, 0.0).renderables[1].plain
    )
    assert load_model(model).classes == ("blue", "red")
    run(settings)
    assert _model(home)["trials"] == [0] and not (model.parent / "first-look").exists()


@pytest.mark.parametrize("n_second", [100, 99], ids=["equal", "on other images"])
def test_trials_that_add_nothing_are_not_averaged(tmp_path: Path, n_second: int) -> None:
    first = np.where(np.arange(100) // 2 % 2 == 0, 0.8, 0.3)
    rows = [_trial(tmp_path, k, "ab"[k], first[:n]) for k, n in enumerate((100, n_second))]
    assert len(choose(rows, "ensemble", "val_loss").trials) == 1
