"""What must hold on a GPU; on the CPU the same tests run with the smallest network of a family."""

import gc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_study import config_of, make_home, rows_of, run

from core.cache import ArrayCache
from core.config import DataConfig, TrainConfig
from core.data.splits import ImageData, load_data
from core.fit import fit
from core.models.builder import build
from core.models.weights import packaged_file
from core.training.batches import Views
from support import CLASSIC, make_folder
from tests.core.runs import are_equal, small_memory, train, train_in_pieces, weights_of

FAMILIES = {
    "resnet": {"cpu": "timm:test_resnet", "cuda": "resnet18"},
    "efficientnet": {"cpu": "timm:test_efficientnet", "cuda": "timm:tf_efficientnet_lite0"},
    "vit": {"cpu": "timm:test_vit", "cuda": "timm:vit_small_patch16_224"},
}


def _config(device: torch.device, family: str = "resnet", **settings: Any) -> TrainConfig:
    backbone = FAMILIES[family][device.type]
    return TrainConfig(
        backbone=backbone,
        weights="packaged" if packaged_file(backbone) else "none",
        image_size={"cpu": 32, "cuda": 96}[device.type],
        device=device.type,
        **CLASSIC | {"epochs": 2, "batch_size": 8, "head_solver": "sgd"} | settings,
    )


@pytest.mark.usefixtures("is_state_free")
@pytest.mark.parametrize("way", ["again", "from kept arrays", "continued"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_gives_the_same_bits(
    data: ImageData, tmp_path: Path, device: torch.device, family: str, way: str
) -> None:
    config = _config(device, family, freeze_depth=5 if way == "from kept arrays" else 0)
    one, two = tmp_path / "one", tmp_path / "two"
    first = train(config, data, checkpoint_dir=one)
    if way == "again":
        second = train(config, data, checkpoint_dir=two)
    elif way == "continued":
        second = train_in_pieces(config, data, tmp_path / "state.pt", 4, checkpoint_dir=two)
    else:
        for _ in ("cold", "warm"):
            cache = ArrayCache(tmp_path / "arrays", 1 << 30)
            second = train(config, data, cache=cache, checkpoint_dir=two)
        assert cache.hits and not cache.misses
    assert second == first
    assert are_equal(weights_of(two), weights_of(one))


@pytest.mark.parametrize("augment", ["none", "standard", "trivial"])
def test_views_are_made_on_the_gpu_where_they_can_be(
    data: ImageData, device: torch.device, augment: str
) -> None:
    config = _config(device, augment=augment)
    views = Views(config, build(config, data.classes).preprocessing, data, device)
    is_gpus = device.type == "cuda" and augment == "standard"
    assert views.is_made_on_device is is_gpus
    with closing(views.train(0, 0)) as batches:
        inputs, labels = next(batches)
    assert (inputs.device.type, labels.device.type) == (device.type, device.type)


PHASES: dict[str, tuple[dict[str, Any], Callable[[], bool]]] = {
    "step": ({"batch_size": 128}, torch.is_grad_enabled),
    "evaluation": ({"batch_size": 8}, torch.is_inference_mode_enabled),
    "frozen layers": (
        {"batch_size": 8, "freeze_depth": 5},
        lambda: not torch.is_grad_enabled() and not torch.is_inference_mode_enabled(),
    ),
}


@pytest.fixture(scope="module")
def many(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    """Return enough images that a phase takes much more memory than the network's weights."""
    home = tmp_path_factory.mktemp("many")
    n = {"cpu": 64, "cuda": 128}[device.type]
    for seed, part in enumerate(("train", "val")):
        make_folder(home / "photos" / part, {"red": n, "blue": n}, side=40, seed=seed)
    return load_data(DataConfig(source=str(home / "photos"), cache_dir=str(home / "cache")), 40)


@contextmanager
def _small_memory(device: torch.device, peak: int, phase: str) -> Iterator[Callable[[], int]]:
    """Leave a phase less memory than it took; gives how often it ran out.

    On the CPU, layers refuse more than nine images at once in this phase.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_stats(device)["num_ooms"]
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(0.7 * peak / total, device)
        try:
            yield lambda: torch.cuda.memory_stats(device)["num_ooms"] - before
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    else:
        with small_memory(9, PHASES[phase][1]) as seen:
            yield lambda: sum(n > 9 for n in seen)


@pytest.mark.parametrize("phase", ["step", "evaluation", "frozen layers"])
def test_a_run_lives_on_when_memory_runs_out(
    many: ImageData, device: torch.device, phase: str
) -> None:
    size = {"cpu": 32, "cuda": 224}[device.type]
    config = _config(device, epochs=1, batch_norm="frozen", **PHASES[phase][0])
    config = replace(config, image_size=size)
    [free] = fit(config, many)
    with _small_memory(device, free.peak_memory_bytes, phase) as n_ooms:
        [squeezed] = fit(config, many)
    assert n_ooms() > 0
    assert (squeezed.micro_batch_size < free.micro_batch_size) is (phase == "step")
    assert squeezed.train_loss == pytest.approx(free.train_loss, rel=1e-2)
    assert squeezed.val_loss == pytest.approx(free.val_loss, rel=1e-2)


@pytest.mark.gpu
def test_a_study_runs_on_the_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    run(config_of(make_home(tmp_path), 2, 'train.device="cuda"'))
    assert [row.state for row in rows_of(tmp_path)] == ["complete", "complete"]
