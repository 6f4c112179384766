from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from core.data.splits import ImageData
from core.fit import fit
from core.metrics import FloatArray
from core.model import load_model, save_model
from core.models.weights import WeightsError
from core.training.checkpoint import PREDICTIONS_FILE, REFIT_FILE, read_card
from support import TINY

HEAD = replace(TINY, freeze_depth=5, head_solver="logistic")


def _photos(data: ImageData) -> list[Path]:
    return [Path(data.source.removeprefix("folder:"), path) for path in data.val.paths]


@pytest.fixture(scope="module")
def checkpoints(data: ImageData, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    configs = [
        replace(HEAD, features="last"),
        replace(HEAD, mirrored=True),
        replace(HEAD, features="last", mirrored=True, image_size=40),
        replace(HEAD, freeze_depth=3, epochs=1),
        *(replace(HEAD, freeze_depth=depth, epochs=1, mirrored=True) for depth in (0, 4)),
    ]
    folders = [tmp_path_factory.mktemp("checkpoint") for _ in configs]
    for config, folder in zip(configs, folders, strict=True):
        list(fit(config, data, checkpoint_dir=folder))
        (folder / REFIT_FILE).unlink(missing_ok=True)  # a model would have the refit's weights
    return folders


def _probabilities(folder: Path) -> FloatArray:
    with np.load(folder / PREDICTIONS_FILE) as saved:
        return saved["probabilities"]


def test_every_checkpoint_gives_the_recorded_predictions_and_accuracy(
    data: ImageData, checkpoints: list[Path]
) -> None:
    for folder in checkpoints:
        found = load_model(folder).predict(_photos(data))
        np.testing.assert_allclose(found, _probabilities(folder), atol=1e-4)
        accuracy = (found.argmax(axis=1) == data.val.labels).mean()
        assert accuracy == read_card(folder).metrics.val_acc


def test_a_model_is_the_weighted_mean_of_its_members_and_replaces_another(
    data: ImageData, checkpoints: list[Path], tmp_path: Path
) -> None:
    photos, [a, b, *_] = _photos(data), checkpoints
    save_model(tmp_path, [(b, 1.0, 1.0)], {})
    save_model(tmp_path, [(a, 0.25, 1.0), (b, 0.75, 2.0)], {"score": 0.5})
    cooler = np.sqrt(_probabilities(b))
    cooler /= cooler.sum(axis=1, keepdims=True)
    save_model(tmp_path, [(a, 0.25, 1.0), (b, 0.75, 2.0)], {})  # only now the first one is gone
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 4
    model = load_model(tmp_path)
    assert model.classes == data.classes
    expected = 0.25 * _probabilities(a) + 0.75 * cooler
    np.testing.assert_allclose(model.predict(photos), expected, atol=1e-4)


@pytest.mark.parametrize("text", ["", "[]", '{"members": [{}]}', '{"members": 3}'])
def test_a_damaged_model_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(WeightsError, match="has no readable model.json"):
        load_model(tmp_path)


def test_a_model_whose_weights_were_replaced_is_refused(
    checkpoints: list[Path], tmp_path: Path
) -> None:
    save_model(tmp_path, [(checkpoints[0], 1.0, 1.0)], {})
    (tmp_path / "member-0" / "model.safetensors").write_bytes(b"others")
    with pytest.raises(WeightsError, match="other weights"):
        load_model(tmp_path)
