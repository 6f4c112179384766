"""Where pictures come from: folders, torchvision's data sets, and the embedded digits."""

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from core.config import DataConfig
from core.datasets import find_in_torchvision
from core.folders import find_in_folder
from core.labelled import Found, Labelled, digest_values
from core.pictures import DataError, Item

_DIGIT_SIDE = 64


def find_pictures(config: DataConfig) -> Found:
    """List a source's pictures.

    Raises:
        DataError: The source is unknown, missing, empty, or its folders do not agree.
    """
    kind, _, name = config.source.partition(":")
    if config.source == "digits":
        return _digits()
    if kind == "torchvision":
        return find_in_torchvision(name, Path(config.root), config.download)
    path = Path(name if kind == "folder" else config.source).expanduser()
    return find_in_folder(path)


def _digits() -> Found:
    if importlib.util.find_spec("sklearn") is None:
        raise DataError(
            'data.source = "digits" needs scikit-learn, which is not installed: '
            'pip install "frostline[demo]". Or name your own pictures: --data PATH.'
        )
    from sklearn.datasets import load_digits

    loaded = load_digits()
    names = tuple(str(k) for k in loaded.target_names)
    pictures = [
        Labelled(
            Item(digest_values(grey), f"digits/{i}", partial(_digit, grey)), names[label], None
        )
        for i, (grey, label) in enumerate(zip(loaded.images, loaded.target, strict=True))
    ]
    return Found(pictures, names)


def _digit(grey: Any) -> Image.Image:
    """Enlarge an 8 x 8 picture of values 0 to 16."""
    image = Image.fromarray(np.round(grey * (255 / 16)).astype(np.uint8))
    return image.resize((_DIGIT_SIDE, _DIGIT_SIDE), Image.Resampling.BICUBIC)
