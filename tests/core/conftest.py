import pytest
import torch

from core.config import DataConfig
from core.data.splits import ImageData, load_data
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
