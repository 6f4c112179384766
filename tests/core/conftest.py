from pathlib import Path

import pytest
import safetensors.torch
import torch

from core.config import DataConfig, Preprocessing
from core.data.splits import ImageData, load_data
from core.models.sources import create
from core.training import resume
from support import make_folder


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return each kind of device on which a test must hold."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    """Return small images of two classes that are easy to tell apart."""
    folder = tmp_path_factory.mktemp("images")
    make_folder(folder / "photos", {"red": 20, "blue": 20}, side=40)
    config = DataConfig(source=str(folder / "photos"), cache_dir=str(folder / "cache"))
    return load_data(config, 40)


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with weights of timm:test_resnet that no seed of a run draws."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = create("timm:test_resnet", 32, 1000, is_pretrained=True)
    safetensors.torch.save_file(network.model.state_dict(), path)
    return path


@pytest.fixture
def shown() -> Preprocessing:
    return Preprocessing(24, 28, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear")


@pytest.fixture
def is_state_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let writing a run's state cost nothing, so that it is written whenever it is time to."""
    monkeypatch.setattr(resume, "_MOST_SHARE", float("inf"))
