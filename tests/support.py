"""What several tests need: small folders of real image files, and the shared photo sets."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from PIL import Image

from core.config import TrainConfig
from core.metrics import MEASURED, EpochMetrics

ROOT = Path(__file__).resolve().parents[1]
CLASSIC: dict[str, Any] = {
    "optimizer": "sgd",
    "base_lr": 0.01,
    "head_lr_mult": 10.0,
    "weight_decay": 1e-4,
    "schedule": "cosine",
    "head_init": "default",
    "views": None,
}
"""SGD as most recipes have it, from a new head and on new views in every epoch."""
TINY = TrainConfig(
    backbone="timm:test_resnet",
    weights="none",
    image_size=32,
    epochs=2,
    batch_size=8,
    head_solver="sgd",
    device="cpu",
    **CLASSIC,
)
"""The whole of a network, trained on a few images in less than a second."""


def classic_settings(text: str = "") -> dict[str, object]:
    """Return a classic search's settings, but for keys that a configuration's text has."""
    settings: dict[str, object] = {"search.strategy": "sampler"}
    settings |= {f"train.{k}": "none" if v is None else v for k, v in CLASSIC.items()}
    return {
        key: value
        for key, value in settings.items()
        if not re.search(rf"\b{key.split('.')[1]}\s*=", text)
    }


def some_photos() -> Path:
    """Return a few photos: those that benchmarks/gpu_kit.py took along, else a shared set."""
    folders = (ROOT / "gpu-kit" / "data" / "hotdog", ROOT.parent / "shared" / "data" / "hotdog")
    found = next((folder for folder in folders if folder.is_dir()), None)
    return found or pytest.skip("the photo set hotdog is not beside the project (shared/data)")


def make_folder(
    root: Path, classes: Mapping[str, int], side: int = 40, seed: int = 0, suffix: str = "png"
) -> Path:
    """Write noisy images, one folder per class; class k is brighter in colour channel k mod 3."""
    rng = np.random.default_rng(seed)
    for k, (name, n) in enumerate(classes.items()):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(n):
            pixels = rng.integers(0, 120, (side, side + i % 5, 3))
            pixels[..., k % 3] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.{suffix}")
    return root


def figures(metrics: EpochMetrics) -> dict[str, Any]:
    """Return an epoch's figures, but for what is measured and differs from run to run."""
    found = dataclasses.asdict(metrics)
    return {name: value for name, value in found.items() if name not in MEASURED}


def distributions_of(*params: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """Return dimensions from which all these parameters may have come."""
    found: dict[str, BaseDistribution] = {}
    for name in dict.fromkeys(name for row in params for name in row):
        values = list(dict.fromkeys(row[name] for row in params if name in row))
        if all(isinstance(value, float) for value in values):
            found[name] = FloatDistribution(min(values), max(values))
        else:
            found[name] = CategoricalDistribution(values)
    return found
