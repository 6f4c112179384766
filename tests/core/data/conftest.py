import pytest

from core.config import DataConfig, Preprocessing
from core.data.splits import ImageData, load_data
from support import make_folder


@pytest.fixture(scope="session")
def noise(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    """Return 41 noisy images of two classes and several sizes, split."""
    folder = tmp_path_factory.mktemp("views")
    make_folder(folder / "photos", {"a": 20, "b": 21}, side=50)
    config = DataConfig(source=str(folder / "photos"), cache_dir=str(folder / "cache"))
    return load_data(config, 60)


@pytest.fixture(scope="session")
def shown() -> Preprocessing:
    return Preprocessing(24, 28, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear")
