"""What must hold however the inside is built: the program used as its user uses it.

Same numbers twice, whatever happened in between; frozen parts frozen; the checkpoint the one
that was recorded; verdicts right; the test split out of the search.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

from command_line import (
    PRETRAINED,
    VIT,
    ablation,
    effects,
    figures,
    kill_after_epoch,
    open_trials,
    read_runs,
    search,
    shown,
    start,
    study,
    without_figures,
)
from support import make_folder
from tests.reports.pages import Page

pytestmark = pytest.mark.slow
EVERY_SETTING = {"search.sampler": "grid", "search.pruner": "none"}
DEPTHS = "freeze_depth = {low = 0, high = 5}\n"
PHOTOS = {"data.source": "folder:photos"}


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    space = "freeze_depth = {low = 0, high = 4}\nbase_lr = {low = 1e-5, high = 1e-2, log = true}\n"
    # Two recipes, and three trials by a sampler that looks at them.
    chosen = VIT | {"train.epochs": 4, "search.pruner": "median"}
    cut, trials = 4, 5
    study(tmp_path, *search(tmp_path, "whole", space, trials, chosen))
    process = start(tmp_path, *search(tmp_path, "cut", space, trials, chosen), "--json")
    kill_after_epoch(process, trial=cut)
    assert len(read_runs(tmp_path, "cut")) == cut, "killed too late: nothing is shown"
    study(tmp_path, "resume", "cut")
    assert open_trials(tmp_path, "cut") == []
    # What the killed process had begun is a trial of its own, so that numbers differ.
    whole, resumed = (
        [replace(run, number=0, checkpoint=None) for run in read_runs(tmp_path, name)]
        for name in ("whole", "cut")
    )
    assert len(resumed) == trials and resumed == whole


def test_shared_work_changes_no_figure(tmp_path: Path) -> None:
    space, n = "freeze_depth = [3, 5]\naugment = ['none', 'standard']\n", 4
    chosen = PRETRAINED | EVERY_SETTING | {"train.label_smoothing": 0.1, "data.limit": 32}

    def cached() -> int:
        return sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*") if p.is_file())

    study(tmp_path, *search(tmp_path, "alone", space, n, chosen), "--cache", "0")
    before = cached()
    study(tmp_path, *search(tmp_path, "cold", space, n, chosen), "--cache", "500MB")
    assert cached() > before + 10_000
    study(tmp_path, *search(tmp_path, "warm", space, n, chosen), "--cache", "500MB")
    alone = figures(read_runs(tmp_path, "alone"))
    assert len(alone) == n
    for name in ("cold", "warm"):
        assert figures(read_runs(tmp_path, name)) == alone, name


def _source(name: str, path: Path) -> dict[str, torch.Tensor]:
    """Write weights that nobody else has, with batch norms that are no identities."""
    torch.manual_seed(0)
    fixed = {"img_size": 32} if "vit" in name else {}
    state = timm.create_model(name, num_classes=1000, **fixed).state_dict()
    for key, tensor in state.items():
        if key.endswith(("running_mean", "running_var")):
            tensor.add_(0.1)
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path)
    return state


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_frozen_stages_keep_their_bits(tmp_path: Path, name: str) -> None:
    source = _source(name, tmp_path / "w.safetensors")
    levels = json.loads(study(tmp_path, "backbones", f"timm:{name}", "--json"))
    chosen = EVERY_SETTING | {
        "train.backbone": f"timm:{name}",
        "train.weights": "w.safetensors",
        "train.epochs": 1,
        "train.batch_norm": "train",
        "train.features": "last",  # the network's own names in the checkpoint
        "data.limit": 20,
        "train.batch_size": 10,
        "study.keep_checkpoints": 6,
    }
    study(tmp_path, *search(tmp_path, "s", DEPTHS, 6, chosen))
    runs = {run.config["freeze_depth"]: run for run in read_runs(tmp_path, "s")}
    assert sorted(runs) == [*range(6)]
    counts = []
    for depth in range(6):
        run = runs[depth]
        assert run.checkpoint is not None
        trained = safetensors.torch.load_file(run.checkpoint / "model.safetensors")
        kept = {k for k in source if source[k].shape == trained[k].shape}
        equal = {k for k in kept if torch.equal(source[k], trained[k])}
        names = [n for level in levels[: depth + 1] for n in level["newly_frozen"]]
        named = tuple(f"{n}." for n in names if not n.startswith("rest of "))
        frozen = {k for k in source if named and k.startswith(named)}
        assert frozen <= equal, (depth, sorted(frozen - equal)[:3])
        counts.append(len(equal))
    assert counts == sorted(set(counts)), "each level freezes more"
    # Level 5 trains the head alone, which has other classes.
    assert counts[-1] == len(kept) < len(source)


@pytest.mark.parametrize("name", ["timm:test_vit", "resnet18"])
def test_checkpoint_in_the_plain_library_predicts_as_recorded(tmp_path: Path, name: str) -> None:
    for seed, (split, n) in enumerate({"train": 24, "val": 12, "test": 4}.items()):
        make_folder(tmp_path / "photos" / split, {"red": n, "blue": n, "green": n}, 200, seed)
    own = VIT if "vit" in name else {"train.weights": "none", "train.base_lr": 0.005}
    chosen = PHOTOS | own | {"train.backbone": name, "train.freeze_depth": 1, "data.limit": 72}
    study(tmp_path, *search(tmp_path, "s", "", 1, chosen))
    (run,) = read_runs(tmp_path, "s")
    assert run.checkpoint is not None
    card = json.loads((run.checkpoint / "card.json").read_text())
    if name.startswith("timm:"):
        plain = timm.create_model(name.removeprefix("timm:"), num_classes=3, img_size=32)
    else:
        plain = torchvision.models.get_model(name, num_classes=3)
    state = safetensors.torch.load_file(run.checkpoint / "model.safetensors")
    plain.load_state_dict(state, strict=True)
    shape = card["preprocessing"]
    method = v2.InterpolationMode(shape["interpolation"])
    view = v2.Compose(  # the libraries' own, of the whole image
        [
            v2.Resize(shape["resize_size"], method),
            v2.CenterCrop(shape["image_size"]),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(shape["mean"], shape["std"]),
        ]
    )
    with np.load(run.checkpoint / "val_predictions.npz") as saved:
        for path, recorded in zip(saved["paths"], saved["probabilities"], strict=True):
            image = Image.open(tmp_path / "photos" / str(path)).convert("RGB")
            with torch.inference_mode():
                given = plain.eval()(view(image)[None]).softmax(1)[0].numpy()
            np.testing.assert_allclose(given, recorded, atol=1e-4)
    assert run.value is not None and run.value > 0.4, "it must have learned something"


def test_ablation_finds_planted_effects_after_a_kill(tmp_path: Path) -> None:
    make_folder(tmp_path / "photos", {"red": 30, "blue": 30, "green": 30})
    chosen = PHOTOS | VIT | {
        "train.freeze_depth": 4, "train.batch_size": 8, "train.epochs": 4, "data.limit": 40,
        "data.val_fraction": 0.4, "ablation.margin": 5,
    }  # fmt: skip
    factors = ["base_lr=1e-9", "step_gamma=0.5", "clip_norm=1000000.0"]
    command = [*ablation(tmp_path, chosen, *factors), "--replicates", "6"]
    kill_after_epoch(start(tmp_path, *command, "--name", "cut", "--json"), trial=5)
    with without_figures():
        found = effects(tmp_path, *command, "--name", "cut")
        whole = effects(tmp_path, *command, "--name", "whole")
    assert found == whole
    assert open_trials(tmp_path, "cut") == []
    assert {label.split(" = ")[0]: row["verdict"] for label, row in found.items()} == {
        "base_lr": "degrades",  # nothing is learned
        "step_gamma": "identical",  # another schedule's
        "clip_norm": "identical",  # larger than any gradient
    }
    assert all(row["low"] <= row["difference"] <= row["high"] for row in found.values())
    # What does nothing under another schedule is no run of its own.
    assert len(read_runs(tmp_path, "cut")) == 3 * 6


def test_search_does_not_depend_on_test_images_and_test_reads_them_once(tmp_path: Path) -> None:
    chosen = PHOTOS | VIT | {"train.epochs": 1, "data.limit": 24}
    space = "freeze_depth = {low = 0, high = 4}\n"
    homes = [tmp_path / "one", tmp_path / "two"]
    for k, home in enumerate(homes):
        make_folder(home / "photos/train", {"red": 16, "blue": 16})
        make_folder(home / "photos/val", {"red": 8, "blue": 8}, seed=1)
        # The second one's test images are others, and their classes are the wrong way round.
        names = ("red", "blue") if k == 0 else ("blue", "red")
        make_folder(home / "photos/test", dict.fromkeys(names, 8), seed=2 + k)
        study(home, *search(home, "s", space, 4, chosen))
        assert shown(home, "s")["tests"] == []
    one, two = (read_runs(home, "s") for home in homes)
    assert figures(one) == figures(two)
    first = json.loads(study(homes[0], "test", "s", "--json"))
    assert json.loads(study(homes[0], "test", "s", "--json")) == first
    (recorded,) = shown(homes[0], "s")["tests"]
    assert recorded == first
    assert (recorded["n"], recorded["trial_number"]) == (16, None)  # of the model
    assert read_runs(homes[0], "s") == one


def test_report_names_the_decisive_setting_and_shows_pruned_trials(tmp_path: Path) -> None:
    make_folder(tmp_path / "photos", {"<script>alert(1)": 24, "blue & green": 24})
    # Under a cosine schedule step_gamma does nothing.
    space = (
        "base_lr = {low = 1e-7, high = 1e-1, log = true}\n"
        "step_gamma = {low = 0.01, high = 1.0, log = true}\n"
    )
    chosen = PHOTOS | VIT | {
        "train.freeze_depth": 4, "train.batch_size": 8, "train.epochs": 3,
        "data.val_fraction": 0.4,
        "search.sampler": "random", "search.pruner": "median", "search.recipes": False,
    }  # fmt: skip
    study(tmp_path, *search(tmp_path, "s", space, 24, chosen))
    runs = read_runs(tmp_path, "s")
    assert 5 < sum(run.state == "pruned" for run in runs) < 24
    page = Page(tmp_path / "frostline-runs/s/report/report.html")
    assert "<script>alert(1)" in page.text and "blue & green" in page.text
    decisive = re.search(r"\b(base_lr|step_gamma)\b[^.]{0,60}\d+ %", page.text)
    assert decisive is not None and decisive[1] == "base_lr"
