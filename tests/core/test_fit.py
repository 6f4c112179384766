import re
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from core.cache import ArrayCache
from core.data.splits import ImageData
from core.fit import fit, refit
from core.metrics import TrainingDiverged
from core.models.weights import WeightsError
from core.training.checkpoint import (
    PREDICTIONS_FILE,
    REFIT_FILE,
    load_checkpoint,
    read_card,
    remove_checkpoint,
)
from support import TINY, figures
from tests.core.runs import small_memory, train, weights_of


def test_the_seed_alone_decides_the_numbers(data: ImageData) -> None:
    alone = train(TINY, data)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert alone == train(replace(TINY, workers=1), data)
    assert torch.equal(before, torch.random.get_rng_state())
    assert alone != train(replace(TINY, seed=1), data)
    mixed, other = [], fit(replace(TINY, seed=9, freeze_depth=3), data)
    for metrics in fit(TINY, data):
        next(other)
        mixed.append(figures(metrics))
    assert alone == mixed


def test_of_a_share_of_the_training_images_others_are_never_used(
    data: ImageData, tmp_path: Path
) -> None:
    found = []
    for share, images in ((0.5, data), (1.0, data.with_share(0.5))):
        config, cache = replace(TINY, train_fraction=share), ArrayCache(tmp_path / "cache", 0)
        found += train(config, images, checkpoint_dir=tmp_path)
        refit(config, images, tmp_path, cache=cache, should_stop=lambda: False)
        found.append({"refit": (tmp_path / REFIT_FILE).read_bytes()})
    assert found[: len(found) // 2] == found[len(found) // 2 :]


def test_accumulated_gradients_take_the_same_step(data: ImageData) -> None:
    # Without batch statistics, which see the batch's parts, parts add up to the whole.
    config = replace(TINY, epochs=1, base_lr=1e-3, batch_norm="frozen", freeze_depth=5)
    whole = list(fit(config, data))[0]
    halves = list(fit(replace(config, micro_batch_size=3), data))[0]
    assert halves.train_loss == pytest.approx(whole.train_loss, rel=1e-5)
    assert halves.val_loss == pytest.approx(whole.val_loss, rel=1e-5)


def test_sum_reduction_is_the_mean_at_a_rate_times_the_batch(data: ImageData) -> None:
    config = replace(TINY, batch_size=8, momentum=0, weight_decay=0, schedule="constant", epochs=1)
    mean = list(fit(replace(config, base_lr=0.008), data))[0]
    summed = list(fit(replace(config, base_lr=0.001, loss_reduction="sum"), data))[0]
    assert summed.val_loss == pytest.approx(mean.val_loss, rel=1e-3)


def test_frozen_statistics_stay_the_sources_to_the_bit(
    data: ImageData, weights_file: Path, tmp_path: Path
) -> None:
    source = safetensors.torch.load_file(weights_file)
    for batch_norm, is_kept in (("auto", True), ("train", False)):
        config = replace(TINY, weights=str(weights_file), batch_norm=batch_norm)
        train(config, data, checkpoint_dir=tmp_path)
        trained = weights_of(tmp_path)
        assert torch.equal(trained["bn1.running_mean"], source["bn1.running_mean"]) is is_kept
        assert not torch.equal(trained["bn1.weight"], source["bn1.weight"])


def test_a_network_that_breaks_only_in_evaluation_has_diverged(
    data: ImageData, weights_file: Path, tmp_path: Path
) -> None:
    # Training normalises by the batch; evaluation reads the running statistics, which are NaN.
    state = safetensors.torch.load_file(weights_file)
    state["bn1.running_mean"].fill_(float("nan"))
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    config = replace(TINY, weights=str(tmp_path / "w.safetensors"), batch_norm="train")
    with pytest.raises(TrainingDiverged, match="validation loss is no longer finite at epoch 1"):
        train(config, data)


def test_batch_norms_are_never_trained_by_one_image(data: ImageData) -> None:
    config = replace(TINY, epochs=1, batch_size=11, micro_batch_size=5)
    with small_memory(5) as seen:
        next(fit(config, data))
    assert 1 not in seen and max(seen) == 4  # 11 as 4, 4 and 3
    with small_memory(1):
        with pytest.raises(torch.OutOfMemoryError, match="even 3 of 11 images at a time"):
            next(fit(config, data))
        assert next(fit(replace(config, batch_norm="frozen"), data)).micro_batch_size == 1


def test_memory_of_the_optimizer_ends_the_run_with_a_remedy(data: ImageData) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = register_optimizer_step_pre_hook(refuse)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="optimizer's state .* = sgd"):
            next(fit(TINY, data))
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 500}, "batch_size must be <= the number of training images, 24"),
        ({"micro_batch_size": 1}, "two images at a time .*batch_norm=frozen"),
        ({"batch_size": 7, "micro_batch_size": 2}, r"batches of \[3, 7\]"),
        ({"batch_size": 1, "batch_norm": "frozen"}, None),
        ({"batch_size": 1, "freeze_depth": 5}, None),
        ({"batch_size": 1, "backbone": "timm:test_vit"}, None),  # has no batch norm
        ({"batch_size": 500, "freeze_depth": 5, "head_solver": "logistic"}, None),
    ],
    ids=str,
)
def test_batches_that_cannot_be_trained_on_are_refused(
    data: ImageData, settings: dict[str, Any], message: str | None
) -> None:
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        next(fit(replace(TINY, **settings), data))


