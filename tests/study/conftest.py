"""What tests of several packages of `study` share."""

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_study import make_home


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with images and the configuration of a small study."""
    return make_home(tmp_path)


@pytest.fixture
def limit_files() -> Iterator[Callable[[int], None]]:
    """Let no file grow beyond a size, as on a full disk; -1 lifts that."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))

    yield limit
    limit(before)
