"""Frostline from Python: the public names, each where it is defined."""

from core.config import DataConfig, TrainConfig
from core.data.decode import eval_view
from core.data.splits import ImageData, load_data
from core.fit import fit
from core.metrics import EpochMetrics
from core.model import load_model
from core.training.checkpoint import load_checkpoint
from study.config.load import load_config
from study.config.study_config import StudyConfig

__all__ = [
    "DataConfig",
    "EpochMetrics",
    "ImageData",
    "StudyConfig",
    "TrainConfig",
    "eval_view",
    "fit",
    "load_checkpoint",
    "load_config",
    "load_data",
    "load_model",
]
