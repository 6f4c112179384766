import pytest

from core.config import Preprocessing


@pytest.fixture
def shown() -> Preprocessing:
    return Preprocessing(24, 28, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear")