def test_the_card_of_a_checkpoint_is_that_of_the_best_epoch(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.views, "grey_range", (0.0, 4095.0))
    (tmp_path / REFIT_FILE).write_bytes(b"of an earlier run")
    epochs = list(fit(replace(TINY, epochs=3), data, checkpoint_dir=tmp_path))
    assert not (tmp_path / REFIT_FILE).exists()
    best = max(epochs, key=lambda m: (m.score or 0.0, -m.epoch))
    card = read_card(tmp_path)
    assert [m.epoch for m in epochs] == [1, 2, 3]
    assert (card.metrics.epoch, card.metrics.val_acc) == (best.epoch, best.val_acc)
    assert (card.classes, card.data["fingerprint"]) == (data.classes, data.fingerprint)
    assert card.preprocessing.grey_range == (0, 4095)


def test_the_lines_of_the_documentation_give_the_recorded_predictions(
    data: ImageData, tmp_path: Path
) -> None:
    root = Path(__file__).parents[2]
    readme = "".join((root / name).read_text("utf-8") for name in ("README.md", "docs/usage.md"))
    blocks = re.findall("```python\n(.*?)```", readme, re.DOTALL)
    model, snippet = (block for block in blocks if "import load_" in block or "eval_view" in block)
    list(fit(replace(TINY, epochs=2), data, checkpoint_dir=tmp_path))
    with np.load(tmp_path / PREDICTIONS_FILE) as saved:
        paths, recorded = saved["paths"].tolist(), saved["probabilities"]
        assert saved["predicted"].tolist() == recorded.argmax(1).tolist()
    assert (tuple(paths), recorded.dtype) == (data.val.paths, "float32")
    for path, expected in zip(paths, recorded, strict=True):
        image = Path(data.source.removeprefix("folder:"), path)
        names: dict[str, Any] = {}
        own = snippet.replace("frostline-runs/photos/trial-0007", str(tmp_path))
        exec(own.replace("new.jpg", str(image)), names)
        assert names["probabilities"][0].numpy() == pytest.approx(expected, abs=1e-5)
        # A checkpoint is a model of one member.
        own = model.replace("frostline-runs/photos/model", str(tmp_path))
        exec(own.replace("new.jpg", str(image)), names)
        assert names["probabilities"][0] == pytest.approx(expected, abs=1e-5)


def test_a_users_files_stay_where_a_checkpoint_is_removed(data: ImageData, tmp_path: Path) -> None:
    folder, link = tmp_path / "trial-0000", tmp_path / "trial-0001"
    list(fit(replace(TINY, epochs=1), data, checkpoint_dir=folder))
    link.symlink_to(folder)
    remove_checkpoint(link)
    assert read_card(folder)
    (folder / "note.txt").write_text("mine")
    (folder / "card.json.partial").touch()
    remove_checkpoint(folder)
    assert [path.name for path in folder.iterdir()] == ["note.txt"]


def test_run_that_is_left_early_keeps_no_checkpoint(data: ImageData, tmp_path: Path) -> None:
    with closing(fit(TINY, data, checkpoint_dir=tmp_path / "trial")) as epochs:
        next(epochs)
    assert not (tmp_path / "trial").exists()


def test_a_missing_or_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no readable card.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "card.json").write_text("{}")
    with pytest.raises(WeightsError, match="no readable card.json"):
        load_checkpoint(tmp_path)
